// Sums over the threads of a block.
#pragma once

#include <cuda_runtime.h>

namespace eigenfilter::cuda {

// Adds all threads' values in an order that is always the same; thread 0 has the sum.
template <int Threads>
__device__ __forceinline__ double block_sum(double value) {
    __shared__ double sums[Threads];
    sums[threadIdx.x] = value;
    __syncthreads();
#pragma unroll
    for (int width = Threads / 2; width > 0; width /= 2) {
        if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
        __syncthreads();
    }
    return sums[0];
}

}  // namespace eigenfilter::cuda
