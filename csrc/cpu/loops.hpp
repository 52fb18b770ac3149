// The inner loops of the CPU kernels: one table of functions for each instruction set.
#pragma once

#include "eigenfilter/contract.hpp"

namespace eigenfilter {
struct LanczosStep;
}

namespace eigenfilter::cpu {

// Columns that orthogonalize works on at once, whole groups: those of 60 float rows fit a
// second-level cache.
constexpr std::int64_t kColumns = 2048;
// Columns of a few rows that are in double at once: those of 8 take half a first-level cache.
constexpr std::int64_t kMixed = 256;

// The dtypes of a parameter, and of what is its state, and of its gradients.
struct DTypes {
    DType param, grad;
};

// Each works on n consecutive elements, which lie at `place`. `stream` writes what is not read past
// the caches.
struct Loops {
    const char* isa;
    // x <- from + ...; `from` may be x; b, where given, gets what `from` held.
    void (*perturb)(DTypes, const PerturbScalars<double>&, void* x, const void* from, const void* g,
                    void* b, std::int64_t n, bool stream);
    void (*perturb_hvp)(DTypes, const HvpScalars<double>&, void* x, const void* g, const void* g0,
                        const void* b, std::int64_t n, bool stream);
    void (*sgd_step)(DTypes, const SgdScalars<double>&, void* x, const void* g, void* m,
                     const void* b, std::int64_t n, bool stream, const Place& place);
    void (*adamw_step)(DTypes, const AdamWScalars<double>&, void* x, const void* g, void* m,
                       void* v, const void* b, std::int64_t n, bool stream, const Place& place);
    // Of a gradient, or of one times a parameter. The order of summation is the same for every
    // instruction set; `weights` may be nullptr.
    double (*sum_squares)(DTypes, const void* t, const void* weights, std::int64_t n);
    bool (*has_nonfinite)(DType, const void* t, std::int64_t n);
    // Of n <= kColumns columns of a basis, whose rows lie `stride` elements apart, and of a vector:
    // out[i] <- q_i . w.
    void (*dots)(DType basis, DType vector, const void* q, std::int64_t stride, std::int64_t rows,
                 const void* w, std::int64_t n, double* out);
    // w <- w - sum_i c[i] q_i; returns the sum of the squares of what is left.
    double (*subtract)(DType basis, DType vector, const void* q, std::int64_t stride,
                       std::int64_t rows, const double* c, void* w, std::int64_t n);
    // out[2] <- q . w, w . w
    void (*row_dots)(DType, const void* q, const void* w, std::int64_t n, double* out);
    // u <- a combination of w, q and u; out[2] <- u . u, u . q
    void (*lanczos_step)(DType, const LanczosStep&, void* u, const void* q, const void* w,
                         std::int64_t n, double* out);
    // Of n <= kMixed columns of `count` rows: their inner products are added to the lower triangle
    // of out [count, count].
    void (*gram)(DType, const void* rows, std::int64_t stride, std::int64_t count, std::int64_t n,
                 double* out);
    // Row r <- the sum of rows s <= r, each times factors [count, count] at (r, s).
    void (*mix_rows)(DType, const double* factors, void* rows, std::int64_t stride,
                     std::int64_t count, std::int64_t n);
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
