// The part of CUDA C++ that csrc/cuda uses, for a CPU. What a kernel does beyond plain C++ goes to
// the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.hpp"

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

using std::max;
using std::min;

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __double2float_rn(double value) { return static_cast<float>(value); }

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define gridDim emulator::grid_size
#define __syncthreads() emulator::synchronize({__FILE__, __LINE__})
#define __shfl_down_sync(mask, value, distance) \
    emulator::shuffle(mask, value, emulator::lane() + (distance), {__FILE__, __LINE__})
#define __shfl_xor_sync(mask, value, bits) \
    emulator::shuffle(mask, value, emulator::lane() ^ (bits), {__FILE__, __LINE__})
// `from` counts within a part of the warp, of `width` lanes.
#define __shfl_sync(mask, value, from, width)                                               \
    emulator::shuffle(mask, value, emulator::lane() / (width) * (width) + (from) % (width), \
                      {__FILE__, __LINE__})

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

inline cudaError_t cudaGetLastError() { return emulator::take_error(); }
inline const char* cudaGetErrorString(cudaError_t error) { return emulator::text_of(error); }
inline cudaError_t cudaGetDevice(int* device) {
    *device = emulator::device();
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    emulator::set_device(device);
    return cudaSuccess;
}
