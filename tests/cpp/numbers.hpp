// Numbers for the tests: bits of floats, 16-bit formats in exact arithmetic, random values.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "core.hpp"

namespace {

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float float_of(std::uint32_t bits) { return bits_as<float>(bits); }
inline std::uint32_t bits_of(float value) { return bits_as<std::uint32_t>(value); }

// A 16-bit format, by the definition of IEEE 754.
struct Format {
    int exponent_bits, mantissa_bits;

    int bias() const { return (1 << (exponent_bits - 1)) - 1; }
    std::uint32_t infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }
    bool is_nan(std::uint32_t bits) const { return (bits & 0x7fffu) > infinity(); }

    double value(std::uint32_t bits) const {
        const double size = value_below_infinity(bits);
        return (bits & 0x7fffu) == infinity() ? std::copysign(INFINITY, size) : size;
    }

    // The value of a number; of infinity, the power of 2 that follows the largest number.
    double value_below_infinity(std::uint32_t bits) const {
        const int exponent = static_cast<int>((bits & 0x7fffu) >> mantissa_bits);
        const int mantissa = static_cast<int>(bits & ((1u << mantissa_bits) - 1));
        const int implicit = exponent > 0 ? 1 << mantissa_bits : 0;
        const int scale = (exponent > 0 ? exponent : 1) - bias() - mantissa_bits;
        const double size = std::ldexp(mantissa + implicit, scale);
        return (bits & 0x8000u) != 0 ? -size : size;
    }
};

template <class Storage>
constexpr Format kFormat = std::is_same_v<Storage, BFloat16> ? Format{8, 7} : Format{5, 10};

// A value that the compiler does not know, as in the kernels.
template <class T>
T opaque(T value) {
    asm volatile("" : "+r"(value));
    return value;
}

// The numbers from `first` up to `end`, which is not one of them.
template <class T>
std::vector<T> range(std::uint32_t first, std::uint32_t end) {
    std::vector<T> numbers;
    for (std::uint32_t n = first; n < end; ++n) numbers.push_back(static_cast<T>(n));
    return numbers;
}

// The results of a function of vectors for every number, L of them at a time.
template <class To, int L, class From, class Function>
std::vector<To> in_vectors(const std::vector<From>& numbers, Function function) {
    std::vector<To> results(numbers.size());
    for (std::size_t i = 0; i < numbers.size(); i += L) {
        const std::size_t count = std::min<std::size_t>(L, numbers.size() - i);
        Vec<From, L> v{};
        std::memcpy(&v, &numbers[i], count * sizeof(From));
        const Vec<To, L> result = function(v);
        std::memcpy(&results[i], &result, count * sizeof(To));
    }
    return results;
}

// Counts failures over many numbers, and keeps the first one for the message.
struct Failures {
    int count = 0;
    std::uint32_t first = 0;

    void add_unless(bool is_right, std::uint32_t number) {
        if (!is_right && count++ == 0) first = number;
    }
};

#define CHECK_NONE(failures)                          \
    do {                                              \
        INFO("the first one is at ", failures.first); \
        CHECK(failures.count == 0);                   \
    } while (false)

// Whether two numbers are the same in every bit, or both NaN.
template <class T>
bool is_same(T a, T b) {
    return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0;
}

// Numbers of every size and sign; those at the ends of the range come first.
template <class T>
std::vector<T> all_kinds_of_numbers(int count, unsigned seed) {
    using Limits = std::numeric_limits<T>;
    std::vector<T> values;
    for (T size : {T{0}, Limits::denorm_min(), Limits::min() / 2, Limits::min(), T{1},
                   Limits::max(), Limits::infinity()}) {
        values.push_back(size);
        values.push_back(-size);
    }
    values.push_back(Limits::quiet_NaN());
    std::mt19937 random(seed);
    std::uniform_real_distribution<T> mantissas(1, 2);
    std::uniform_int_distribution<int> exponents(Limits::min_exponent - Limits::digits,
                                                 Limits::max_exponent - 1);
    while (static_cast<int>(values.size()) < count) {
        const T size = std::ldexp(mantissas(random), exponents(random));
        values.push_back(random() % 2 == 0 ? size : -size);
    }
    return values;
}

}  // namespace
