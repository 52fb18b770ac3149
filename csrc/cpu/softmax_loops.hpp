// The inner loops of the softmax of a row, for one block of columns; part of loops.cpp.
#pragma once

#include <limits>

#include "vectors_loops.hpp"
// The templates of rules see the functions of vectors, declared before.
#include "core/exponential.hpp"

namespace eigenfilter::cpu {
namespace {

// As many unsigned integers as a register has elements, and of their size.
template <class T>
using WordsOf =
    Vec<std::conditional_t<std::is_same_v<T, float>, std::uint32_t, std::uint64_t>, kLanesOf<T>>;

// The largest of n numbers and of `largest`, which NaN is not.
template <class T>
EIGENFILTER_INLINE T largest_of(const T* z, std::int64_t n, T largest) {
    constexpr int L = kLanesOf<T>;
    using V = Vec<T, L>;
    V lanes = V{} + largest;
    std::int64_t i = 0;
    for (; i + L <= n; i += L) {
        const auto v = load<V>(z + i);
        lanes = v > lanes ? v : lanes;
    }
    for (; i < n; ++i) largest = z[i] > largest ? z[i] : largest;
    for (int lane = 0; lane < L; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
    return largest;
}

// e <- exp(z - largest) of kSums columns; the sums of e and of e u are added to, column j to sum j.
template <class T>
EIGENFILTER_INLINE void add_exponentials(const T* z, const T* u, T largest, T* e, Doubles* total,
                                         Doubles* products) {
    constexpr int L = kLanesOf<T>;
    using V = Vec<T, L>;
    for (int part = 0; part < kPartsOf<T>; ++part) {
        const int at = part * L;
        const V value = exponential<T, WordsOf<T>>(load<V>(z + at) - largest);
        store(e + at, value);
        add_lanes<1>(total + at / kDoubles, value);
        add_lanes<1>(products + at / kDoubles, value * load<V>(u + at));
    }
}

template <class T>
void softmax_sums(const T* z, const T* u, T* e, std::int64_t n, SoftmaxSums& s) {
    const T largest = largest_of(z, n, static_cast<T>(s.largest));
    Doubles total[kSums / kDoubles] = {}, products[kSums / kDoubles] = {};
    std::int64_t i = 0;
    for (; i + kSums <= n; i += kSums)
        add_exponentials(z + i, u + i, largest, e + i, total, products);
    if (i < n) {
        T z_rest[kSums], u_rest[kSums] = {}, e_rest[kSums];
        for (T& logit : z_rest) logit = -std::numeric_limits<T>::infinity();
        std::memcpy(z_rest, z + i, (n - i) * sizeof *z);
        std::memcpy(u_rest, u + i, (n - i) * sizeof *u);
        add_exponentials(z_rest, u_rest, largest, e_rest, total, products);
        std::memcpy(e + i, e_rest, (n - i) * sizeof *e);
    }
    const double before = exponential<double, std::uint64_t>(s.largest - largest);
    s = {largest, s.total * before + sum_of(total), s.products * before + sum_of(products)};
}

template <class T>
void softmax_product(const T* e, const T* u, T* out, std::int64_t n, double factor, double mean) {
    const T scale = static_cast<T>(factor), center = static_cast<T>(mean);
    walk<Native<T>>(n, nullptr, [=](auto io, std::int64_t i) {
        io.write(out + i, scale * io.read(e + i) * (io.read(u + i) - center));
    });
}

}  // namespace
}  // namespace eigenfilter::cpu
