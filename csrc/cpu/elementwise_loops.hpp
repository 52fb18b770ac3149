// The inner loop of every update: one, over the rules; part of loops.cpp.
#pragma once

#include <utility>

#include "dispatch.hpp"

namespace eigenfilter::cpu {
namespace {

// Calls body(io, i) for blocks from element i on that cover n elements; with `streamed`, whole
// blocks start where that pointer is aligned, and what is only written goes past the caches.
template <class Storage, class Body>
EIGENFILTER_INLINE void walk(std::int64_t n, const typename Storage::Bits* streamed, Body body) {
    constexpr int L = kLanes<Storage>;
    std::int64_t i = 0;
    if (streamed != nullptr) {
        constexpr std::uintptr_t block = L * sizeof(typename Storage::Bits);
        const auto past = reinterpret_cast<std::uintptr_t>(streamed) % block;
        if (past != 0) {
            const auto head = static_cast<std::int64_t>((block - past) / sizeof(*streamed));
            i = head < n ? head : n;
            body(Partial<Storage, L>{i}, 0);
        }
        for (; i + L <= n; i += L) body(Streamed<Storage, L>{}, i);
        end_of_streaming();
    } else {
        for (; i + L <= n; i += L) body(Whole<Storage, L>{}, i);
    }
    if (i < n) body(Partial<Storage, L>{n - i}, i);
}

// The numbers of L elements from i on.
template <int L>
EIGENFILTER_INLINE Vec<std::uint32_t, L> index_of(std::int64_t i) {
    constexpr std::uint32_t lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load<Vec<std::uint32_t, L>>(lanes) + static_cast<std::uint32_t>(i);
}

// Rounds and narrows the results of a block from element i on.
template <class Storage, class Rounding, class V>
EIGENFILTER_INLINE auto rounded(const Rounding& rounding, V v, Output output, std::int64_t i) {
    constexpr int L = kLanes<Storage>;
    return Storage::template narrow<L>(rounding.template round<Storage>(v, output, index_of<L>(i)));
}

// x <- rule(from, gradients..., states...) of a stretch; the rule changes the states too. `from` is
// b where there are backups, unless they are saved: then it is x, and b <- x.
template <class Storage, class Gradient, bool Saves, class Rule, class Rounding, int... G, int... S>
void update(const Stretch& r, const Rule& rule, const Rounding& rounding,
            std::integer_sequence<int, G...>, std::integer_sequence<int, S...>) {
    constexpr int L = kLanes<Storage>;
    using Bits = typename Storage::Bits;
    using GradientBits = const typename Gradient::Bits;
    Bits *const x = r.at<Bits>(r.t.x), *const b = r.at<Bits>(r.t.b);
    const Bits* const from = Saves || b == nullptr ? x : b;
    GradientBits* const grads[] = {r.at<GradientBits>(r.t.g), r.at<GradientBits>(r.t.g0)};
    Bits* const states[] = {r.at<Bits>(r.t.m), r.at<Bits>(r.t.v)};
    const Bits* const streamed = !r.streams || b == nullptr ? nullptr : Saves ? b : x;
    walk<Storage>(r.count, streamed, [=](auto io, std::int64_t i) {
        using V = Vec<typename Storage::Arithmetic, L>;
        const auto origin = io.read(from + i);
        const V before[] = {Storage::template widen<L>(io.read(states[S] + i))..., {}};
        [[maybe_unused]] V state[] = {before[S]..., {}};
        V updated = rule(Storage::template widen<L>(origin),
                         Gradient::template widen<L>(io.read(grads[G] + i))..., state[S]...);
        if constexpr (sizeof...(S) > 0) {
            const decltype(origin) stored[] = {
                rounded<Storage>(rounding, state[S], Output(S + 1), i)...};
            (io.write(states[S] + i, stored[S]), ...);
            const V after[] = {Storage::template widen<L>(stored[S])...};
            updated = rule.finish(updated, before, after);
        }
        const auto result = rounded<Storage>(rounding, updated, Output::x, i);
        if constexpr (Saves) {
            io.write_only(b + i, origin);
            io.write(x + i, result);
        } else {
            io.write_only(x + i, result);
        }
    });
}

// The loop of an update for the call's dtypes, lists and rounding.
template <class Scalars>
void plain_update_of(const Stretch& r, const Scalars& s) {
    const auto run = [&](auto storage, auto gradient, const auto& rule, const auto& rounding) {
        using Storage = decltype(storage);
        using Gradient = decltype(gradient);
        constexpr std::make_integer_sequence<int, kListsWith<Scalars, kGradients>> grads;
        constexpr std::make_integer_sequence<int, kListsWith<Scalars, kState>> states;
        if constexpr (kMayBeAbsent<Scalars, &Tensors::m>) {
            constexpr std::integer_sequence<int> none;
            if (r.t.m == nullptr)
                return update<Storage, Gradient, false>(r, rule, rounding, grads, none);
        }
        if constexpr (kListsWith<Scalars, kSaved> != 0) {
            if (s.save) return update<Storage, Gradient, true>(r, rule, rounding, grads, states);
        }
        update<Storage, Gradient, false>(r, rule, rounding, grads, states);
    };
    const auto with = [&](auto storage, auto gradient, const auto& rounding) {
        using Real = typename decltype(storage)::Arithmetic;
        if constexpr (kHasAhead<Scalars>) {
            using Ahead = typename Scalars::template Ahead<Real>;
            if (s.extrapolation != 0) return run(storage, gradient, Ahead(s), rounding);
        }
        using Rule = typename Scalars::template Rule<Real>;
        run(storage, gradient, Rule(s), rounding);
    };
    const DTypes dtypes{r.t.dtype, r.t.gradient(r.i)};
    if constexpr (kMayRound<Scalars>) {
        if (s.stochastic) {
            const Stochastic rounding(static_cast<std::uint32_t>(s.rounding_seed), r.place());
            return by_narrow_dtypes(dtypes, [&](auto p, auto g) { with(p, g, rounding); });
        }
    }
    by_dtypes(dtypes, [&](auto p, auto g) { with(p, g, Nearest{}); });
}

}  // namespace
}  // namespace eigenfilter::cpu
