// What the kernels agree on: element types, lists of tensors, hyperparameters, entry points.
// Numbers only: no Python, no torch. Shapes: n tensors a list; the i-th tensors of all lists of a
// call have numel[i] elements, laid out alike in memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace eigenfilter {

enum class DType : std::uint8_t { f32, f64, bf16, f16 };

constexpr int size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// A gradient is read in its own dtype: that of its parameter, or the next wider one. The arithmetic
// is that of the wider of the two, and only what is written is rounded to the parameter's dtype.
constexpr DType wider(DType t) { return size_of(t) == 2 ? DType::f32 : DType::f64; }

// A hyperparameter: a host value, or the address of a float or double that the device reads.
struct Scalar {
    double value = 0;
    const void* device = nullptr;
    bool device_is_double = false;
};

// Where elements lie: in which tensor of a call's lists, and from which of its elements on, in the
// order of memory; a number of an element is kept modulo 2^32.
struct Place {
    std::uint32_t tensor, first;
};

// The lists of one call. A role that is absent is nullptr.
struct Tensors {
    DType dtype;
    std::size_t n;
    const std::int64_t* numel;  // [n]
    void* const* x;             // [n] parameters, written; the tensors of a reduction
    void* const* g;             // [n] gradients, read; the weights of a norm
    const DType* wide;          // [n] dtypes of g and g0, of x in a reduction; nullptr: `dtype`
    void* const* b;             // [n] backups: written by perturb with save, else read
    void* const* m = nullptr;   // [n] momentum buffers or first moments, written
    void* const* v = nullptr;   // [n] second moments, written
    void* const* g0 = nullptr;  // [n] gradients at x, read

    DType gradient(std::size_t i) const { return wide != nullptr ? wide[i] : dtype; }
};

// Hyperparameters as numbers, and (one template over both) as what a call is given.
template <class Real>
struct PerturbScalars {
    Real alpha, grad_scale;
    bool adaptive;
    bool save;  // b <- x first
};

template <class Real>
struct HvpScalars {
    Real alpha, eps, grad_scale;
};

template <class Real>
struct SgdScalars {
    Real lr, momentum, dampening, weight_decay, grad_scale, rounding_seed;
    bool nesterov, maximize;
    bool stochastic;  // for bf16 and f16: results are rounded by random bits of the seed
};

template <class Real>
struct AdamWScalars {
    Real lr, beta1, beta2, eps, weight_decay, step, grad_scale, rounding_seed;
    bool maximize;
    bool stochastic;  // as in sgd_step
};

// w <- w - sum_i (q_i . w) q_i for the rows q_i of a basis, `passes` times over, for each of some
// vectors w, all in memory one after the other.
struct Projection {
    DType basis_dtype, vector_dtype;  // the vectors': f32 or f64
    std::int64_t rows, columns, count;
    const void* basis;     // [rows, columns]
    void* vectors;         // [count, columns]
    double* coefficients;  // [count, rows], written: the sums over the passes of q_i . w
    double* norms;         // [count], written: of what is left
    int passes;
};

// Vectors as rows of matrices [rows, columns]: a step of as many three-term recurrences.
struct Recurrence {
    DType dtype;  // f32 or f64
    std::int64_t rows, columns;
    void* u;                // the vectors before q, overwritten by those after; not for row_dots
    const void* q;          // the present vectors
    const void* w;          // their products
    const double* factors;  // [3, rows], of w, q and u; not for row_dots
    double* sums;           // [2, rows], written
};

// A few vectors as the rows of one matrix [rows, columns].
struct Rows {
    DType dtype;  // f32 or f64
    std::int64_t rows, columns;
    void* vectors;
};
constexpr std::int64_t kMostRows = 32;

// found_inf: address of one float, or nullptr; where it is not zero, ascents leave x where it is
// and descents put it back to b; m and v keep their values.
namespace cpu {
void perturb(const Tensors&, const PerturbScalars<double>&, const float* found_inf, int threads);
void perturb_hvp(const Tensors&, const HvpScalars<double>&, const float* found_inf, int threads);
void sgd_step(const Tensors&, const SgdScalars<double>&, const float* found_inf, int threads);
void adamw_step(const Tensors&, const AdamWScalars<double>&, const float* found_inf, int threads);
// Euclidean norm of x, or of g x where g is given, summed in double in an order fixed by the sizes.
double norm(const Tensors&, int threads);
bool has_nonfinite(const Tensors&, int threads);
void orthogonalize(const Projection&, int threads);
// sums <- (q_i . w_i, w_i . w_i)
void row_dots(const Recurrence&, int threads);
// u_i <- f_0i w_i + f_1i q_i + f_2i u_i,  sums <- (u_i . u_i, u_i . q_i)
void lanczos_step(const Recurrence&, int threads);
// out [rows, rows] <- the vectors' inner products.
void gram(const Rows&, double* out, int threads);
// v_i <- sum_{j <= i} factors_ij v_j for factors [rows, rows], all at once.
void mix_rows(const Rows&, const double* factors, int threads);
}  // namespace cpu

// Everything runs on `stream` of the device, asynchronously; found_inf, out and the workspace are
// device addresses. Without CUDA in the build these throw std::runtime_error.
namespace cuda {
bool compiled();
void require();
using Stream = void*;
void perturb(const Tensors&, const PerturbScalars<Scalar>&, const float* found_inf, int device,
             Stream stream);
void perturb_hvp(const Tensors&, const HvpScalars<Scalar>&, const float* found_inf, int device,
                 Stream stream);
void sgd_step(const Tensors&, const SgdScalars<Scalar>&, const float* found_inf, int device,
              Stream stream);
void adamw_step(const Tensors&, const AdamWScalars<Scalar>&, const float* found_inf, int device,
                Stream stream);
// Doubles that `norm` needs as workspace.
std::int64_t norm_workspace(const Tensors&);
// out <- norm / grad_scale, a float or a double.
void norm(const Tensors&, const Scalar& grad_scale, void* out, bool out_is_double,
          double* workspace, int device, Stream stream);
void flag_nonfinite(const Tensors&, float* found_inf, int device, Stream stream);
// Doubles that `orthogonalize` needs as workspace.
std::int64_t orthogonalize_workspace(std::int64_t rows, std::int64_t columns, std::int64_t count);
void orthogonalize(const Projection&, double* workspace, int device, Stream stream);
// Doubles that the following need as workspace for so many sums over all columns.
std::int64_t sums_workspace(std::int64_t sums, std::int64_t columns);
void row_dots(const Recurrence&, double* workspace, int device, Stream stream);
void lanczos_step(const Recurrence&, double* workspace, int device, Stream stream);
void gram(const Rows&, double* out, double* workspace, int device, Stream stream);
void mix_rows(const Rows&, const double* factors, int device, Stream stream);
}  // namespace cuda

}  // namespace eigenfilter
