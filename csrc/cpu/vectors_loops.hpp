// The inner loops of the kernels over vectors, for one block of columns; part of loops.cpp.
#pragma once

#include "reduce_loops.hpp"

namespace eigenfilter::cpu {
namespace {

// Products of floats are summed as floats within groups of columns and as doubles beyond.
constexpr int kGroup = 64;
constexpr int kRowsAtOnce = kRegisterBytes / 16;  // as many as there are registers for their sums

template <class C>
constexpr int kLanesOf = kRegisterBytes / static_cast<int>(sizeof(C));
template <class C>
constexpr int kPartsOf = kSums / kLanesOf<C>;

// What a basis and a vector are multiplied in.
template <class Storage, class Vector>
using Product =
    std::conditional_t<std::is_same_v<Vector, float>, typename Storage::Arithmetic, double>;

// A register of a row.
template <class C, class Storage>
EIGENFILTER_INLINE auto read_row(const typename Storage::Bits* p) {
    using Bits = typename Storage::Bits;
    constexpr int L = kLanesOf<C>;
    const auto v = Storage::template widen<L>(load<Vec<Bits, L>>(p));
    if constexpr (std::is_same_v<C, double>)
        return to_doubles(v);
    else
        return v;
}

// Adds to doubles, or takes from them, the lanes of a register in order.
template <int Sign, class V>
EIGENFILTER_INLINE void add_lanes(Doubles* to, V v) {
    if constexpr (std::is_same_v<V, Doubles>) {
        to[0] += Sign * v;
    } else {
        Vec<float, kDoubles> halves[2];
        std::memcpy(halves, &v, sizeof v);
        to[0] += Sign * to_doubles(halves[0]);
        to[1] += Sign * to_doubles(halves[1]);
    }
}

// sums[r] += one group of row r times w's.
template <class C, class Storage, int Rows>
EIGENFILTER_INLINE void add_group(Doubles (&sums)[Rows][kSums / kDoubles],
                                  const typename Storage::Bits* q, std::int64_t stride,
                                  const C* w) {
    constexpr int L = kLanesOf<C>;
    Vec<C, L> products[Rows][kPartsOf<C>] = {};
    for (int j = 0; j < kGroup; j += kSums) {
        for (int part = 0; part < kPartsOf<C>; ++part) {
            const int at = j + part * L;
            const auto factor = load<Vec<C, L>>(w + at);
            for (int r = 0; r < Rows; ++r)
                products[r][part] += read_row<C, Storage>(q + r * stride + at) * factor;
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int part = 0; part < kPartsOf<C>; ++part)
            add_lanes<1>(sums[r] + part * L / kDoubles, products[r][part]);
    }
}

template <class C, class Storage, int Rows>
EIGENFILTER_INLINE void dots_of(const typename Storage::Bits* q, std::int64_t stride, const C* w,
                                std::int64_t n, double* out) {
    Doubles sums[Rows][kSums / kDoubles] = {};
    std::int64_t j = 0;
    for (; j + kGroup <= n; j += kGroup) add_group<C, Storage, Rows>(sums, q + j, stride, w + j);
    if (j < n) {
        typename Storage::Bits rest[Rows][kGroup] = {};
        C w_rest[kGroup] = {};
        std::memcpy(w_rest, w + j, (n - j) * sizeof *w);
        for (int r = 0; r < Rows; ++r)
            std::memcpy(rest[r], q + r * stride + j, (n - j) * sizeof *q);
        add_group<C, Storage, Rows>(sums, rest[0], kGroup, w_rest);
    }
    for (int r = 0; r < Rows; ++r) out[r] = sum_of(sums[r]);
}

template <class Storage, class Vector>
void dots(const typename Storage::Bits* q, std::int64_t stride, std::int64_t rows, const Vector* w,
          std::int64_t n, double* out) {
    using C = Product<Storage, Vector>;
    alignas(64) C widened[kColumns];
    for (std::int64_t j = 0; j < n; ++j) widened[j] = w[j];
    std::int64_t i = 0;
    for (; i + kRowsAtOnce <= rows; i += kRowsAtOnce)
        dots_of<C, Storage, kRowsAtOnce>(q + i * stride, stride, widened, n, out + i);
    for (; i < rows; ++i) dots_of<C, Storage, 1>(q + i * stride, stride, widened, n, out + i);
}

// wide -= sum of the rows, each times its factor; both end with a whole group.
template <class C, class Storage, int Rows>
EIGENFILTER_INLINE void subtract_rows(const typename Storage::Bits* q, std::int64_t stride,
                                      const double* c, double* wide, std::int64_t n) {
    constexpr int L = kLanesOf<C>;
    C factor[Rows];
    for (int r = 0; r < Rows; ++r) factor[r] = static_cast<C>(c[r]);
    for (std::int64_t j = 0; j < n; j += L) {
        auto sum = factor[0] * read_row<C, Storage>(q + j);
        for (int r = 1; r < Rows; ++r) sum += factor[r] * read_row<C, Storage>(q + r * stride + j);
        Doubles rest[L / kDoubles];
        std::memcpy(rest, wide + j, sizeof rest);
        add_lanes<-1>(rest, sum);
        std::memcpy(wide + j, rest, sizeof rest);
    }
}

template <class C, class Storage, int Rows>
EIGENFILTER_INLINE void subtract_some(const typename Storage::Bits* q, std::int64_t stride,
                                      const double* c, double* wide, std::int64_t n) {
    const std::int64_t whole = n / kGroup * kGroup;
    subtract_rows<C, Storage, Rows>(q, stride, c, wide, whole);
    if (whole == n) return;
    typename Storage::Bits rest[Rows][kGroup] = {};
    for (int r = 0; r < Rows; ++r)
        std::memcpy(rest[r], q + r * stride + whole, (n - whole) * sizeof *q);
    subtract_rows<C, Storage, Rows>(rest[0], kGroup, c, wide + whole, kGroup);
}

// Without the sum of squares of what is left.
template <class Storage, class Vector>
void subtract(const typename Storage::Bits* q, std::int64_t stride, std::int64_t rows,
              const double* c, Vector* w, std::int64_t n) {
    using C = Product<Storage, Vector>;
    constexpr int kRows = 4;
    alignas(64) double wide[kColumns];
    for (std::int64_t j = 0; j < n; ++j) wide[j] = w[j];
    std::int64_t i = 0;
    for (; i + kRows <= rows; i += kRows)
        subtract_some<C, Storage, kRows>(q + i * stride, stride, c + i, wide, n);
    for (; i < rows; ++i) subtract_some<C, Storage, 1>(q + i * stride, stride, c + i, wide, n);
    for (std::int64_t j = 0; j < n; ++j) w[j] = static_cast<Vector>(wide[j]);
}

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
