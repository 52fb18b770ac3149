// float16 of CUDA C++, for a CPU.
#pragma once

#include <cuda_runtime.h>

using __half = _Float16;

inline __half __ushort_as_half(std::uint16_t bits) {
    __half value;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

// Every NaN becomes the same.
inline std::uint16_t __half_as_ushort(__half value) {
    std::uint16_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7fff) > 0x7c00 ? 0x7fff : bits;
}

inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
