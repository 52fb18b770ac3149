// States once each operation that is not an update, and declares the entry points of all. What the
// CPU and CUDA offer, the stub of a build without CUDA, and the bindings with their arguments and
// docstrings follow from here and from rules.hpp.
#pragma once

#include "core/rules.hpp"

namespace eigenfilter {

// What a reduction is called with, besides its lists.
struct Reduction {
    Scalar grad_scale;
    void* out;           // [1]
    bool out_is_double;  // or else it is a float
};

// found_inf [1] may be nullptr. Where it is not zero, no update is taken.
namespace cpu {
#define DECLARE_UPDATE(name, Scalars) \
    void name(const Tensors&, const Scalars<double>&, const float* found_inf, int threads);
EIGENFILTER_UPDATES(DECLARE_UPDATE)
#undef DECLARE_UPDATE
void norm(const Tensors&, const Reduction&, int threads);
void flag_nonfinite(const Tensors&, float* found_inf, int threads);
void orthogonalize(const Orthogonalization&, int threads);
void row_dots(const Recurrence&, int threads);
void lanczos_step(const Recurrence&, int threads);
void gram(const Rows&, int threads);
void mix_rows(const Rows&, int threads);
void cross_entropy_hvp(const SoftmaxProduct&, int threads);
}  // namespace cpu

// The same on a GPU, where each call runs asynchronously on a stream. found_inf [1], out (which is
// [1], and gram's [rows, rows]), factors and the workspace are device addresses. The function
// `<name>_workspace` returns how many doubles the workspace of a kernel holds. In a build without
// CUDA all of these functions but `compiled` throw std::runtime_error.
namespace cuda {
using Stream = void*;
bool compiled();
void require();

#define EIGENFILTER_CUDA_KERNELS(KERNEL)                                                           \
    KERNEL(std::int64_t, norm_workspace, (const Tensors& t))                                       \
    KERNEL(void, norm,                                                                             \
           (const Tensors& t, const Scalar& grad_scale, void* out, bool out_is_double,             \
            double* workspace, int device, Stream stream))                                         \
    KERNEL(void, flag_nonfinite, (const Tensors& t, float* found_inf, int device, Stream stream))  \
    KERNEL(std::int64_t, orthogonalize_workspace,                                                  \
           (std::int64_t rows, std::int64_t columns, std::int64_t count))                          \
    KERNEL(void, orthogonalize,                                                                    \
           (const Orthogonalization& p, double* workspace, int device, Stream stream))             \
    /* The workspace for a number of sums over all columns. */                                     \
    KERNEL(std::int64_t, sums_workspace, (std::int64_t sums, std::int64_t columns))                \
    KERNEL(void, row_dots, (const Recurrence& r, double* workspace, int device, Stream stream))    \
    KERNEL(void, lanczos_step,                                                                     \
           (const Recurrence& r, double* workspace, int device, Stream stream))                    \
    KERNEL(void, gram, (const Rows& v, double* out, double* workspace, int device, Stream stream)) \
    KERNEL(void, mix_rows, (const Rows& v, const double* factors, int device, Stream stream))      \
    KERNEL(void, cross_entropy_hvp, (const SoftmaxProduct& p, int device, Stream stream))

#define DECLARE_UPDATE(name, Scalars)                                                     \
    void name(const Tensors&, const Scalars<Scalar>&, const float* found_inf, int device, \
              Stream stream);
#define DECLARE(Result, name, parameters) Result name parameters;
EIGENFILTER_UPDATES(DECLARE_UPDATE)
EIGENFILTER_CUDA_KERNELS(DECLARE)
#undef DECLARE
#undef DECLARE_UPDATE
}  // namespace cuda

// Each operation lists its arguments in Python's order. Call is the struct that they are read into.
struct Norm {
    using Call = Reduction;
    static constexpr Argument<Call> kArguments[] = {
        {"tensors", &Tensors::x, kMomenta},
        {"out", &Call::out, &Call::out_is_double},
        {"weights", &Tensors::g, kOptional},
        {"momentum_scales", &Tensors::g_scales, kReadScales},
        {"grad_scale", &Call::grad_scale, Range::scale},
    };
    static constexpr const char* kDoc =
        R"(Euclidean norm of all elements of all tensors, or of their products with weights.

    out <- sqrt(sum_i sum_j (w_i[j] t_i[j])^2) / grad_scale)";
};

struct FlagNonfinite {
    using Call = Reduction;
    static constexpr Argument<Call> kArguments[] = {
        {"tensors", &Tensors::x, kGradients},
        {"found_inf", kWritten},
    };
    static constexpr const char* kDoc = R"(Set a flag where any element is infinite or NaN.

    found_inf <- 1 if some t_i[j] is not finite, else unchanged)";
};

// The operations below write nothing if their vectors have no elements. The caller therefore sets
// the results to zero first.
constexpr std::int64_t kMostVectors = 65535;  // the largest grid of a GPU in y

struct Orthogonalize {
    using Call = Orthogonalization;
    static constexpr std::int64_t kMost = kMostVectors;
    static constexpr Argument<Call> kArguments[] = {
        {"w", &Call::vectors, kWritten | kMayBeOne, &Call::count, &Call::columns,
         &Call::vector_dtype},
        {"basis", &Call::basis, kBasis, &Call::rows, &Call::columns, &Call::basis_dtype},
        {"coefficients", &Call::coefficients, kWritten, &Call::count, &Call::rows},
        {"norms", &Call::norms, kWritten, &Call::count},
        {"passes", &Call::passes},
    };
    static constexpr const char* kDoc =
        R"(Orthogonalize vectors w in place against the rows of a basis Q, `passes` times.

    c <- c + Q w,  w <- w - Q^T (Q w)    (c = 0 at first);    norms <- ||w||)";
};

struct RowDots {
    using Call = Recurrence;
    static constexpr std::int64_t kMost = kMostVectors;
    static constexpr Argument<Call> kArguments[] = {
        {"q", &Call::q, kRead, &Call::rows, &Call::columns, &Call::dtype},
        {"w", &Call::w, kRead},
        {"sums", &Call::sums, kWritten, 2, &Call::rows},
    };
    static constexpr const char* kDoc =
        R"(Inner products of vectors, and squared norms of the second ones.

    s_0i <- q_i . w_i,  s_1i <- w_i . w_i)";
};

struct LanczosRecurrence {
    using Call = Recurrence;
    static constexpr std::int64_t kMost = kMostVectors;
    static constexpr Argument<Call> kArguments[] = {
        {"u", &Call::u, kWritten, &Call::rows, &Call::columns, &Call::dtype},
        {"q", &Call::q, kRead},
        {"w", &Call::w, kRead},
        {"factors", &Call::factors, kRead, 3, &Call::rows},
        {"sums", &Call::sums, kWritten, 2, &Call::rows},
    };
    static constexpr const char* kDoc = R"(Take one step of many Lanczos recurrences.

    u_i <- f_0i w_i + f_1i q_i + f_2i u_i,  s_0i <- u_i . u_i,  s_1i <- u_i . q_i)";
};

struct Gram {
    using Call = Rows;
    static constexpr std::int64_t kMost = kMostRows;
    static constexpr Argument<Call> kArguments[] = {
        {"vectors", &Call::vectors, kRead, &Call::rows, &Call::columns, &Call::dtype},
        {"out", &Call::matrix, kWritten, &Call::rows, &Call::rows},
    };
    static constexpr const char* kDoc = R"(Gram matrix of a few vectors.

    G_ij <- v_i . v_j)";
};

struct MixRows {
    using Call = Rows;
    static constexpr std::int64_t kMost = kMostRows;
    static constexpr Argument<Call> kArguments[] = {
        {"vectors", &Call::vectors, kWritten, &Call::rows, &Call::columns, &Call::dtype},
        {"factors", &Call::matrix, kRead, &Call::rows, &Call::rows},
    };
    static constexpr const char* kDoc =
        R"(Multiply a few vectors by a lower triangular matrix in place.

    v_i <- sum_{j <= i} F_ij v_j)";
};

struct CrossEntropyHvp {
    using Call = SoftmaxProduct;
    static constexpr std::int64_t kMost = INT32_MAX;  // the largest grid of a GPU in x
    static constexpr Argument<Call> kArguments[] = {
        {"out", &Call::out, kWritten, &Call::rows, &Call::columns, &Call::dtype},
        {"logits", &Call::logits, kRead},
        {"scales", &Call::scales, kRead, &Call::rows},
        {"means", &Call::means, kWritten, &Call::rows},
        {"u", &Call::u, kOptional},
    };
    static constexpr const char* kDoc =
        R"(Multiply vectors by the Hessian of cross-entropy in its logits, row by row.

    m_i <- p_i . u_i,  out_i <- s_i (p_i u_i - m_i p_i),  p_i = softmax(z_i))";
};

// Every operation that is not an update, with its calls on the CPU and on a GPU. In these calls t
// holds the lists, s is the Call, and workspace(n) is memory for n doubles.
#define EIGENFILTER_OTHERS(OP)                                                                     \
    OP(norm, Norm, (t, s, threads),                                                                \
       (t, s.grad_scale, s.out, s.out_is_double, workspace(cuda::norm_workspace(t)), device,       \
        stream))                                                                                   \
    OP(flag_nonfinite, FlagNonfinite, (t, found_inf, threads), (t, found_inf, device, stream))     \
    OP(orthogonalize, Orthogonalize, (s, threads),                                                 \
       (s, workspace(cuda::orthogonalize_workspace(s.rows, s.columns, s.count)), device, stream))  \
    OP(row_dots, RowDots, (s, threads),                                                            \
       (s, workspace(cuda::sums_workspace(2 * s.rows, s.columns)), device, stream))                \
    OP(lanczos_step, LanczosRecurrence, (s, threads),                                              \
       (s, workspace(cuda::sums_workspace(2 * s.rows, s.columns)), device, stream))                \
    OP(gram, Gram, (s, threads),                                                                   \
       (s, s.matrix, workspace(cuda::sums_workspace(s.rows * s.rows, s.columns)), device, stream)) \
    OP(mix_rows, MixRows, (s, threads), (s, s.matrix, device, stream))                             \
    OP(cross_entropy_hvp, CrossEntropyHvp, (s, threads), (s, device, stream))

}  // namespace eigenfilter
