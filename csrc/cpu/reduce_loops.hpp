// The inner loops of the reductions, and how all sums are taken; part of loops.cpp.
#pragma once

#include "compressed_loops.hpp"

namespace eigenfilter::cpu {
namespace {

// Element j of a sum is added to sum j % 16: one order for every instruction set.
constexpr int kSums = 16;
using Sums = Doubles[kSums / kDoubles];

// The sum of kSums sums, pairwise.
EIGENFILTER_INLINE double sum_of(const Doubles* sums) {
    double flat[kSums];
    std::memcpy(flat, sums, sizeof flat);
    for (int width = kSums / 2; width > 0; width /= 2) {
        for (int k = 0; k < width; ++k) flat[k] += flat[k + width];
    }
    return flat[0];
}

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

// Of gradients t [n], or of their products with weights [n].
double sum_squares(DTypes dtypes, const void* t, const void* weights, std::int64_t n) {
    return by_dtypes(dtypes, [&](auto storage, auto gradient) {
        using Storage = decltype(storage);
        using Gradient = decltype(gradient);
        const auto* const values = static_cast<const typename Gradient::Bits*>(t);
        const auto* const w = static_cast<const typename Storage::Bits*>(weights);
        Sums sums = {};
        by_parts<Gradient>(n, [&](auto io, std::int64_t i, int part) {
            auto value = to_doubles(Gradient::template widen<kDoubles>(io.read(values + i)));
            if (w != nullptr)
                value *= to_doubles(Storage::template widen<kDoubles>(io.read(w + i)));
            sums[part] += value * value;
        });
        return sum_of(sums);
    });
}

// Of momenta that are codes [n], decoded some groups at a time.
double sum_squares_of_codes(const std::int8_t* codes, const float* scales, std::int64_t n) {
    Sums sums = {};
    for (std::int64_t first = 0; first < n; first += kTile) {
        const int count = static_cast<int>(std::min<std::int64_t>(kTile, n - first));
        Tile values;
        decode<FirstMoment>(codes + first, scales + first / kGroup, count, values);
        by_parts<Native<float>>(count, [&](auto io, std::int64_t i, int part) {
            const auto value = to_doubles(io.read(values.v + i));
            sums[part] += value * value;
        });
    }
    return sum_of(sums);
}

// x - x is NaN for inf and NaN, 0 for every other x.
bool has_nonfinite(DType dtype, const void* t, std::int64_t n) {
    return by_dtype(dtype, [&](auto storage) {
        using Storage = decltype(storage);
        constexpr int L = kLanes<Storage>;
        const auto* const values = static_cast<const typename Storage::Bits*>(t);
        Vec<typename Storage::Arithmetic, L> traces{};
        walk<Storage>(n, nullptr, [&](auto io, std::int64_t i) {
            const auto value = Storage::template widen<L>(io.read(values + i));
            traces += value - value;
        });
        for (int lane = 0; lane < L; ++lane) {
            if (traces[lane] != traces[lane]) return true;
        }
        return false;
    });
}

}  // namespace
}  // namespace eigenfilter::cpu
