// Products with the Hessian of cross-entropy on the GPU: a block of threads has a row, and reads it
// twice. Of the columns of a thread, some are loaded before the first is needed.
#include <cfloat>
#include <cmath>

#include "block_sum.cuh"
#include "core/exponential.hpp"
#include "multi_tensor.cuh"

namespace eigenfilter::cuda {
namespace {

constexpr int kAhead = 4;

template <class T>
__device__ __forceinline__ T exponential_of(T x) {
    return exponential<T, std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>(x);
}

// Calls body(first, z, v) with kAhead columns of this thread, from `first` on and kThreads apart;
// of those beyond the end z is minus infinity, and v 0.
template <class T, class Body>
__device__ __forceinline__ void along(const T* logits, const T* u, std::int64_t columns,
                                      Body body) {
#pragma unroll 1
    // One turn more is not needed for the result: it would add zeros, and write nothing.
    for (std::int64_t first = threadIdx.x; first < columns; first += kAhead * kThreads) {
        T z[kAhead], v[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const std::int64_t j = first + a * kThreads;
            z[a] = j < columns ? logits[j] : static_cast<T>(-INFINITY);
            v[a] = j < columns ? u[j] : T{};
        }
        body(first, z, v);
    }
}

// m <- p . u, out <- s (p u - m p) for row blockIdx.x.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    cross_entropy_hvp_kernel(SoftmaxProduct p, T least) {
    const std::int64_t start = blockIdx.x * p.columns;
    const T* const logits = static_cast<const T*>(p.logits) + start;
    T* const out = static_cast<T*>(p.out) + start;
    const T* const u = p.u != nullptr ? static_cast<const T*>(p.u) + start : out;
    const double scale = p.scales[blockIdx.x];
    if (scale == 0) {
        for (std::int64_t j = threadIdx.x; j < p.columns; j += kThreads) out[j] = T{};
        if (threadIdx.x == 0) p.means[blockIdx.x] = 0;
        return;
    }
    T largest = least;
    double total = 0, products = 0;
    along(logits, u, p.columns, [&](std::int64_t, const T(&z)[kAhead], const T(&v)[kAhead]) {
        T greater = largest;
#pragma unroll
        for (int a = 0; a < kAhead; ++a) greater = z[a] > greater ? z[a] : greater;
        const double before = exponential_of(largest - greater);
        largest = greater;
        total *= before;
        products *= before;
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const double e = exponential_of(z[a] - largest);
            total += e;
            products += e * v[a];
        }
    });
    const T top = static_cast<T>(block_max<kThreads>(largest));
    const double later = exponential_of(largest - top);
    total = block_sum<kThreads>(total * later);
    __syncthreads();
    const double mean = block_sum<kThreads>(products * later) / total;
    const T factor = static_cast<T>(scale / total), center = static_cast<T>(mean);
    along(logits, u, p.columns, [&](std::int64_t first, const T(&z)[kAhead], const T(&v)[kAhead]) {
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const std::int64_t j = first + a * kThreads;
            if (j < p.columns) out[j] = factor * exponential_of(z[a] - top) * (v[a] - center);
        }
    });
    if (threadIdx.x == 0) p.means[blockIdx.x] = mean;
}

}  // namespace

void cross_entropy_hvp(const SoftmaxProduct& p, int device, Stream stream) {
    const DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto rows = static_cast<unsigned>(p.rows);
    if (p.dtype == DType::f32)
        cross_entropy_hvp_kernel<float><<<rows, kThreads, 0, queue>>>(p, -FLT_MAX);
    else
        cross_entropy_hvp_kernel<double><<<rows, kThreads, 0, queue>>>(p, -DBL_MAX);
    check(cudaGetLastError(), "launching cross_entropy_hvp");
}

}  // namespace eigenfilter::cuda
