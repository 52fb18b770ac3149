// The inner loops of orthogonalize, for one block of columns; part of loops.cpp.
#pragma once

#include "eigenfilter/contract.hpp"
#include "simd.hpp"

namespace eigenfilter::cpu {
namespace {

// Products of floats are summed as floats within groups of columns and as doubles beyond. Column j
// of a group is added to sum j % 16: one order for every instruction set.
constexpr int kGroup = 64;
constexpr int kSums = 16;
constexpr int kRowsAtOnce = kRegisterBytes / 16;  // as many as there are registers for their sums

using Doubles = Vec<double, kDoubles>;

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

// The sum of kSums sums, pairwise.
EIGENFILTER_INLINE double sum_of(const Doubles* sums) {
    double flat[kSums];
    std::memcpy(flat, sums, sizeof flat);
    for (int width = kSums / 2; width > 0; width /= 2) {
        for (int k = 0; k < width; ++k) flat[k] += flat[k + width];
    }
    return flat[0];
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

}  // namespace
}  // namespace eigenfilter::cpu
