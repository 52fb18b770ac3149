// The table of inner loops, compiled once for each instruction set (EIGENFILTER_ISA names it).
#include "softmax_loops.hpp"

namespace eigenfilter::cpu {
namespace {

// The loops over vectors as the table has them: the types of their pointers are found here.
template <class Call>
auto by_basis_and_vector(DType basis, DType vector, Call call) {
    return by_dtype(basis, [&](auto of_q) {
        return by_vector(vector, [&](auto of_w) { return call(of_q, of_w); });
    });
}

template <class Storage>
auto* bits(Storage, void* p) {
    return static_cast<typename Storage::Bits*>(p);
}
template <class Storage>
auto* bits(Storage, const void* p) {
    return static_cast<const typename Storage::Bits*>(p);
}

void dots_of_any(DType basis, DType vector, const void* q, std::int64_t stride, std::int64_t rows,
                 const void* w, std::int64_t n, double* out) {
    by_basis_and_vector(basis, vector, [&](auto of_q, auto of_w) {
        dots<decltype(of_q)>(bits(of_q, q), stride, rows, bits(of_w, w), n, out);
    });
}

double subtract_any(DType basis, DType vector, const void* q, std::int64_t stride,
                    std::int64_t rows, const double* c, void* w, std::int64_t n) {
    by_basis_and_vector(basis, vector, [&](auto of_q, auto of_w) {
        subtract<decltype(of_q)>(bits(of_q, q), stride, rows, c, bits(of_w, w), n);
    });
    return sum_squares({vector, vector}, w, nullptr, n);
}

void row_dots_any(DType dtype, const void* q, const void* w, std::int64_t n, double* out) {
    by_vector(dtype, [&](auto t) { row_dots(bits(t, q), bits(t, w), n, out); });
}

void lanczos_step_any(DType dtype, const LanczosStep& rule, void* u, const void* q, const void* w,
                      std::int64_t n, double* out) {
    by_vector(dtype,
              [&](auto t) { lanczos_step(rule, bits(t, u), bits(t, q), bits(t, w), n, out); });
}

void gram_any(DType dtype, const void* rows, std::int64_t stride, std::int64_t count,
              std::int64_t n, double* out) {
    by_vector(dtype, [&](auto t) { gram(bits(t, rows), stride, count, n, out); });
}

void mix_rows_any(DType dtype, const double* factors, void* rows, std::int64_t stride,
                  std::int64_t count, std::int64_t n) {
    by_vector(dtype, [&](auto t) { mix_rows(factors, bits(t, rows), stride, count, n); });
}

void softmax_sums_any(DType dtype, const void* z, const void* u, void* e, std::int64_t n,
                      SoftmaxSums& sums) {
    by_vector(dtype, [&](auto t) { softmax_sums(bits(t, z), bits(t, u), bits(t, e), n, sums); });
}

void softmax_product_any(DType dtype, const void* e, const void* u, void* out, std::int64_t n,
                         double factor, double mean) {
    by_vector(dtype, [&](auto t) {
        softmax_product(bits(t, e), bits(t, u), bits(t, out), n, factor, mean);
    });
}

}  // namespace

#define STRING(name) #name
#define NAME(name) STRING(name)
#define JOIN(left, right) left##right
#define TABLE(name) JOIN(loops_, name)
#define UPDATE(name, Scalars) update_of<Scalars<double>>,

extern const Loops TABLE(EIGENFILTER_ISA) = {
    NAME(EIGENFILTER_ISA),
    EIGENFILTER_UPDATES(UPDATE)  //
    sum_squares,
    sum_squares_of_codes,
    has_nonfinite,
    dots_of_any,
    subtract_any,
    row_dots_any,
    lanczos_step_any,
    gram_any,
    mix_rows_any,
    softmax_sums_any,
    softmax_product_any,
};

}  // namespace eigenfilter::cpu
