// bfloat16 of CUDA C++, for a CPU.
#pragma once

#include <cuda_runtime.h>

struct __nv_bfloat16 {
    std::uint16_t bits;
};

inline std::uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

// To nearest, ties to even; every NaN becomes the same.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    if (value != value) return {0x7fff};
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
