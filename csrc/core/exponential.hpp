// The exponential of numbers that are not positive, stated once: the CPU's loops call it on SIMD
// vectors, the CUDA kernels on numbers, and both get the same bits. It errs by less than two units
// in the last place.
#pragma once

#include <cstdint>

#include "core/rounding.hpp"

namespace eigenfilter {

// T: float or double. Below `kLeast` the result, no normal number, is 0.
template <class T>
struct ExponentialOf;

template <>
struct ExponentialOf<float> {
    static constexpr float kLeast = -87;
    // 1.5 2^23: a sum with it has no fraction, and its last bits are those of an integer.
    static constexpr float kShift = 0x1.8p23f;
    static constexpr float kLog2E = 0x1.715476p0f;
    // log 2 in two parts; products of the first with an exponent are exact.
    static constexpr float kLog2 = 0x1.62e4p-1f, kLog2Rest = 0x1.7f7d1cp-20f;
    static constexpr std::uint32_t kOne = 0x3f800000;
    static constexpr int kMantissa = 23, kTerms = 7;
};

template <>
struct ExponentialOf<double> {
    static constexpr double kLeast = -708;
    static constexpr double kShift = 0x1.8p52;
    static constexpr double kLog2E = 0x1.71547652b82fep0;
    static constexpr double kLog2 = 0x1.62e42fefap-1, kLog2Rest = 0x1.cf79abc9e3b3ap-40;
    static constexpr std::uint64_t kOne = 0x3ff0000000000000;
    static constexpr int kMantissa = 52, kTerms = 13;
};

template <int K>
constexpr double kFactorial = K * kFactorial<K - 1>;
template <>
constexpr double kFactorial<0> = 1;

// Taylor's series from the term of r^K on, divided by r^K.
template <class T, int K, class V>
EIGENFILTER_RULE V series(V r) {
    constexpr T factor = static_cast<T>(1 / kFactorial<K>);
    if constexpr (K == ExponentialOf<T>::kTerms)
        return V{} + factor;
    else
        return series<T, K + 1>(r) * r + factor;
}

// e^x = 2^n e^r for the integer n nearest to x / log 2, so that |r| <= log(2) / 2. T is the type of
// the elements of V, U are unsigned integers of their size, as many as V has.
template <class T, class U, class V>
EIGENFILTER_RULE V exponential(V x) {
    using C = ExponentialOf<T>;
    const V shifted = x * C::kLog2E + C::kShift;
    const V n = shifted - C::kShift;
    const V r = (x - n * C::kLog2) - n * C::kLog2Rest;
    const U power = (same_bits<U>(shifted) << C::kMantissa) + C::kOne;
    return x < C::kLeast ? V{} : series<T, 0>(r) * same_bits<V>(power);
}

}  // namespace eigenfilter
