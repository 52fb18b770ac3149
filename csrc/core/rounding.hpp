// How results of an update are rounded to the lists' dtype, stated once: the CPU loops call it on
// SIMD vectors, the CUDA kernels on floats. V is float or a vector of floats, U as many unsigned
// integers of 32 bits. Storage names the dtype that V is narrowed to afterwards, to nearest.
#pragma once

#include "core/rules.hpp"

namespace eigenfilter {

// What an update writes; each is rounded by random bits of its own.
enum class Output : std::uint32_t { x, m, v };

EIGENFILTER_RULE std::uint32_t truncate(float v) { return static_cast<std::uint32_t>(v); }
EIGENFILTER_RULE float real(std::uint32_t v) { return static_cast<float>(v); }

template <class To, class From>
EIGENFILTER_RULE To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

// The finaliser of MurmurHash3, a key added between its rounds.
template <class U>
EIGENFILTER_RULE U mix(U word, std::uint32_t key) {
    word = (word ^ word >> 16) * 0x85ebca6bu;
    word = ((word ^ word >> 13) + key) * 0xc2b2ae35u;
    return word ^ word >> 16;
}

// v as one of its two neighbors in a narrow dtype: the farther from zero with a probability of the
// distance from the nearer, in units of their spacing. To add random bits to those that are cut off
// is to carry with that probability. What the dtype holds stays; what is beyond its largest number
// is left to rounding to nearest, as are infinities and NaN.
template <DType Narrow, class V, class U>
EIGENFILTER_RULE V dither(V v, U random) {
    constexpr bool is_half = Narrow == DType::f16;
    constexpr std::uint32_t cut = is_half ? 0x1fff : 0xffff;
    constexpr std::uint32_t largest = is_half ? 0x477fe000 : 0x7f7f0000;
    const U bits = same_bits<U>(v), sign = bits & 0x80000000u, size = bits ^ sign;
    U rounded = (bits + (random & cut)) & ~cut;
    if constexpr (is_half) {
        // Below 2^-14 the spacing is 2^-24: 2^21 units of 2^-45, of which there are whole numbers.
        const auto is_small = size < 0x38800000u;
        const U units = truncate(same_bits<V>(is_small ? size : U{}) * 0x1p45f);
        const V small = real((units + (random & 0x1fffffu)) >> 21) * 0x1p-24f;
        rounded = is_small ? same_bits<U>(small) | sign : rounded;
    }
    return size < largest ? same_bits<V>(rounded) : v;
}

struct Nearest {
    template <class Storage, class V, class U>
    EIGENFILTER_RULE V round(V v, Output, U) const {
        return v;
    }
};

// Random bits come from the seed (a whole number from 0 to 2^24), the tensor's number in the lists,
// the output, and the element's number in memory: from nothing that depends on who computes it.
struct Stochastic {
    std::uint32_t key, first;

    EIGENFILTER_RULE Stochastic(std::uint32_t seed, const Place& place)
        : key(mix(seed, place.tensor)), first(place.first) {}

    // `index` counts elements from the place on.
    template <class Storage, class V, class U>
    EIGENFILTER_RULE V round(V v, Output output, U index) const {
        const std::uint32_t own = mix(key, static_cast<std::uint32_t>(output));
        return dither<Storage::kDType>(v, mix((index + first) ^ own, own));
    }
};

}  // namespace eigenfilter
