// The inner loops of the CPU kernels: one table of functions for each instruction set.
#pragma once

#include "core/ops.hpp"

namespace eigenfilter::cpu {

// Columns that orthogonalize works on at once, whole groups: those of 60 float rows fit a
// second-level cache.
constexpr std::int64_t kColumns = 2048;
// Columns of a few rows that are in double at once: those of 8 take half a first-level cache.
constexpr std::int64_t kMixed = 256;

// The elements of a call's i-th tensors that a loop updates.
struct Stretch {
    const Tensors& t;
    std::size_t i;
    std::int64_t first, count;
    bool streams;  // what is not read is written past the caches

    // Where it begins in a list, or nullptr if the list is absent.
    template <class Bits>
    EIGENFILTER_RULE Bits* at(void* const* list) const {
        return list != nullptr ? static_cast<Bits*>(list[i]) + first : nullptr;
    }
    EIGENFILTER_RULE Place place() const {
        return {static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(first)};
    }
};

// The dtypes of a parameter and of its gradient, or of a weight and of what it weighs.
struct DTypes {
    DType param, grad;
};

// The part of a row's softmax that has been taken: the largest logit, or the least number there is;
// the sums of exp(z - largest), and of its products with u.
struct SoftmaxSums {
    double largest, total, products;
};

struct Loops {
    const char* isa;
#define UPDATE(name, Scalars) void (*name)(const Stretch&, const Scalars<double>&);
    EIGENFILTER_UPDATES(UPDATE)
#undef UPDATE
    // The sum over t [n], or over its products with weights [n], which may be nullptr. The order of
    // summation is the same for every instruction set.
    double (*sum_squares)(DTypes, const void* t, const void* weights, std::int64_t n);
    // The same over codes [n] with the scales of their groups, the first of which begins with them.
    double (*sum_squares_of_codes)(const std::int8_t* codes, const float* scales, std::int64_t n);
    bool (*has_nonfinite)(DType, const void* t, std::int64_t n);
    // Of rows q [rows, n], which lie `stride` elements apart, and w [n], n <= kColumns:
    // out [rows] <- q_i . w
    void (*dots)(DType basis, DType vector, const void* q, std::int64_t stride, std::int64_t rows,
                 const void* w, std::int64_t n, double* out);
    // w <- w - sum_i c[i] q_i; returns the sum of the squares of what is left.
    double (*subtract)(DType basis, DType vector, const void* q, std::int64_t stride,
                       std::int64_t rows, const double* c, void* w, std::int64_t n);
    // out [2] <- q . w, w . w for q, w [n]
    void (*row_dots)(DType, const void* q, const void* w, std::int64_t n, double* out);
    // u [n] <- a combination of w, q and u; out [2] <- u . u, u . q
    void (*lanczos_step)(DType, const LanczosStep&, void* u, const void* q, const void* w,
                         std::int64_t n, double* out);
    // Of rows [count, n], n <= kMixed: their inner products are added to the lower triangle of
    // out [count, count].
    void (*gram)(DType, const void* rows, std::int64_t stride, std::int64_t count, std::int64_t n,
                 double* out);
    // Row r <- the sum of rows s <= r, each times factors [count, count] at (r, s).
    void (*mix_rows)(DType, const double* factors, void* rows, std::int64_t stride,
                     std::int64_t count, std::int64_t n);
    // Of logits z [n] and u [n]: e [n] <- exp(z - the largest logit so far), added to the sums.
    void (*softmax_sums)(DType, const void* z, const void* u, void* e, std::int64_t n,
                         SoftmaxSums&);
    // out [n] <- factor e (u - mean); u may be out.
    void (*softmax_product)(DType, const void* e, const void* u, void* out, std::int64_t n,
                            double factor, double mean);
};

extern const Loops loops_baseline;
#ifdef EIGENFILTER_X86
extern const Loops loops_avx2;
extern const Loops loops_avx512;
#endif

// The table in use: the best this CPU has, unless set_isa chose another.
const Loops& loops();
// Fills `tables` (capacity: 3) with the tables this CPU can run, lowest first; returns how many.
int available(const Loops** tables);
bool set_isa(const char* name);

}  // namespace eigenfilter::cpu
