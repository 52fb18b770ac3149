// Kernels with a fault each, and one without: faulty NAME. See test_emulator.py.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

constexpr int kThreads = 64, kBlocks = 3;

__global__ void sound(float* all) {
    __shared__ float shared[kThreads];
    float* const x = all + blockIdx.x * kThreads;
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    float sum = shared[kThreads - 1 - threadIdx.x];
    sum += __shfl_down_sync(0xffffffffu, sum, 16);
    x[threadIdx.x] = sum;
}

__global__ void missing_barrier(float* x) {
    __shared__ float shared[kThreads];
    shared[threadIdx.x] = x[threadIdx.x];
    x[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];  // unordered
}

__global__ void left_barrier(float* x) {
    if (threadIdx.x == 3) return;
    __syncthreads();  // left
    x[threadIdx.x] = 1;
}

__global__ void other_barrier(float* x) {
    if (threadIdx.x < 32)
        __syncthreads();  // one
    else
        __syncthreads();  // other
    x[threadIdx.x] = 1;
}

__global__ void left_shuffle(float* x) {
    if (threadIdx.x % 32 == 5) return;
    x[threadIdx.x] = __shfl_down_sync(0xffffffffu, x[threadIdx.x], 1);  // gone
}

__global__ void beyond_shared(float* x) {
    __shared__ float shared[kThreads];
    shared[threadIdx.x + x[0] > 0] = 1;
    x[threadIdx.x] = shared[threadIdx.x + 1];  // beyond shared
}

__global__ void beyond_device(float* x) { x[threadIdx.x + 4096] = 1; }

__global__ void beside(float* x) { x[threadIdx.x + (kBlocks - 1) * kThreads + 1] = 1; }

__global__ void misaligned(float* x) {
    *reinterpret_cast<uint4*>(x + 1) = uint4{};  // misaligned
}

__global__ void blocks_race(float* x) {
    x[threadIdx.x] += 1;  // by every block
}

}  // namespace

int main(int, char** arguments) {
    const std::string name = arguments[1];
    const std::size_t bytes = kBlocks * kThreads * sizeof(float);
    auto* const host = static_cast<float*>(std::aligned_alloc(4096, 4096));
    for (int i = 0; i < 1024; ++i) host[i] = 0;
    cudaSetDevice(0);
    emulator::enter();
    auto* const x = static_cast<float*>(emulator::put_on_device(host, bytes));
    if (name == "sound") sound<<<kBlocks, kThreads, 0, nullptr>>>(x);
    if (name == "missing_barrier") missing_barrier<<<1, kThreads, 0, nullptr>>>(x);
    if (name == "left_barrier") left_barrier<<<1, kThreads, 0, nullptr>>>(x);
    if (name == "other_barrier") other_barrier<<<1, kThreads, 0, nullptr>>>(x);
    if (name == "left_shuffle") left_shuffle<<<1, kThreads, 0, nullptr>>>(x);
    if (name == "beyond_shared") beyond_shared<<<1, kThreads, 0, nullptr>>>(x);
    if (name == "beyond_device") beyond_device<<<1, kThreads, 0, nullptr>>>(x);
    if (name == "beside") beside<<<1, kThreads, 0, nullptr>>>(x);
    if (name == "misaligned") misaligned<<<1, kThreads, 0, nullptr>>>(x);
    if (name == "blocks_race") blocks_race<<<2, kThreads, 0, nullptr>>>(x);
    if (name == "host_reads") {
        sound<<<1, kThreads, 0, nullptr>>>(x);
        std::printf("%f\n", static_cast<double>(*x));
    }
    if (name == "wrong_device") {
        cudaSetDevice(1);
        sound<<<1, kThreads, 0, nullptr>>>(x);
    }
    if (name == "too_many_threads") sound<<<1, 2048, 0, nullptr>>>(x);
    const cudaError_t error = cudaGetLastError();
    emulator::leave();
    std::printf("%s\n", cudaGetErrorString(error));
    return 0;
}
