// SIMD vectors of the instruction set this file is compiled for, and the storage types they widen
// from and narrow to. Everything has internal linkage: a symbol shared between objects of different
// instruction sets could bring AVX-512 code to a CPU without it.
//
// These are the compiler's own vectors, and not Google Highway's, for two reasons. The rules are
// stated once for numbers, on a GPU, and for vectors, with operators that both have, such as
// `beta * m` for a number beta, or a condition between vectors; Highway's vectors lack these, and a
// layer that adds them would be as long as this file. And no Python package brings Highway's
// headers to where a wheel is built.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/tensors.hpp"

namespace {

#define EIGENFILTER_INLINE inline __attribute__((always_inline))

// The bytes of a register, and an intrinsic of whole registers by its name.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#define EIGENFILTER_INTRINSIC(name) _mm512_##name
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#define EIGENFILTER_INTRINSIC(name) _mm256_##name
#else
constexpr int kRegisterBytes = 16;
#define EIGENFILTER_INTRINSIC(name) _mm_##name
#endif

constexpr int kDoubles = kRegisterBytes / static_cast<int>(sizeof(double));
template <class Storage>
constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(typename Storage::Arithmetic));

template <class T, int L>
struct VecOf {
    typedef T type __attribute__((vector_size(L * sizeof(T))));
};
template <class T, int L>
using Vec = typename VecOf<T, L>::type;

template <class V>
EIGENFILTER_INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
EIGENFILTER_INLINE void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

// A store past the caches where the vector is a full register or half; p is aligned to its size.
template <class V>
EIGENFILTER_INLINE void stream(void* p, V v) {
#if defined(__x86_64__)
    if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64)
        return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
    store(p, v);
}

EIGENFILTER_INLINE void end_of_streaming() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Half a register of floats, or a whole one of doubles, as doubles.
EIGENFILTER_INLINE Vec<double, kDoubles> to_doubles(Vec<double, kDoubles> v) { return v; }
EIGENFILTER_INLINE Vec<double, kDoubles> to_doubles(Vec<float, kDoubles> v) {
#if defined(__AVX2__)
    return EIGENFILTER_INTRINSIC(cvtps_pd)(v);
#else
    return __builtin_convertvector(v, Vec<double, kDoubles>);
#endif
}

// Doubles in the type of a vector's elements.
template <class T>
EIGENFILTER_INLINE Vec<T, kDoubles> from_doubles(Vec<double, kDoubles> v) {
    if constexpr (std::is_same_v<T, double>) {
        return v;
    } else {
#if defined(__AVX2__)
        return EIGENFILTER_INTRINSIC(cvtpd_ps)(v);
#else
        return __builtin_convertvector(v, Vec<T, kDoubles>);
#endif
    }
}

EIGENFILTER_INLINE float half_to_float(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
    const std::uint32_t magnitude = h & 0x7fffu;
    std::uint32_t bits;
    if (magnitude >= 0x7c00u) {  // inf, NaN
        bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    } else if (magnitude >= 0x400u) {  // normal: the exponent's bias goes from 15 to 127
        bits = sign | ((magnitude << 13) + (112u << 23));
    } else {  // subnormal: a multiple of 2^-24
        const float f = static_cast<float>(magnitude) * 0x1p-24f;
        std::memcpy(&bits, &f, sizeof bits);
        bits |= sign;
    }
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Rounds to nearest, ties to even.
EIGENFILTER_INLINE std::uint16_t float_to_half(float f) {
    std::uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    const std::uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    std::uint32_t half;
    if (bits > 0x7f800000u) {  // NaN
        half = 0x7e00u | (bits >> 13 & 0x3ffu);
    } else if (bits >= 0x477ff000u) {  // rounds past the largest half, 65504
        half = 0x7c00u;
    } else if (bits >= 0x38800000u) {  // normal
        half = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
    } else {  // subnormal: let the addition of 0.5 round at 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5f;
        std::memcpy(&half, &magnitude, sizeof half);
        half -= 0x3f000000u;
    }
    return static_cast<std::uint16_t>(sign | half);
}

// Storage types. Arithmetic is the type computed with; Bits holds the element in memory.
template <class T>
struct Native {
    using Arithmetic = T;
    using Bits = T;
    template <int L>
    static EIGENFILTER_INLINE Vec<T, L> widen(Vec<T, L> v) {
        return v;
    }
    template <int L>
    static EIGENFILTER_INLINE Vec<T, L> narrow(Vec<T, L> v) {
        return v;
    }
};

struct BFloat16 {
    static constexpr eigenfilter::DType kDType = eigenfilter::DType::bf16;
    using Arithmetic = float;
    using Bits = std::uint16_t;
    template <int L>
    static EIGENFILTER_INLINE Vec<float, L> widen(Vec<Bits, L> v) {
        return (Vec<float, L>)(__builtin_convertvector(v, Vec<std::uint32_t, L>) << 16);
    }
    template <int L>
    static EIGENFILTER_INLINE Vec<Bits, L> narrow(Vec<float, L> v) {
        const auto bits = (Vec<std::uint32_t, L>)v;
        const auto rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest even
        const auto quieted = bits >> 16 | 0x40u;                          // NaN stays NaN
        const auto is_nan = (Vec<std::uint32_t, L>)(v != v);
        return __builtin_convertvector((is_nan & quieted) | (~is_nan & rounded), Vec<Bits, L>);
    }
};

struct Float16 {
    static constexpr eigenfilter::DType kDType = eigenfilter::DType::f16;
    using Arithmetic = float;
    using Bits = std::uint16_t;
    template <int L>
    static EIGENFILTER_INLINE Vec<float, L> widen(Vec<Bits, L> v) {
#if defined(__AVX512F__)
        if constexpr (L == 16) return (Vec<float, L>)_mm512_cvtph_ps((__m256i)v);
#endif
#if defined(__F16C__)
        if constexpr (L == 8) return (Vec<float, L>)_mm256_cvtph_ps((__m128i)v);
#endif
        Vec<float, L> wide;
        for (int i = 0; i < L; ++i) wide[i] = half_to_float(v[i]);
        return wide;
    }
    template <int L>
    static EIGENFILTER_INLINE Vec<Bits, L> narrow(Vec<float, L> v) {
#if defined(__AVX512F__)
        if constexpr (L == 16)
            return (Vec<Bits, L>)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#endif
#if defined(__F16C__)
        if constexpr (L == 8)
            return (Vec<Bits, L>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#endif
        Vec<Bits, L> narrow;
        for (int i = 0; i < L; ++i) narrow[i] = float_to_half(v[i]);
        return narrow;
    }
};

// Floats that are computed with in double, because their gradients are doubles.
struct FloatInDouble {
    using Arithmetic = double;
    using Bits = float;
    template <int L>
    static EIGENFILTER_INLINE Vec<double, L> widen(Vec<float, L> v) {
        return to_doubles(v);
    }
    template <int L>
    static EIGENFILTER_INLINE Vec<float, L> narrow(Vec<double, L> v) {
        return from_doubles<float>(v);
    }
};

// Whole numbers of 8 and 16 bits as those of 32, and back, where they must fit. GCC 12 converts
// vectors of bytes one by one.
template <class Bits, int L>
EIGENFILTER_INLINE Vec<std::int32_t, L> widen_whole(Vec<Bits, L> v) {
#if defined(__AVX2__)
    if constexpr (sizeof(Bits) == 1) {
        __m128i bytes{};
        std::memcpy(&bytes, &v, sizeof v);
        constexpr bool is_signed = std::is_signed_v<Bits>;
        return (Vec<std::int32_t, L>)(is_signed ? EIGENFILTER_INTRINSIC(cvtepi8_epi32)(bytes)
                                                : EIGENFILTER_INTRINSIC(cvtepu8_epi32)(bytes));
    }
#endif
    return __builtin_convertvector(v, Vec<std::int32_t, L>);
}

template <class Bits, int L>
EIGENFILTER_INLINE Vec<Bits, L> narrow_whole(Vec<std::int32_t, L> v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Bits) == 1) return (Vec<Bits, L>)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
    if constexpr (sizeof(Bits) == 1) {
        const auto wide = (__m256i)v;
        const __m128i words =
            _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        const __m128i bytes =
            std::is_signed_v<Bits> ? _mm_packs_epi16(words, words) : _mm_packus_epi16(words, words);
        return load<Vec<Bits, L>>(&bytes);
    }
#endif
    return __builtin_convertvector(v, Vec<Bits, L>);
}

// How a block of L elements is read and written: whole, whole and past the caches, or its first
// few. What is read of the others is zero, as is what `inside` leaves of them. What is only read
// may be of another type.
template <class Storage, int L>
struct Whole {
    using V = Vec<typename Storage::Bits, L>;
    template <class Bits>
    EIGENFILTER_INLINE Vec<Bits, L> read(const Bits* p) const {
        return load<Vec<Bits, L>>(p);
    }
    EIGENFILTER_INLINE void write(typename Storage::Bits* p, V v) const { store(p, v); }
    EIGENFILTER_INLINE void write_only(typename Storage::Bits* p, V v) const { store(p, v); }
    EIGENFILTER_INLINE V inside(V v) const { return v; }
};

template <class Storage, int L>
struct Streamed : Whole<Storage, L> {
    using V = typename Whole<Storage, L>::V;
    EIGENFILTER_INLINE void write_only(typename Storage::Bits* p, V v) const { stream(p, v); }
};

template <class Storage, int L>
struct Partial {
    using V = Vec<typename Storage::Bits, L>;
    std::int64_t count;
    template <class Bits>
    EIGENFILTER_INLINE Vec<Bits, L> read(const Bits* p) const {
        Vec<Bits, L> v{};
        std::memcpy(&v, p, count * sizeof(*p));
        return v;
    }
    EIGENFILTER_INLINE void write(typename Storage::Bits* p, V v) const {
        std::memcpy(p, &v, count * sizeof(*p));
    }
    EIGENFILTER_INLINE void write_only(typename Storage::Bits* p, V v) const { write(p, v); }
    EIGENFILTER_INLINE V inside(V v) const {
        V first{};
        std::memcpy(&first, &v, count * sizeof(typename Storage::Bits));
        return first;
    }
};

}  // namespace

namespace eigenfilter {

using Floats = Vec<float, kRegisterBytes / 4>;
using Doubles = Vec<double, kDoubles>;
using Words = Vec<std::uint32_t, kRegisterBytes / 4>;

// Found by the update rules, beside their own for numbers: IEEE square roots of each lane.
#if defined(__x86_64__)
EIGENFILTER_INLINE Floats square_root(Floats v) { return EIGENFILTER_INTRINSIC(sqrt_ps)(v); }
EIGENFILTER_INLINE Doubles square_root(Doubles v) { return EIGENFILTER_INTRINSIC(sqrt_pd)(v); }
#else
template <class V>
EIGENFILTER_INLINE V square_root(V v) {
    for (int i = 0; i < static_cast<int>(sizeof v / sizeof v[0]); ++i) v[i] = std::sqrt(v[i]);
    return v;
}
#endif

EIGENFILTER_INLINE Floats absolute(Floats v) { return (Floats)((Words)v & 0x7fffffffu); }

// Of numbers below 2^31: conversions of signed integers are one instruction everywhere.
using Integers = Vec<std::int32_t, kRegisterBytes / 4>;
EIGENFILTER_INLINE Words truncate(Floats v) { return (Words) __builtin_convertvector(v, Integers); }
EIGENFILTER_INLINE Floats real(Words v) { return __builtin_convertvector((Integers)v, Floats); }

}  // namespace eigenfilter
