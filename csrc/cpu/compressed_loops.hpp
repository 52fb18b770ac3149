// The inner loop of updates of compressed tensors, a group of elements at a time; part of
// loops.cpp.
#pragma once

#include <algorithm>

#include "elementwise_loops.hpp"

namespace eigenfilter::cpu {
namespace {

constexpr int kFloats = kLanes<Native<float>>;

// Some groups at once, as floats: what is chosen by the lists' dtypes is chosen for all of them.
constexpr int kTile = 8 * kGroup;
struct alignas(kRegisterBytes) Tile {
    float v[kTile];

    Floats at(int i) const { return load<Floats>(v + i); }
    void put(int i, Floats values) { store(v + i, values); }
};

// Calls body(i) for the first element of each vector that has one of `count` elements.
template <class Body>
EIGENFILTER_INLINE void each_vector(int count, Body body) {
    for (int i = 0; i < count; i += kFloats) body(i);
}

// Elements in memory: body(i, raw) takes a vector of them as they lie there, zeros where there are
// none, and body(i) returns one.
template <class Bits, class Body>
EIGENFILTER_INLINE void read_raw(const Bits* from, int count, Body body) {
    using Raw = Vec<Bits, kFloats>;
    const int whole = count - count % kFloats;
    each_vector(whole, [&](int i) { body(i, load<Raw>(from + i)); });
    if (whole == count) return;
    Raw last{};
    std::memcpy(&last, from + whole, (count - whole) * sizeof(Bits));
    body(whole, last);
}
template <class Bits, class Body>
EIGENFILTER_INLINE void write_raw(Bits* to, int count, Body body) {
    const int whole = count - count % kFloats;
    each_vector(whole, [&](int i) { store<Vec<Bits, kFloats>>(to + i, body(i)); });
    if (whole == count) return;
    const Vec<Bits, kFloats> last = body(whole);
    std::memcpy(to + whole, &last, (count - whole) * sizeof(Bits));
}

// Calls call(storage) for dtypes that are computed with in float.
template <class Call>
EIGENFILTER_INLINE void by_float_dtype(DType dtype, Call call) {
    if (dtype == DType::f32)
        call(Native<float>{});
    else
        by_narrow_dtype(dtype, call);
}

// Where elements lie in a list of a dtype.
template <class Bits>
Bits* at(const Stretch& r, void* const* list, std::int64_t i) {
    return r.at<Bits>(list) + i;
}

void read_floats(const Stretch& r, DType dtype, void* const* list, std::int64_t i, int count,
                 Tile& out) {
    by_float_dtype(dtype, [&](auto storage) {
        using Storage = decltype(storage);
        read_raw(at<const typename Storage::Bits>(r, list, i), count,
                 [&](int k, auto raw) { out.put(k, Storage::template widen<kFloats>(raw)); });
    });
}

// Floats as they are, narrower dtypes rounded.
template <class Storage, class Rounding>
EIGENFILTER_INLINE auto rounded_float(const Rounding& rounding, Floats v, Output output,
                                      std::int64_t i) {
    if constexpr (std::is_same_v<Storage, Native<float>>)
        return v;
    else
        return rounded<Storage>(rounding, v, output, i);
}

template <int L>
EIGENFILTER_INLINE std::uint32_t largest_of(Vec<std::uint32_t, L> v) {
    if constexpr (L == 1) {
        return v[0];
    } else {
        Vec<std::uint32_t, L / 2> halves[2];
        static_assert(sizeof halves == sizeof v);
        std::memcpy(halves, &v, sizeof v);
        return largest_of<L / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
    }
}

// What codes of groups with these scales stand for, from the first element of a group on.
template <class Moment, class Code>
EIGENFILTER_INLINE void decode(const Code* codes, const float* scales, int count, Tile& out) {
    for (int first = 0; first < count; first += kGroup) {
        const float s = scales[first / kGroup];
        read_raw(codes + first, std::min(static_cast<int>(kGroup), count - first),
                 [&](int k, auto raw) {
                     const Integers whole = widen_whole<Code, kFloats>(raw);
                     out.put(first + k, Moment::decode(__builtin_convertvector(whole, Floats), s));
                 });
    }
}

// A state of the step: its list, the scales of its codes, and what it is among the results.
template <class Moment, class Code, Output Which>
struct State {
    void *const *list, *const *scales;

    float* scale(const Stretch& r, std::int64_t i) const {
        return static_cast<float*>(scales[r.i]) + (r.first + i) / kGroup;
    }

    void read(const Stretch& r, std::int64_t i, int count, Tile& out) const {
        if (scales == nullptr) return read_floats(r, r.t.state, list, i, count, out);
        decode<Moment>(at<const Code>(r, list, i), scale(r, i), count, out);
    }

    // Writes elements, which become what they are when they are read again.
    template <class Rounding>
    void write(const Stretch& r, const Rounding& rounding, std::uint32_t step, std::int64_t i,
               int count, Tile& tile) const {
        if (scales != nullptr) return quantize(r, step, i, count, tile);
        by_float_dtype(r.t.state, [&](auto storage) {
            using Storage = decltype(storage);
            constexpr bool kByStep =
                std::is_same_v<Storage, BFloat16> && std::is_same_v<Rounding, Nearest>;
            write_raw(at<typename Storage::Bits>(r, list, i), count, [&](int k) {
                Floats value = tile.at(k);
                if constexpr (kByStep) {
                    const Words word = word_of(step, index_of<kFloats>(r.first + i + k));
                    value = round_by_steps(value, word);
                }
                const auto raw = rounded_float<Storage>(rounding, value, Which, i + k);
                tile.put(k, Storage::template widen<kFloats>(raw));
                return raw;
            });
        });
    }

 private:
    void quantize(const Stretch& r, std::uint32_t step, std::int64_t i, int count,
                  Tile& tile) const {
        if (count % kFloats != 0)
            std::memset(tile.v + count, 0, (kFloats - count % kFloats) * sizeof(float));
        for (int first = 0; first < count; first += kGroup) {
            const int n = std::min(static_cast<int>(kGroup), count - first);
            float* const values = tile.v + first;
            alignas(kRegisterBytes) float magnitudes[kGroup];
            Words largest{};
            each_vector(n, [&](int k) {
                const Floats magnitude = Moment::magnitude(load<Floats>(values + k));
                const Words bits = (Words)magnitude;
                store(magnitudes + k, magnitude);
                largest = bits > largest ? bits : largest;
            });
            const Moment moment(largest_of<kFloats>(largest));
            *scale(r, i + first) = moment.scale;
            write_raw(at<Code>(r, list, i + first), n, [&](int k) {
                const Words word = word_of(step, index_of<kFloats>(r.first + i + first + k));
                const Floats q =
                    moment.encode(load<Floats>(values + k), load<Floats>(magnitudes + k), word);
                store(values + k, Moment::decode(q, moment.scale));
                return narrow_whole<Code, kFloats>(__builtin_convertvector(q, Integers));
            });
        }
    }
};

using FirstState = State<FirstMoment, std::int8_t, Output::m>;

// Gradients, or momenta that are codes.
void read_gradients(const Stretch& r, std::int64_t i, int count, Tile& out) {
    if (r.t.g_scales != nullptr) return FirstState{r.t.g, r.t.g_scales}.read(r, i, count, out);
    read_floats(r, r.t.gradient(r.i), r.t.g, i, count, out);
}

// Where x starts from: the parameter or its backup, with its correction if there is one.
template <class Call>
EIGENFILTER_INLINE void by_correction(const Tensors& t, Call call) {
    by_narrow_dtype(t.dtype, [&](auto storage) {
        constexpr DType kNarrow = decltype(storage)::kDType;
        if (t.correction == DType::i8)
            call(Master<kNarrow, 8>{}, std::int8_t{});
        else
            call(Master<kNarrow, 16>{}, std::int16_t{});
    });
}

void read_params(const Stretch& r, std::int64_t i, int count, Tile& out) {
    const Tensors& t = r.t;
    void* const* const from = t.b != nullptr ? t.b : t.x;
    if (t.c == nullptr) return read_floats(r, t.dtype, from, i, count, out);
    by_correction(t, [&](auto master, auto correction) {
        using Correction = decltype(correction);
        Tile corrections;
        read_raw(at<const Correction>(r, t.c, i), count, [&](int k, auto raw) {
            corrections.put(k, (Floats)widen_whole<Correction, kFloats>(raw));
        });
        read_raw(at<const std::uint16_t>(r, from, i), count, [&](int k, auto raw) {
            const Words param = __builtin_convertvector(raw, Words);
            out.put(k, master.template join<Floats>(param, (Words)corrections.at(k)));
        });
    });
}

template <class Rounding>
void write_params(const Stretch& r, const Rounding& rounding, std::int64_t i, int count,
                  const Tile& x) {
    const Tensors& t = r.t;
    if (t.c == nullptr) {
        by_float_dtype(t.dtype, [&](auto storage) {
            using Storage = decltype(storage);
            write_raw(at<typename Storage::Bits>(r, t.x, i), count, [&](int k) {
                return rounded_float<Storage>(rounding, x.at(k), Output::x, i + k);
            });
        });
        return;
    }
    by_correction(t, [&](auto master, auto correction) {
        using Correction = decltype(correction);
        Tile corrections;
        write_raw(at<std::uint16_t>(r, t.x, i), count, [&](int k) {
            Words param, rest;
            master.split(x.at(k), param, rest);
            corrections.put(k, (Floats)rest);
            return __builtin_convertvector(param, Vec<std::uint16_t, kFloats>);
        });
        write_raw(at<Correction>(r, t.c, i), count, [&](int k) {
            return narrow_whole<Correction, kFloats>((Integers)corrections.at(k));
        });
    });
}

// x <- rule(from, gradients..., states...) of a stretch, whose tensors are compressed.
template <class Rule, class Rounding, int... S, class... States>
void compressed_update(const Stretch& r, const Rule& rule, const Rounding& rounding,
                       std::uint32_t step, std::integer_sequence<int, S...>,
                       const States&... states) {
    for (std::int64_t i = 0; i < r.count; i += kTile) {
        const int count = static_cast<int>(std::min<std::int64_t>(kTile, r.count - i));
        Tile x, g, before[sizeof...(S) + 1], after[sizeof...(S) + 1];
        read_params(r, i, count, x);
        read_gradients(r, i, count, g);
        (states.read(r, i, count, before[S]), ...);
        each_vector(count, [&](int k) {
            [[maybe_unused]] Floats state[] = {before[S].at(k)..., {}};
            x.put(k, rule(x.at(k), g.at(k), state[S]...));
            (after[S].put(k, state[S]), ...);
        });
        if constexpr (sizeof...(S) > 0) {
            (states.write(r, rounding, step, i, count, after[S]), ...);
            each_vector(count, [&](int k) {
                const Floats old[] = {before[S].at(k)...}, stored[] = {after[S].at(k)...};
                x.put(k, rule.finish(x.at(k), old, stored));
            });
        }
        write_params(r, rounding, i, count, x);
    }
}

template <class Scalars>
void compressed_update_of(const Stretch& r, const Scalars& s) {
    const FirstState first{r.t.m, r.t.m_scales};
    const State<SecondMoment, std::uint8_t, Output::v> second{r.t.v, r.t.v_scales};
    std::uint32_t step = 0;
    if constexpr (kMayRound<Scalars>) step = number_of_step(s);
    const auto run = [&](const auto& rule, const auto& rounding) {
        const auto update = [&](const auto&... states) {
            compressed_update(r, rule, rounding, step,
                              std::make_integer_sequence<int, sizeof...(states)>{}, states...);
        };
        constexpr int kStates = kListsWith<Scalars, kState>;
        if constexpr (kStates == 2) {
            update(first, second);
        } else if constexpr (kStates == 1) {
            r.t.m != nullptr ? update(first) : update();
        } else {
            update();
        }
    };
    const auto with = [&](const auto& rounding) {
        if constexpr (kHasAhead<Scalars>)
            run(typename Scalars::template Ahead<float>(s), rounding);
        else
            run(typename Scalars::template Rule<float>(s), rounding);
    };
    if constexpr (kMayRound<Scalars>) {
        if (s.stochastic)
            return with(Stochastic(static_cast<std::uint32_t>(s.rounding_seed), r.place()));
    }
    with(Nearest{});
}

// The entry of an update in the table.
template <class Scalars>
void update_of(const Stretch& r, const Scalars& s) {
    if constexpr (kMayBeCompressed<Scalars>) {
        if (r.t.is_compressed()) return compressed_update_of(r, s);
    }
    plain_update_of(r, s);
}

}  // namespace
}  // namespace eigenfilter::cpu
