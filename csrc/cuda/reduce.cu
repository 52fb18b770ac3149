// norm and the non-finite flag on the GPU.
#include "block_sum.cuh"
#include "multi_tensor.cuh"
#include "scalars.cuh"

namespace eigenfilter::cuda {
namespace {

// Of x, or of x weighted: products of two floats are exact in double.
template <class Storage, class Weight, int Lists>
struct Squares {
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
        template <class Pointers>
        __device__ __forceinline__ void write(const Pointers&, int, double* sum) {
#pragma unroll
            for (int j = 0; j < Group::kSize; ++j) {
                double value = Storage::widen(group.v[j]);
                if constexpr (Lists == 2) value *= Weight::widen(weights.v[j]);
                *sum += value * value;
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
        __device__ __forceinline__ void write(const Pointers&, int, bool* found) {
#pragma unroll
            for (int j = 0; j < Group::kSize; ++j) {
                const auto value = Storage::widen(group.v[j]);
                *found |= !(value - value == 0);
            }
        }
    };
};

template <class Storage, class Weight, class Pieces>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    squares_kernel(const __grid_constant__ Pieces batch, double* sums) {
    constexpr int kLists = Pieces::kRoles;
    const Chunk<Storage, kLists, Weight, kLists - 1> chunk(batch);
    double sum = 0;
    chunk.template each<Squares<Storage, Weight, kLists>::template Body>(&sum);
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

constexpr int kFinalThreads = 1024;

__global__ void __launch_bounds__(kFinalThreads)
    finish_norm_kernel(const double* sums, std::int64_t count, Scalar grad_scale, void* out,
                       bool out_is_double) {
    double sum = 0;
    for (std::int64_t i = threadIdx.x; i < count; i += kFinalThreads) sum += sums[i];
    sum = block_sum<kFinalThreads>(sum);
    if (threadIdx.x == 0) {
        const double norm = sqrt(sum) * (1 / value(grad_scale));
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
    bool found = false;
    chunk.template each<Nonfinite<Storage>::template Body>(&found);
    if (found) *found_inf = 1;  // every writer writes the same
}

// Puts down one sum a block; returns where the next would go.
template <int Lists>
double* launch_squares(const Tensors& t, double* sums, cudaStream_t stream) {
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
        sums += blocks;
    });
    return sums;
}

}  // namespace

std::int64_t norm_workspace(const Tensors& t) {
    std::int64_t chunks = 0;
    for (std::size_t i = 0; i < t.n; ++i) chunks += chunks_of(t.gradient(i), t.numel[i]);
    return chunks;
}

void norm(const Tensors& t, const Scalar& grad_scale, void* out, bool out_is_double,
          double* workspace, int device, Stream stream) {
    const DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    const double* end = t.g != nullptr ? launch_squares<2>(t, workspace, queue)
                                       : launch_squares<1>(t, workspace, queue);
    finish_norm_kernel<<<1, kFinalThreads, 0, queue>>>(workspace, end - workspace, grad_scale, out,
                                                       out_is_double);
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
