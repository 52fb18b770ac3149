// norm and the non-finite flag on the GPU.
#include <cfloat>
#include <cmath>

#include "block_sum.cuh"
#include "compressed.cuh"
#include "multi_tensor.cuh"
#include "scalars.cuh"

namespace eigenfilter::cuda {
namespace {

// Each x, or each x weighted: products of two floats are exact in double.
template <class Storage, class Weight, int Lists>
struct Values {
    template <class Group>
    struct Body {
        using Weights = typename Group::template Of<Weight>;
        Group group;
        Weights weights;

        template <class Pointers>
        __device__ __forceinline__ void read(const Pointers& p, int i) {
            group = Group::load(p[0] + i);
            if constexpr (Lists == 2) weights = load_other<Weights>(p[1], i);
        }
        template <class Pointers, class Take>
        __device__ __forceinline__ void write(const Pointers&, int, const Take& take) {
#pragma unroll
            for (int j = 0; j < Group::kSize; ++j) {
                double value = Storage::widen(group.v[j]);
                if constexpr (Lists == 2) value *= Weight::widen(weights.v[j]);
                take(value);
            }
        }
    };
};

// x - x is 0 for finite x, and NaN for all others.
template <class Storage>
struct Nonfinite {
    template <class Group>
    struct Body {
        Group group;

        template <class Pointers>
        __device__ __forceinline__ void read(const Pointers& p, int i) {
            group = Group::load(p[0] + i);
        }
        template <class Pointers>
        __device__ __forceinline__ void write(const Pointers&, int, bool* nonfinite) {
#pragma unroll
            for (int j = 0; j < Group::kSize; ++j) {
                const auto value = Storage::widen(group.v[j]);
                *nonfinite |= !(value - value == 0);
            }
        }
    };
};

// One sum of squares a chunk, sums[c] 4^exponents[c]. Exponents are there if a tensor is float64.
struct Sums {
    double* sums;
    double* exponents;
};

// The exponent of a scale and its negative are those of normal numbers.
constexpr int kMostExponent = 1022;

__device__ __forceinline__ double power_of_two(int exponent) {
    const std::int64_t bits = static_cast<std::int64_t>(exponent + 1023) << 52;
    double power;
    __builtin_memcpy(&power, &bits, sizeof power);
    return power;
}

// Of the greatest power of two that value > 0 reaches, as far as a scale may have it.
__device__ __forceinline__ int exponent_of(double value) {
    std::int64_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const int exponent = static_cast<int>(bits >> 52) - 1023;
    return max(-kMostExponent, min(exponent, kMostExponent));
}

// Far inside of the range of float64: no square that counts in a sum between them has vanished.
constexpr double kLeastSum = 0x1p-700, kGreatestSum = 0x1p700;

// Takes a block's sum of squares of doubles once more, scaled, if squares overflow or vanish;
// returns the exponent. All threads have the same sum, before and after. In few registers: it is
// rare.
template <template <class> class Body, class Storage, int Roles, class Weight, int Weights>
__device__ __forceinline__ int bring_into_range(const Chunk<Storage, Roles, Weight, Weights>& chunk,
                                                double* sum) {
    // Not to return here is right too: this is not needed for the result, but for speed. NaN stays.
    if (!(*sum < kLeastSum || *sum > kGreatestSum)) return 0;
    const auto each = [&](const auto& take) {
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x); i < chunk.count; i += kThreads) {
            Body<Element<Storage>> body;
            body.read(chunk.p, i);
            body.write(chunk.p, i, take);
        }
    };
    double largest = 0;
    each([&](double value) { largest = fmax(largest, fabs(value)); });
    largest = block_max<kThreads>(largest);
    // This is not needed for the result, which is 0 or infinite with any scale; it saves a pass.
    if (largest == 0 || largest > DBL_MAX) return 0;
    const int exponent = exponent_of(largest);
    const double scale = power_of_two(-exponent);
    double scaled = 0;
    each([&](double value) {
        value *= scale;
        scaled += value * value;
    });
    *sum = block_sum<kThreads>(scaled);
    return exponent;
}

template <class Storage, class Weight, class Pieces>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    squares_kernel(const __grid_constant__ Pieces batch, Sums out) {
    constexpr int kLists = Pieces::kRoles;
    const Chunk<Storage, kLists, Weight, kLists - 1> chunk(batch);
    double sum = 0;
    chunk.template each<Values<Storage, Weight, kLists>::template Body>(
        [&](double value) { sum += value * value; });
    sum = block_sum<kThreads>(sum);
    int exponent = 0;
    if constexpr (std::is_same_v<typename Storage::Bits, double>)
        exponent = bring_into_range<Values<Storage, Weight, kLists>::template Body>(chunk, &sum);
    if (threadIdx.x == 0) {
        out.sums[blockIdx.x] = sum;
        if (out.exponents != nullptr) out.exponents[blockIdx.x] = exponent;
    }
}

// The same of momenta that are codes: float32, whose squares double holds.
template <class Pieces>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    code_squares_kernel(const __grid_constant__ Pieces batch, double* sums) {
    const Cut cut(batch, kChunkBytes);
    auto* const codes = static_cast<char*>(batch.pointers[0][cut.piece]) + cut.first;
    auto* const scales = static_cast<float*>(batch.pointers[1][cut.piece]) + cut.first / kGroup;
    const State<0> state{{codes, 1}, scales, DType::i8};
    // A thread may move its elements by one access.
    const bool aligned = reinterpret_cast<std::uintptr_t>(codes) % kHeld == 0;
    double sum = 0;
    for (int start = 0; start < cut.count; start += kThreads * kHeld) {
        const Span span = span_of(start, cut.count, aligned);
        float values[kHeld];
        state.decode(state.elements.load(span), state.scale(span), values);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            const double value = j < span.count ? values[j] : 0;
            sum += value * value;
        }
    }
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

constexpr int kFinalThreads = 1024;

template <bool Scaled>
__global__ void __launch_bounds__(kFinalThreads)
    finish_norm_kernel(Sums of, std::int64_t count, Scalar grad_scale, void* out,
                       bool out_is_double) {
    double largest = -kMostExponent;
    if constexpr (Scaled) {
        for (std::int64_t i = threadIdx.x; i < count; i += kFinalThreads)
            if (of.sums[i] != 0) largest = fmax(largest, of.exponents[i]);
        largest = block_max<kFinalThreads>(largest);
    }
    double sum = 0;
    for (std::int64_t i = threadIdx.x; i < count; i += kFinalThreads) {
        if constexpr (Scaled) {
            const auto exponent = static_cast<int>(of.exponents[i] - largest);
            const double scale = power_of_two(max(exponent, -kMostExponent));
            sum += of.sums[i] * scale * scale;
        } else {
            sum += of.sums[i];
        }
    }
    sum = block_sum<kFinalThreads>(sum);
    if (threadIdx.x == 0) {
        double norm = sqrt(sum);
        if constexpr (Scaled) norm *= power_of_two(static_cast<int>(largest));
        norm *= 1 / ValueOf{}(grad_scale);
        if (out_is_double)
            *static_cast<double*>(out) = norm;
        else
            *static_cast<float*>(out) = static_cast<float>(norm);
    }
}

template <class Storage, class Pieces>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    nonfinite_kernel(const __grid_constant__ Pieces batch, float* found_inf) {
    const Chunk<Storage, 1> chunk(batch);
    bool nonfinite = false;
    chunk.template each<Nonfinite<Storage>::template Body>(&nonfinite);
    if (nonfinite) *found_inf = 1;  // every writer writes the same
}

template <int Lists>
void launch_squares(const Tensors& t, Sums sums, cudaStream_t stream) {
    const auto types_of = [&](std::size_t i) {
        return Types{t.gradient(i), Lists == 2 ? t.dtype : t.gradient(i)};
    };
    for_each_batch<Lists>(t, types_of, [&](const auto& batch, int blocks, Types types) {
        const auto run = [&](auto weight, auto storage) {
            by_count(batch, [&](const auto& pieces) {
                squares_kernel<decltype(storage), decltype(weight)>
                    <<<blocks, kThreads, 0, stream>>>(pieces, sums);
            });
            check(cudaGetLastError(), "launching norm");
        };
        if constexpr (Lists == 2) {
            if (types.other != types.storage) by_wide_gradient(types.other, run);
        }
        if (types.other == types.storage)
            by_dtype(types.storage, [&](auto storage) { run(storage, storage); });
        sums.sums += blocks;
        if (sums.exponents != nullptr) sums.exponents += blocks;
    });
}

void launch_code_squares(const Tensors& t, double* sums, cudaStream_t stream) {
    const Role roles[] = {{t.x, &Types::storage}, {t.g_scales, nullptr}};
    const auto types_of = [](std::size_t) { return Types{DType::i8, DType::i8}; };
    for_each_batch<2>(t, roles, types_of, [&](const auto& batch, int blocks, const Types&) {
        code_squares_kernel<<<blocks, kThreads, 0, stream>>>(batch, sums);
        check(cudaGetLastError(), "launching norm");
        sums += blocks;
    });
}

std::int64_t chunks_in(const Tensors& t) {
    std::int64_t chunks = 0;
    for (std::size_t i = 0; i < t.n; ++i) chunks += chunks_of(t.gradient(i), t.numel[i]);
    return chunks;
}

bool has_doubles(const Tensors& t) {
    for (std::size_t i = 0; i < t.n; ++i)
        // The test is not needed for the result: it saves half of the workspace.
        if (t.gradient(i) == DType::f64) return true;
    return false;
}

}  // namespace

std::int64_t norm_workspace(const Tensors& t) { return chunks_in(t) * (has_doubles(t) ? 2 : 1); }

void norm(const Tensors& t, const Scalar& grad_scale, void* out, bool out_is_double,
          double* workspace, int device, Stream stream) {
    const DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    const std::int64_t chunks = chunks_in(t);
    const bool scaled = has_doubles(t);
    const Sums sums{workspace, scaled ? workspace + chunks : nullptr};
    if (t.g_scales != nullptr)
        launch_code_squares(t, workspace, queue);
    else if (t.g != nullptr)
        launch_squares<2>(t, sums, queue);
    else
        launch_squares<1>(t, sums, queue);
    if (scaled)
        finish_norm_kernel<true>
            <<<1, kFinalThreads, 0, queue>>>(sums, chunks, grad_scale, out, out_is_double);
    else
        finish_norm_kernel<false>
            <<<1, kFinalThreads, 0, queue>>>(sums, chunks, grad_scale, out, out_is_double);
    check(cudaGetLastError(), "launching norm");
}

void flag_nonfinite(const Tensors& t, float* found_inf, int device, Stream stream) {
    const DeviceGuard guard(device);
    const auto types_of = [&](std::size_t i) { return Types{t.gradient(i), t.gradient(i)}; };
    for_each_batch<1>(t, types_of, [&](const auto& batch, int blocks, Types types) {
        by_dtype(types.storage, [&](auto storage) {
            by_count(batch, [&](const auto& pieces) {
                nonfinite_kernel<decltype(storage)>
                    <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(pieces, found_inf);
            });
            check(cudaGetLastError(), "launching flag_nonfinite");
        });
    });
}

}  // namespace eigenfilter::cuda
