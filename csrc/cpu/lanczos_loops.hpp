// The inner loops of the kernels over vectors of one type, for one stretch of columns; part of
// loops.cpp.
#pragma once

#include "eigenfilter/rules.hpp"
#include "orthogonalize_loops.hpp"

namespace eigenfilter::cpu {
namespace {

// Calls body(io, i, part) for n elements, some at a time: those from element i on belong to the
// sums of that part, element j to sum j % 16, in every instruction set.
template <class Storage, class Body>
EIGENFILTER_INLINE void by_parts(std::int64_t n, Body body) {
    constexpr int L = kDoubles;
    std::int64_t i = 0;
    for (; i + kSums <= n; i += kSums) {
        for (int part = 0; part < kSums / L; ++part) body(Whole<Storage, L>{}, i + part * L, part);
    }
    for (int part = 0; i < n; i += L, ++part)
        body(Partial<Storage, L>{n - i < L ? n - i : L}, i, part);
}

using Sums = Doubles[kSums / kDoubles];

template <class T>
void row_dots(const T* q, const T* w, std::int64_t n, double* out) {
    Sums dots = {}, squares = {};
    by_parts<Native<T>>(n, [&](auto io, std::int64_t i, int part) {
        const auto product = to_doubles(io.read(w + i));
        dots[part] += to_doubles(io.read(q + i)) * product;
        squares[part] += product * product;
    });
    out[0] = sum_of(dots);
    out[1] = sum_of(squares);
}

template <class T>
void lanczos_step(const LanczosStep& rule, T* u, const T* q, const T* w, std::int64_t n,
                  double* out) {
    Sums squares = {}, dots = {};
    by_parts<Native<T>>(n, [&](auto io, std::int64_t i, int part) {
        const auto present = to_doubles(io.read(q + i));
        const auto next =
            from_doubles<T>(rule(to_doubles(io.read(w + i)), present, to_doubles(io.read(u + i))));
        io.write(u + i, next);
        // Columns that are not there may have become NaN: infinity times zero.
        const auto rounded = to_doubles(io.inside(next));
        squares[part] += rounded * rounded;
        dots[part] += rounded * present;
    });
    out[0] = sum_of(squares);
    out[1] = sum_of(dots);
}

// A tile of a few rows in double: n columns of at most kMixed. Rows lie a cache line more apart,
// or else all would compete for the same lines of a cache.
constexpr std::int64_t kWideStride = kMixed + 8;
struct Wide {
    alignas(64) double at[kMostRows][kWideStride];

    template <class T>
    EIGENFILTER_INLINE Wide(const T* rows, std::int64_t stride, std::int64_t count,
                            std::int64_t n) {
        for (std::int64_t r = 0; r < count; ++r) {
            by_parts<Native<T>>(n, [&](auto io, std::int64_t i, int) {
                store(at[r] + i, to_doubles(io.read(rows + r * stride + i)));
            });
        }
    }
};

// Adds to the lower triangle of out [count, count]; some more products, of rows at once, are left.
template <class T>
void gram(const T* rows, std::int64_t stride, std::int64_t count, std::int64_t n, double* out) {
    using Double = Native<double>;
    const Wide wide(rows, stride, count, n);
    double sums[kMostRows];
    for (std::int64_t r = 0; r < count; ++r) {
        std::int64_t s = 0;
        for (; s <= r && s + kRowsAtOnce <= count; s += kRowsAtOnce)
            dots_of<double, Double, kRowsAtOnce>(wide.at[s], kWideStride, wide.at[r], n, sums + s);
        for (; s <= r; ++s)
            dots_of<double, Double, 1>(wide.at[s], kWideStride, wide.at[r], n, sums + s);
        for (s = 0; s <= r; ++s) out[r * count + s] += sums[s];
    }
}

// Parts vectors of row r, from column i on, from the rows up to it.
template <int Parts, class T, class IO>
EIGENFILTER_INLINE void mix_row(const Wide& wide, const double* factors, std::int64_t r, T* to,
                                std::int64_t i, IO io) {
    Doubles sums[Parts] = {};
    for (std::int64_t s = 0; s <= r; ++s) {
        for (int part = 0; part < Parts; ++part)
            sums[part] += factors[s] * load<Doubles>(wide.at[s] + i + part * kDoubles);
    }
    for (int part = 0; part < Parts; ++part)
        io.write(to + i + part * kDoubles, from_doubles<T>(sums[part]));
}

template <class T>
void mix_rows(const double* factors, T* rows, std::int64_t stride, std::int64_t count,
              std::int64_t n) {
    constexpr int L = kDoubles, kParts = 4;
    const Wide wide(rows, stride, count, n);
    for (std::int64_t r = 0; r < count; ++r) {
        const double* own = factors + r * count;
        T* to = rows + r * stride;
        std::int64_t i = 0;
        for (; i + kParts * L <= n; i += kParts * L)
            mix_row<kParts>(wide, own, r, to, i, Whole<Native<T>, L>{});
        for (; i < n; i += L)
            mix_row<1>(wide, own, r, to, i, Partial<Native<T>, L>{n - i < L ? n - i : L});
    }
}

}  // namespace
}  // namespace eigenfilter::cpu
