// Sums and maxima over the threads of a block.
#pragma once

#include <cuda_runtime.h>

namespace eigenfilter::cuda {

// Combines all threads' values in an order that is always the same; every thread gets the result.
// Each `Combine` has shared memory of its own: between two calls with the same one, all threads
// have to meet at a barrier.
template <int Threads, class Combine>
__device__ __forceinline__ double block_reduce(double value, const Combine& combine) {
    __shared__ double values[Threads];
    values[threadIdx.x] = value;
    __syncthreads();
#pragma unroll
    for (int width = Threads / 2; width > 0; width /= 2) {
        if (threadIdx.x < width)
            values[threadIdx.x] = combine(values[threadIdx.x], values[threadIdx.x + width]);
        __syncthreads();
    }
    return values[0];
}

template <int Threads>
__device__ __forceinline__ double block_sum(double value) {
    return block_reduce<Threads>(value, [](double a, double b) { return a + b; });
}

template <int Threads>
__device__ __forceinline__ double block_max(double value) {
    return block_reduce<Threads>(value, [](double a, double b) { return a > b ? a : b; });
}

}  // namespace eigenfilter::cuda
