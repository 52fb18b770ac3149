// What a kernel is called with, as numbers: no Python, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

// A function of the arithmetic, which the CPU's loops call on SIMD vectors and the CUDA kernels on
// numbers. It is inlined always: objects of different instruction sets must not share it.
#ifdef __CUDACC__
#define EIGENFILTER_RULE __host__ __device__ __forceinline__
#else
#define EIGENFILTER_RULE inline __attribute__((always_inline))
#endif

namespace eigenfilter {

// The whole numbers are those of compressed forms: see compression.hpp.
enum class DType : std::uint8_t { f32, f64, bf16, f16, i8, u8, i16 };

EIGENFILTER_RULE constexpr int size_of(DType t) {
    return t == DType::f64 ? 8 : t == DType::f32 ? 4 : t == DType::i8 || t == DType::u8 ? 1 : 2;
}

// A gradient is read in its own dtype: that of its parameter, or the next wider one. The arithmetic
// is that of the wider of the two, and only what is written is rounded to the parameter's dtype.
constexpr DType wider(DType t) { return size_of(t) == 2 ? DType::f32 : DType::f64; }

// So many elements of a state, in the order of memory, share the scale of their codes.
constexpr std::int64_t kGroup = 64;
constexpr std::int64_t groups_of(std::int64_t numel) { return (numel + kGroup - 1) / kGroup; }

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

// The lists of one call, n tensors each; the i-th tensors of all lists have numel[i] elements, laid
// out alike in memory. A list that is absent is nullptr.
struct Tensors {
    DType dtype;
    std::size_t n;
    const std::int64_t* numel;  // [n]
    const DType* wide;          // [n] dtypes of g and g0, of x in a reduction; nullptr: `dtype`
    DType state;                // of m and v, and of a g that is a momentum; i8: they are codes,
                                // those of v being u8
    DType correction;           // of c
    void* const* x = nullptr;   // [n] parameters, written; the tensors of a reduction
    void* const* g = nullptr;   // [n] gradients, read; the weights of a norm
    void* const* g0 = nullptr;  // [n] gradients at x, read
    void* const* m = nullptr;   // [n] momentum buffers or first moments, written
    void* const* v = nullptr;   // [n] second moments, written
    void* const* b = nullptr;   // [n] backups: written by perturb with save, else read
    void* const* c = nullptr;   // [n] corrections of parameters to their master weights, written
    void* const* m_scales = nullptr;  // [n] of the groups of codes, float32, written
    void* const* v_scales = nullptr;
    void* const* g_scales = nullptr;  // [n] of the codes of g, or of x in a reduction, read

    EIGENFILTER_RULE DType gradient(std::size_t i) const {
        return wide != nullptr ? wide[i] : dtype;
    }
    // Whether states have a dtype of their own, or parameters corrections.
    EIGENFILTER_RULE bool is_compressed() const { return c != nullptr || state != dtype; }
};

// w_v <- w_v - sum_i (q_i . w_v) q_i for the rows q_i of a basis, `passes` times over.
struct Orthogonalization {
    DType basis_dtype, vector_dtype;  // the vectors': f32 or f64
    std::int64_t rows, columns, count;
    void* basis;           // [rows, columns], read
    void* vectors;         // [count, columns], overwritten
    double* coefficients;  // [count, rows], written: the sums over the passes of q_i . w_v
    double* norms;         // [count], written: of what is left
    int passes;
};

// A step of as many three-term recurrences as there are rows; u and factors are not for row_dots.
struct Recurrence {
    DType dtype;  // f32 or f64
    std::int64_t rows, columns;
    void* u;          // [rows, columns] the vectors before q, overwritten
    void* q;          // [rows, columns] the present vectors, read
    void* w;          // [rows, columns] their products, read
    double* factors;  // [3, rows], of w, q and u, read
    double* sums;     // [2, rows], written
};

// A few vectors as the rows of one matrix, and one of doubles that belongs to them.
struct Rows {
    DType dtype;  // f32 or f64
    std::int64_t rows, columns;
    void* vectors;   // [rows, columns]
    double* matrix;  // [rows, rows]: their products, written, or factors, read
};
constexpr std::int64_t kMostRows = 32;

// The softmax of rows of logits, and what its derivative makes of rows of vectors.
struct SoftmaxProduct {
    DType dtype;  // f32 or f64
    std::int64_t rows, columns;
    void* out;       // [rows, columns], written
    void* logits;    // [rows, columns], read
    void* u;         // [rows, columns], read; nullptr: `out` holds it
    double* scales;  // [rows], read
    double* means;   // [rows], written
};

}  // namespace eigenfilter
