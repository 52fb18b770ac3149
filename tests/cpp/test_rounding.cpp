// Stochastic rounding: what a dtype holds stays, and the probabilities are exact.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <set>
#include <vector>

#include "numbers.hpp"

namespace {

using eigenfilter::Output;
using eigenfilter::Place;
using eigenfilter::Stochastic;

constexpr int kFloats = 2 * kDoubles;

template <class Storage>
float dithered(float value, std::uint32_t random) {
    return eigenfilter::dither<Storage::kDType>(value, random);
}

// The number of a 16-bit format as a float.
template <class Storage>
float number(std::uint32_t bits) {
    return static_cast<float>(kFormat<Storage>.value(bits));
}

// Random words of all kinds, the ends of every range of bits among them.
std::vector<std::uint32_t> random_words(int count, unsigned seed) {
    std::vector<std::uint32_t> words = {0,        1,        0x1000,      0x1fff,
                                        0x2000,   0x8000,   0xffff,      0x10000,
                                        0x1fffff, 0x200000, 0xffff0000u, 0xffffffffu};
    std::mt19937 random(seed);
    while (static_cast<int>(words.size()) < count) words.push_back(random());
    return words;
}

// A float between two neighbors of a 16-bit format, `part` of 2^bits of the way from `low` to the
// one farther from zero.
struct Between {
    std::uint32_t low, part;
    int bits;

    template <class Storage>
    float value() const {
        const Format& format = kFormat<Storage>;
        const double from = format.value(low), to = format.value(low + 1);
        const double value = from + std::ldexp(to - from, -bits) * part;
        REQUIRE(static_cast<float>(value) == value);
        return static_cast<float>(value);
    }
};

// Checks over all random words, which matter in their low `bits` alone, that `part` of them round
// away from zero.
template <class Storage>
void check_probability(Between between) {
    CAPTURE(between.low);
    CAPTURE(between.part);
    const float value = between.value<Storage>();
    const float down = number<Storage>(between.low), up = number<Storage>(between.low + 1);
    std::mt19937 random(between.low);
    std::uint32_t ups = 0;
    Failures others;
    for (std::uint32_t word = 0; word < 1u << between.bits; ++word) {
        const std::uint32_t high_bits = static_cast<std::uint32_t>(random()) << between.bits;
        const float result = dithered<Storage>(value, high_bits | word);
        ups += is_same(result, up);
        others.add_unless(is_same(result, up) || is_same(result, down), word);
    }
    CHECK_NONE(others);
    CHECK(ups == between.part);
}

}  // namespace

TEST_CASE_TEMPLATE("what the dtype holds stays, whatever the random bits", S, BFloat16, Float16) {
    const std::vector<std::uint32_t> words = random_words(40, 1);
    Failures failures;
    for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
        const float value = number<S>(bits);
        if (kFormat<S>.is_nan(bits)) continue;
        for (const std::uint32_t word : words)
            failures.add_unless(is_same(dithered<S>(value, word), value), bits);
    }
    CHECK_NONE(failures);
}

TEST_CASE_TEMPLATE("beyond the largest number, rounding is left to narrowing", S, BFloat16,
                   Float16) {
    const float largest = number<S>(kFormat<S>.infinity() - 1);
    for (const float size : {largest, std::nextafter(largest, INFINITY), largest * 1.001f,
                             std::numeric_limits<float>::max(), INFINITY}) {
        for (const std::uint32_t word : random_words(40, 2)) {
            CHECK(dithered<S>(size, word) == size);
            CHECK(dithered<S>(-size, word) == -size);
        }
    }
    for (const std::uint32_t nan : {0x7f800001u, 0x7fc00000u, 0xff800001u, 0xffffffffu}) {
        for (const std::uint32_t word : random_words(40, 3))
            CHECK(bits_of(dithered<S>(float_of(nan), word)) == nan);
    }
}

TEST_CASE("bfloat16 rounds away from zero with the exact probability") {
    constexpr std::uint32_t one = 0x3f80, two = 0x4000, largest = 0x7f7f, minus = 0x8000;
    for (const std::uint32_t low : {one, one + 1, two - 1, 0x0080u, largest - 1, minus | one}) {
        for (const std::uint32_t part : {1u, 0x7fffu, 0x8000u, 0xfffeu, 0xffffu})
            check_probability<BFloat16>({low, part, 16});
    }
}

TEST_CASE("bfloat16 rounds subnormal numbers alike") {
    for (const std::uint32_t low : {0u, 1u, 0x7eu, 0x7fu, 0x8000u, 0x807fu}) {
        for (const std::uint32_t part : {1u, 0x8000u, 0xffffu})
            check_probability<BFloat16>({low, part, 16});
    }
}

TEST_CASE("float16 rounds away from zero with the exact probability") {
    constexpr std::uint32_t one = 0x3c00, two = 0x4000, largest = 0x7bff, minus = 0x8000;
    for (const std::uint32_t low : {one, one + 1, two - 1, 0x0400u, largest - 1, minus | one}) {
        for (const std::uint32_t part : {1u, 0xfffu, 0x1000u, 0x1ffeu, 0x1fffu})
            check_probability<Float16>({low, part, 13});
    }
}

TEST_CASE("float16 rounds subnormal numbers alike, in units of 2^-45") {
    for (const std::uint32_t low : {0u, 1u, 2u, 0x8000u, 0x8002u}) {
        for (const std::uint32_t part : {1u << 1, 1u << 20, (1u << 21) - 4})
            check_probability<Float16>({low, part, 21});
    }
    check_probability<Float16>({0x3ff, 1u << 20, 21});
    check_probability<Float16>({0, 1, 21});
}

TEST_CASE("less than a unit of 2^-45 is cut off") {
    std::uint32_t ups = 0;
    const float value = 5.75f * 0x1p-45f;
    for (std::uint32_t word = 0; word < 1u << 21; ++word)
        ups += dithered<Float16>(-value, word) == -0x1p-24f;
    CHECK(ups == 5);
}

TEST_CASE_TEMPLATE("a vector is rounded as its numbers are", S, BFloat16, Float16) {
    const std::vector<float> values = all_kinds_of_numbers<float>(50'000, 4);
    constexpr std::uint32_t start = 0xffff0000u;
    const Stochastic rounding(123, Place{4, 0xfff0});
    for (const Output output : {Output::x, Output::m, Output::v}) {
        const std::vector<float> in_lanes =
            in_vectors<float, kFloats>(values, [&, next = start](auto v) mutable {
                Vec<std::uint32_t, kFloats> index;
                for (int lane = 0; lane < kFloats; ++lane) index[lane] = next++;
                return rounding.round<S>(v, output, index);
            });
        Failures failures;
        for (std::uint32_t i = 0; i < values.size(); ++i) {
            const float alone = rounding.round<S>(values[i], output, start + i);
            failures.add_unless(bits_of(in_lanes[i]) == bits_of(alone), i);
        }
        CHECK_NONE(failures);
    }
}

TEST_CASE_TEMPLATE("the result is a neighbor, and narrowing keeps it", S, BFloat16, Float16) {
    const Format& format = kFormat<S>;
    const double largest = format.value(format.infinity() - 1);
    std::vector<float> values, results;
    for (const float value : all_kinds_of_numbers<float>(200'000, 9)) {
        if (std::fabs(value) < largest) values.push_back(value);
    }
    const std::vector<std::uint32_t> words = random_words(static_cast<int>(values.size()), 10);
    for (std::size_t i = 0; i < values.size(); ++i)
        results.push_back(dithered<S>(values[i], words[i]));
    const std::vector<std::uint16_t> narrow = in_vectors<std::uint16_t, kFloats>(
        results, [](auto v) { return S::template narrow<kFloats>(v); });
    Failures not_kept, not_next;
    for (std::size_t i = 0; i < values.size(); ++i) {
        const double value = values[i], result = results[i];
        not_kept.add_unless(is_same(format.value(narrow[i]), result), bits_of(values[i]));
        const double away = format.value_below_infinity((narrow[i] & 0x7fffu) + 1);
        const double gap = away - std::fabs(result);
        not_next.add_unless(
            std::signbit(value) == std::signbit(result) && std::fabs(value - result) < gap,
            bits_of(values[i]));
    }
    CHECK_NONE(not_kept);
    CHECK_NONE(not_next);
}

TEST_CASE("the random bits depend on the element's number, and on nothing else of its place") {
    const std::uint32_t seed = 77;
    Failures failures;
    for (const std::uint32_t first : {0u, 64u, 0xfffffff0u}) {
        const Stochastic from_first(seed, Place{3, first}), from_zero(seed, Place{3, 0});
        for (std::uint32_t i = 0; i < 1000; ++i) {
            const float value = 1.0f + static_cast<float>(i) * 0x1p-17f;
            failures.add_unless(from_first.round<BFloat16>(value, Output::m, i) ==
                                    from_zero.round<BFloat16>(value, Output::m, first + i),
                                i);
        }
    }
    CHECK_NONE(failures);
}

TEST_CASE("seeds, tensors and outputs have random bits of their own") {
    const float half = 1.0f + 0x1p-8f;
    std::set<std::vector<bool>> sequences;
    for (const std::uint32_t seed : {0u, 1u, 1u << 24}) {
        for (const std::uint32_t tensor : {0u, 1u, 1999u}) {
            for (const Output output : {Output::x, Output::m, Output::v}) {
                const Stochastic rounding(seed, Place{tensor, 0});
                std::vector<bool> ups;
                for (std::uint32_t i = 0; i < 4096; ++i)
                    ups.push_back(rounding.round<BFloat16>(half, output, i) > half);
                const auto count = std::count(ups.begin(), ups.end(), true);
                CHECK(std::abs(count - 2048) < 5 * 32);  // five standard deviations
                sequences.insert(ups);
            }
        }
    }
    CHECK(sequences.size() == 27);
}

TEST_CASE("words are mixed as by MurmurHash3") {
    CHECK(eigenfilter::mix(0u, 0) == 0);
    CHECK(eigenfilter::mix(1u, 0) == 0x514e28b7u);
    CHECK(eigenfilter::mix(0xffffffffu, 0) == 0x81f16f39u);
}
