// Compressed forms of a step's tensors, stated once for SIMD vectors and for floats on a GPU:
// master weights as 16-bit parameters with corrections, and states of 8 bits with a scale a group.
// V is float or a vector of floats, U as many unsigned integers of 32 bits.
#pragma once

#include "core/rounding.hpp"

namespace eigenfilter {

// A number from 0 to 2^23 to nearest, ties to even: floats from 2^23 on are whole numbers.
template <class V>
EIGENFILTER_RULE V round_to_whole(V v) {
    return (v + 0x1p23f) - 0x1p23f;
}

// A master weight is a number of a dtype like the parameters', with Bits more in its mantissa. Its
// magnitude, as an integer in the order of the numbers, is `code` 2^Bits + correction, where `code`
// is the parameter's: the nearest of its dtype, ties away from zero. With bfloat16 and 16 bits it
// is any float32.
template <DType Narrow, int Bits>
struct Master {
    static constexpr bool kIsHalf = Narrow == DType::f16;
    static constexpr std::uint32_t kInfinity = kIsHalf ? 0x7c00 : 0x7f80;
    static constexpr std::uint32_t kNaN = kIsHalf ? 0x7e00 : 0x7fc0;
    // Bits of a float beyond those of a master weight; what float16's exponents lack, and the first
    // magnitude with a leading bit. Below that, there are 2^-kUnits in a unit.
    static constexpr int kCut = (kIsHalf ? 13 : 16) - Bits;
    static constexpr std::uint32_t kBias = kIsHalf ? 112u << 23 : 0;
    static constexpr std::uint32_t kNormal = 1u << (10 + Bits);
    static constexpr int kUnits = 24 + Bits;

    // `param` holds the 16 bits of a parameter, `correction` a number in two's complement. A
    // parameter that is not finite, and one that others have written, have what is left of it.
    template <class V, class U>
    static EIGENFILTER_RULE V join(U param, U correction) {
        const U code = param & 0x7fffu, sign = (param & 0x8000u) << 16;
        U magnitude = (code << Bits) + correction;
        magnitude = magnitude < 0x80000000u ? magnitude : U{};
        U bits = kCut >= 0 ? (magnitude << (kCut >= 0 ? kCut : 0)) + kBias
                           : (magnitude >> (kCut < 0 ? -kCut : 0)) + kBias;
        U infinite = (code << 13) + (0x7f800000u - (kInfinity << 13));
        if constexpr (kIsHalf) {
            const V small = real(magnitude) * (1.0f / static_cast<float>(1ull << kUnits));
            bits = magnitude < kNormal ? same_bits<U>(small) : bits;
        } else {
            infinite = code << 16;
        }
        return same_bits<V>((code < kInfinity ? bits : infinite) | sign);
    }

    // The parameter and the correction of a float32, rounded to nearest; a number that the
    // parameters' dtype does not reach is infinite.
    template <class V, class U>
    static EIGENFILTER_RULE void split(V value, U& param, U& correction) {
        const U bits = same_bits<U>(value), size = bits & 0x7fffffffu;
        const U most = (kInfinity << Bits) + U{};
        U magnitude = size - kBias;
        if constexpr (kCut > 0)
            magnitude = (magnitude + ((1u << (kCut - 1)) - 1) + (magnitude >> kCut & 1u)) >> kCut;
        if constexpr (kCut < 0) magnitude = magnitude << -kCut;
        if constexpr (kIsHalf) {
            // float16 ends below 2^16, whose magnitudes would not fit 32 bits
            const V small = same_bits<V>(size < 0x38800000u ? size : U{});
            const V exact = small * static_cast<float>(1ull << kUnits);
            const V units = exact < 0x1p23f ? round_to_whole(exact) : exact;
            magnitude = size < 0x38800000u   ? truncate(units)
                        : size < 0x47800000u ? magnitude
                                             : most;
        }
        U code = (magnitude + (1u << (Bits - 1))) >> Bits;
        code = code < kInfinity ? code : kInfinity + U{};
        correction = code < kInfinity ? magnitude - (code << Bits) : U{};
        code = size > 0x7f800000u ? kNaN + U{} : code;
        param = code | (bits >> 16 & 0x8000u);
    }
};

// A group of values has a scale s, the largest magnitude; a value is s q |q| / Most^2 with a whole
// number q up to Most. What is read and quantized again stays. A group with values that are not
// finite has NaN as its scale; one whose values are all below 2^-100 is 0.
template <int Most>
struct Quantizer {
    float scale = 0, factor = 0;  // of magnitudes, under the root

    // `largest` holds the bits of the largest magnitude, as a float's.
    EIGENFILTER_RULE explicit Quantizer(std::uint32_t largest)
        : scale(same_bits<float>(largest > 0x7f7fffffu ? 0x7fc00000u : largest)) {
        if (scale < 0x1p-100f) scale = 0;
        if (scale > 0) factor = static_cast<float>(Most * Most) / scale;
    }

    // The root of the magnitude in units of q, at most Most.
    template <class V>
    EIGENFILTER_RULE V root(V magnitude) const {
        const V root = square_root(magnitude * factor);
        const V most = static_cast<float>(Most) + V{};
        return root < most ? root : most;
    }

    // The root as one of the two whole numbers beside it, as a sequence over the steps says, `word`
    // 2^-32, that takes each fraction as often as the others. A moment changes by less than a step
    // of q in many steps of an optimizer: to nearest it would stay for ever.
    template <class V, class U>
    EIGENFILTER_RULE V whole_root(V magnitude, U word) const {
        return real(truncate(root(magnitude) + real(word >> 16) * 0x1p-16f));
    }

    template <class V>
    static EIGENFILTER_RULE V value(V signed_square, float scale) {
        return signed_square * (1.0f / static_cast<float>(Most * Most)) * scale;
    }
};

// First moments: q from -127 to 127.
struct FirstMoment : Quantizer<127> {
    using Quantizer::Quantizer;

    template <class V>
    static EIGENFILTER_RULE V magnitude(V m) {
        return absolute(m);
    }
    template <class V>
    static EIGENFILTER_RULE V decode(V q, float scale) {
        return value(q * absolute(q), scale);
    }
    template <class V, class U>
    EIGENFILTER_RULE V encode(V m, V magnitude, U word) const {
        const V q = whole_root(magnitude, word);
        return (m < 0.0f ? -q : q) + 0.0f;  // codes have no -0
    }
};

// Second moments: q from 0 to 255 is that of the root of v, so that the quotient m / sqrt(v) has
// equal errors of both; from 1 if v is not 0.
struct SecondMoment : Quantizer<255> {
    using Quantizer::Quantizer;

    template <class V>
    static EIGENFILTER_RULE V magnitude(V v) {
        return absolute(square_root(v));
    }
    template <class V>
    static EIGENFILTER_RULE V decode(V q, float scale) {
        const V size = value(q * q, scale);
        return size * size;
    }
    template <class V, class U>
    EIGENFILTER_RULE V encode(V v, V magnitude, U word) const {
        const V q = whole_root(magnitude, word);
        return v > 0.0f ? (q < 1.0f ? 1.0f + V{} : q) : q;
    }
};

// The words of a sequence of steps, for the element at an index: multiples of the golden ratio.
template <class U>
EIGENFILTER_RULE U word_of(std::uint32_t step, U index) {
    return (index + step) * 0x9e3779b9u;
}

// A state of bfloat16 as one of its two neighbors, as the sequence says: for the same reason.
template <class V, class U>
EIGENFILTER_RULE V round_by_steps(V v, U word) {
    return dither<DType::bf16>(v, word >> 16);
}

template <class Scalars>
EIGENFILTER_RULE std::uint32_t number_of_step(const Scalars& s) {
    return static_cast<std::uint32_t>(static_cast<std::int64_t>(s.step));
}

}  // namespace eigenfilter
