// The exponential of numbers that are not positive: its error, and the ends of its range.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "numbers.hpp"
//
#include "core/exponential.hpp"

namespace {

using eigenfilter::exponential;
using eigenfilter::ExponentialOf;

template <class T>
using Word = std::conditional_t<std::is_same_v<T, float>, std::uint32_t, std::uint64_t>;

template <class T>
std::vector<T> exponentials_of(const std::vector<T>& numbers) {
    constexpr int L = 64 / sizeof(T);
    return in_vectors<T, L>(numbers, [](auto v) { return exponential<T, Vec<Word<T>, L>>(v); });
}

// Numbers from the least one up to 0: of every size, evenly spaced, and next to a half of log 2
// from the multiples of it, where the remainder is largest.
template <class T>
std::vector<T> arguments() {
    constexpr T least = ExponentialOf<T>::kLeast;
    std::vector<T> values = {least, std::nextafter(least, T{0}), -std::numeric_limits<T>::min()};
    std::mt19937 random(1);
    std::uniform_real_distribution<T> evenly(least, 0), exponents(-40, std::log2(-least));
    for (int i = 0; i < 200'000; ++i) {
        values.push_back(evenly(random));
        values.push_back(-std::exp2(exponents(random)));
    }
    for (int n = 0; (n + 1) * std::log(2.0) < -least; ++n) {
        const T middle = static_cast<T>(-(n + 0.5) * std::log(2.0L));
        for (const T toward : {least, T{0}}) {
            T x = middle;
            for (int step = 0; step < 20; ++step) values.push_back(x = std::nextafter(x, toward));
        }
    }
    return values;
}

// e^x by the library, in a wider type.
template <class T>
long double exact(T x) {
    return std::exp(static_cast<long double>(x));
}

// |value - e^x| in units in the last place of e^x.
template <class T>
double error_in_units(T value, T x) {
    const long double e = exact(x);
    const T near = static_cast<T>(e);
    const long double unit = near - std::nextafter(near, T{0});
    return static_cast<double>(std::fabs(value - e) / unit);
}

}  // namespace

TEST_CASE_TEMPLATE("it errs by less than two units in the last place", T, float, double) {
    const std::vector<T> xs = arguments<T>(), results = exponentials_of(xs);
    double largest = 0;
    for (std::size_t i = 0; i < xs.size(); ++i)
        largest = std::max(largest, error_in_units(results[i], xs[i]));
    CHECK(largest < 2);
}

TEST_CASE_TEMPLATE("at the ends of its range", T, float, double) {
    using Limits = std::numeric_limits<T>;
    constexpr T least = ExponentialOf<T>::kLeast;
    const std::vector<T> ends =
        exponentials_of(std::vector<T>{T{0}, -T{0}, -Limits::denorm_min(), -Limits::epsilon() / 8,
                                       std::nextafter(least, -Limits::max()), Limits::lowest(),
                                       -Limits::infinity(), Limits::quiet_NaN()});
    for (int i = 0; i < 4; ++i) CHECK(ends[i] == 1);
    for (int i = 4; i < 7; ++i) CHECK(is_same(ends[i], T{0}));
    CHECK(std::isnan(ends[7]));
    CHECK(exact(least) >= Limits::min());
}

TEST_CASE_TEMPLATE("a vector has the results of its numbers", T, float, double) {
    const std::vector<T> xs = arguments<T>(), results = exponentials_of(xs);
    Failures failures;
    for (std::size_t i = 0; i < xs.size(); ++i) {
        const T alone = exponential<T, Word<T>>(xs[i]);
        failures.add_unless(is_same(results[i], alone), static_cast<std::uint32_t>(i));
    }
    CHECK_NONE(failures);
}
