// Steps of compressed tensors on the GPU: one kernel for a rule and a dtype of parameters. It finds
// all other formats at run time: it waits for memory, and a branch is the same for every thread.
//
// A thread has 4 elements that lie side by side, so that 16 threads have a group. More of them
// would take more registers than there are.
#pragma once

#include <type_traits>
#include <utility>

#include "core/compression.hpp"
#include "multi_tensor.cuh"
#include "scalars.cuh"

namespace eigenfilter::cuda {
namespace {

constexpr int kHeld = 4;  // elements of a thread at a time
constexpr int kThreadsAGroup = kGroup / kHeld;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Elements of a thread as they lie in memory, in whatever format.
struct Raw {
    std::uint32_t words[kHeld];

    template <class Bits>
    __device__ __forceinline__ Bits get(int j) const {
        if constexpr (sizeof(Bits) == 4)
            return same_bits<Bits>(words[j]);
        else
            return static_cast<Bits>(words[word_of<Bits>(j)] >> shift_of<Bits>(j));
    }
    // In order, from the first element on.
    template <class Bits>
    __device__ __forceinline__ void put(int j, Bits bits) {
        if constexpr (sizeof(Bits) == 4) {
            words[j] = same_bits<std::uint32_t>(bits);
        } else {
            const std::uint32_t own = static_cast<std::make_unsigned_t<Bits>>(bits);
            std::uint32_t& word = words[word_of<Bits>(j)];
            word = shift_of<Bits>(j) == 0 ? own : word | own << shift_of<Bits>(j);
        }
    }

    template <class Bits>
    static __device__ __forceinline__ Raw load(const Bits* p) {
        const auto all = *reinterpret_cast<const Access<Bits>*>(p);
        Raw raw;
        __builtin_memcpy(raw.words, &all, sizeof all);
        return raw;
    }
    template <class Bits>
    __device__ __forceinline__ void store(Bits* p) const {
        Access<Bits> all;
        __builtin_memcpy(&all, words, sizeof all);
        *reinterpret_cast<Access<Bits>*>(p) = all;
    }

 private:
    template <class Bits>
    using Access = std::conditional_t<sizeof(Bits) == 4, uint4,
                                      std::conditional_t<sizeof(Bits) == 2, uint2, std::uint32_t>>;

    template <class Bits>
    static __device__ __forceinline__ int word_of(int j) {
        return j * static_cast<int>(sizeof(Bits)) / 4;
    }
    template <class Bits>
    static __device__ __forceinline__ int shift_of(int j) {
        return j * static_cast<int>(sizeof(Bits)) % 4 * 8;
    }
};

// Calls call(storage) for a dtype of floats.
template <class Call>
__device__ __forceinline__ void by_float_dtype(DType dtype, const Call& call) {
    if (dtype == DType::f32)
        call(Native<float>{});
    else if (dtype == DType::bf16)
        call(BFloat16{});
    else
        call(Float16{});
}

__device__ __forceinline__ void widen(const Raw& raw, DType dtype, float (&to)[kHeld]) {
    by_float_dtype(dtype, [&](auto storage) {
        using Storage = decltype(storage);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) to[j] = Storage::widen(raw.get<typename Storage::Bits>(j));
    });
}

// Where the elements of a thread begin in their chunk, and how many there are.
struct Span {
    int first, count;
    bool wide;  // all are there, and may be moved by one access

    __device__ __forceinline__ bool leads_group() const {
        return threadIdx.x % kThreadsAGroup == 0 && count > 0;
    }
};

// Those of this thread, of `total` in the chunk; `aligned`: one access may move them.
__device__ __forceinline__ Span span_of(int start, int total, bool aligned) {
    const int first = start + static_cast<int>(threadIdx.x) * kHeld;
    const int count = max(0, min(total - first, kHeld));
    return {first, count, aligned && count == kHeld};
}

// A list's elements in a chunk.
struct Elements {
    char* p;
    int size;  // of one, in bytes

    template <bool Wide>
    __device__ __forceinline__ Raw load(const Span& span) const {
        Raw raw;
        by_bits(span, [&](auto* from) {
            using Bits = std::remove_pointer_t<decltype(from)>;
            if constexpr (Wide) {
                raw = Raw::load(from);
            } else {
#pragma unroll
                for (int j = 0; j < kHeld; ++j) raw.put<Bits>(j, j < span.count ? from[j] : Bits{});
            }
        });
        return raw;
    }

    __device__ __forceinline__ Raw load(const Span& span) const {
        return span.wide ? load<true>(span) : load<false>(span);  // not needed for the result
    }

    __device__ __forceinline__ void store(const Raw& raw, const Span& span) const {
        by_bits(span, [&](auto* to) {
            if (span.wide) return raw.store(to);  // not needed for the result
#pragma unroll
            for (int j = 0; j < kHeld; ++j)
                if (j < span.count) to[j] = raw.get<std::remove_pointer_t<decltype(to)>>(j);
        });
    }

 private:
    template <class Call>
    __device__ __forceinline__ void by_bits(const Span& span, const Call& call) const {
        if (size == 4)
            call(reinterpret_cast<std::uint32_t*>(p) + span.first);
        else if (size == 2)
            call(reinterpret_cast<std::uint16_t*>(p) + span.first);
        else
            call(reinterpret_cast<std::uint8_t*>(p) + span.first);
    }
};

// The rule of an update for compressed tensors: where it has one with an extrapolation, that takes
// an extrapolation of 0 too.
template <class Scalars, class = void>
struct CompressedRule {
    using Type = typename Scalars::template Rule<float>;
};
template <class Scalars>
struct CompressedRule<Scalars, std::enable_if_t<kHasAhead<Scalars>>> {
    using Type = typename Scalars::template Ahead<float>;
};

// A rule with what rounds and quantizes its results.
template <class Rule>
struct Compressing : Rule {
    std::uint32_t seed = 0, step = 0;
    bool stochastic = false;

    template <class Scalars>
    EIGENFILTER_RULE explicit Compressing(const Scalars& s) : Rule(s) {
        if constexpr (kMayRound<Scalars>) {
            seed = static_cast<std::uint32_t>(s.rounding_seed);
            step = number_of_step(s);
            stochastic = s.stochastic;
        }
    }
};

// What the results of a thread are rounded by, given the place of its first element in the chunk.
struct Results {
    Stochastic rounding;
    bool stochastic;
    std::uint32_t step, first;

    // The elements become what is stored.
    template <class Storage>
    __device__ __forceinline__ Raw narrow(float (&from)[kHeld], Output output) const {
        if constexpr (!std::is_same_v<Storage, Native<float>>) {
            if (stochastic) {
#pragma unroll
                for (int j = 0; j < kHeld; ++j)
                    from[j] = rounding.round<Storage>(from[j], output, first + j);
            }
        }
        Raw raw;
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            const auto bits = Storage::narrow(from[j]);
            from[j] = Storage::widen(bits);
            raw.put(j, bits);
        }
        return raw;
    }

    __device__ __forceinline__ std::uint32_t word(int j) const {
        return word_of(step, rounding.first + first + j);
    }
};

// A state's list in a chunk: the S-th one of a rule.
template <int S>
struct State {
    using Moment = std::conditional_t<S == 0, FirstMoment, SecondMoment>;
    using Code = std::conditional_t<S == 0, std::int8_t, std::uint8_t>;

    Elements elements;
    float* scales;  // nullptr: they are no codes
    DType dtype;

    // The scale of a group, in the thread that leads it.
    __device__ __forceinline__ float scale(const Span& span) const {
        return scales != nullptr && span.leads_group() ? scales[span.first / kGroup] : 0;
    }

    __device__ __forceinline__ void decode(const Raw& raw, float scale, float (&to)[kHeld]) const {
        if (scales == nullptr) return widen(raw, dtype, to);
        scale = __shfl_sync(kWholeWarp, scale, 0, kThreadsAGroup);
#pragma unroll
        for (int j = 0; j < kHeld; ++j)
            to[j] = Moment::decode(static_cast<float>(raw.get<Code>(j)), scale);
    }

    // The values become what they are when they are read again.
    __device__ __forceinline__ void write(const Span& span, const Results& results,
                                          float (&values)[kHeld]) const {
        if (scales != nullptr) return quantize(span, results, values);
        by_float_dtype(dtype, [&](auto storage) {
            if constexpr (std::is_same_v<decltype(storage), BFloat16>) {
                if (!results.stochastic) {
#pragma unroll
                    for (int j = 0; j < kHeld; ++j)
                        values[j] = round_by_steps(values[j], results.word(j));
                }
            }
            elements.store(results.narrow<decltype(storage)>(values, Output(S + 1)), span);
        });
    }

 private:
    __device__ __forceinline__ void quantize(const Span& span, const Results& results,
                                             float (&values)[kHeld]) const {
        // Missing elements started from zeros: they exceed none of the others, and are finite where
        // those are.
        float magnitudes[kHeld];
        std::uint32_t largest = 0;
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            magnitudes[j] = Moment::magnitude(values[j]);
            largest = max(largest, same_bits<std::uint32_t>(magnitudes[j]) & 0x7fffffffu);
        }
#pragma unroll
        for (int lane = 1; lane < kThreadsAGroup; lane *= 2)
            largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, lane));
        const Moment moment(largest);
        if (span.leads_group()) scales[span.first / kGroup] = moment.scale;
        Raw raw;
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            const float q = moment.encode(values[j], magnitudes[j], results.word(j));
            raw.put(j, static_cast<Code>(q));
            values[j] = Moment::decode(q, moment.scale);
        }
        elements.store(raw, span);
    }
};

// The lists of a chunk that are there whatever the rule.
struct Params {
    Elements x, from, c;  // `from` is b where there are backups
    State<0> g;
    DType correction;

    // Calls call(master, correction).
    template <class Storage, class Call>
    __device__ __forceinline__ void by_correction(const Call& call) const {
        if (correction == DType::i8)
            call(Master<Storage::kDType, 8>{}, std::int8_t{});
        else
            call(Master<Storage::kDType, 16>{}, std::int16_t{});
    }

    template <class Storage>
    __device__ __forceinline__ void decode(const Raw& params, const Raw& corrections,
                                           float (&x)[kHeld]) const {
        using Bits = typename Storage::Bits;
        if constexpr (sizeof(Bits) == 2) {
            if (c.p != nullptr)
                return by_correction<Storage>([&](auto master, auto whole) {
#pragma unroll
                    for (int j = 0; j < kHeld; ++j)
                        x[j] = master.template join<float>(
                            std::uint32_t{params.get<Bits>(j)},
                            static_cast<std::uint32_t>(corrections.get<decltype(whole)>(j)));
                });
        }
#pragma unroll
        for (int j = 0; j < kHeld; ++j) x[j] = Storage::widen(params.get<Bits>(j));
    }

    template <class Storage>
    __device__ __forceinline__ void write(const Span& span, const Results& results,
                                          float (&values)[kHeld]) const {
        using Bits = typename Storage::Bits;
        if constexpr (sizeof(Bits) == 2) {
            if (c.p != nullptr)
                return by_correction<Storage>([&](auto master, auto whole) {
                    Raw params, corrections;
#pragma unroll
                    for (int j = 0; j < kHeld; ++j) {
                        std::uint32_t param, rest;
                        master.split(values[j], param, rest);
                        params.put(j, static_cast<Bits>(param));
                        corrections.put(j, static_cast<decltype(whole)>(rest));
                    }
                    x.store(params, span);
                    c.store(corrections, span);
                });
        }
        x.store(results.narrow<Storage>(values, Output::x), span);
    }
};

// The chunk of a block, with the states S. Roles: x, b, c, and g and each state, the last of them
// with their scales. Gradients that may be momenta have scales, and go without states.
template <class Storage, bool IsMomentum, int... S>
struct Compressed : Params, State<S>... {
    static constexpr int kStates = sizeof...(S);
    static constexpr int kRoles = 4 + IsMomentum + 2 * kStates;
    static constexpr int kBytes = sizeof(typename Storage::Bits);

    Cut cut;
    bool aligned = true;  // a thread may move its elements of every list by one access

    template <class Pieces>
    __device__ __forceinline__ Compressed(const Pieces& batch, const Types& types)
        : cut(batch, kChunkBytes / kBytes) {
        static_assert(Pieces::kRoles == kRoles);
        x = elements(batch, 0, kBytes);
        from = elements(batch, 1, kBytes);
        if (from.p == nullptr) from = x;
        c = elements(batch, 2, size_of(types.correction));
        correction = types.correction;
        set<3, IsMomentum>(batch, types.other, g);
        (set<4 + 2 * S, true>(batch, types.state, static_cast<State<S>&>(*this)), ...);
    }

    // Calls body(span) for all elements of a thread; its warp stays together.
    template <class Body>
    __device__ __forceinline__ void each(const Body& body) const {
#pragma unroll 1
        for (int start = 0; start < cut.count; start += kThreads * kHeld)
            body(span_of(start, cut.count, aligned));
    }

    // x <- b
    __device__ __forceinline__ void restore() const {
        if (from.p == x.p) return;  // not needed for the result
        each([&](const Span& span) { x.store(from.load(span), span); });
    }

    // x <- rule(from, gradients, states...); the rule changes the states too.
    template <class Rule>
    __device__ __forceinline__ void update(const Rule& rule) const {
        each([&](const Span& span) {
            Raw params, grads, corrections, states[kStates + 1];
            const auto load = [&](auto wide) {
                params = from.load<wide>(span);
                grads = g.elements.load<wide>(span);
                ((states[S] = State<S>::elements.template load<wide>(span)), ...);
                if (c.p != nullptr) corrections = c.load<wide>(span);
            };
            if (span.wide)  // not needed for the result: wide accesses
                load(std::true_type{});
            else
                load(std::false_type{});
            [[maybe_unused]] const float scales[] = {State<S>::scale(span)..., 0};
            float x[kHeld], g[kHeld], before[kStates + 1][kHeld], after[kStates + 1][kHeld];
            Params::decode<Storage>(params, corrections, x);
            Params::g.decode(grads, Params::g.scale(span), g);
            (State<S>::decode(states[S], scales[S], before[S]), ...);
#pragma unroll
            for (int j = 0; j < kHeld; ++j) {
                [[maybe_unused]] float state[] = {before[S][j]..., 0};
                x[j] = rule(x[j], g[j], state[S]...);
                ((after[S][j] = state[S]), ...);
            }
            const Results results{Stochastic(rule.seed, cut.place), rule.stochastic, rule.step,
                                  static_cast<std::uint32_t>(span.first)};
            if constexpr (kStates > 0) {
                (State<S>::write(span, results, after[S]), ...);
#pragma unroll
                for (int j = 0; j < kHeld; ++j) {
                    const float old[] = {before[S][j]...}, stored[] = {after[S][j]...};
                    x[j] = rule.finish(x[j], old, stored);
                }
            }
            Params::write<Storage>(span, results, x);
        });
    }

 private:
    template <class Pieces>
    __device__ __forceinline__ Elements elements(const Pieces& batch, int role, int size) {
        auto* const whole = static_cast<char*>(batch.pointers[role][cut.piece]);
        char* const p =
            whole != nullptr ? whole + static_cast<std::int64_t>(cut.first) * size : nullptr;
        aligned &= (reinterpret_cast<std::uintptr_t>(p) & (kHeld * size - 1)) == 0;  // a power of 2
        return {p, size};
    }

    // A list, and the scales that may be the next role.
    template <int Role, bool MayHaveScales, class Pieces, int K>
    __device__ __forceinline__ void set(const Pieces& batch, DType dtype, State<K>& state) {
        state.elements = elements(batch, Role, size_of(dtype));
        state.dtype = dtype;
        state.scales = nullptr;
        if constexpr (MayHaveScales) {
            auto* const scales = static_cast<float*>(batch.pointers[Role + 1][cut.piece]);
            if (scales != nullptr) state.scales = scales + cut.first / kGroup;
        }
    }
};

template <class Storage, bool IsMomentum, int... S>
Compressed<Storage, IsMomentum, S...> compressed_of(std::integer_sequence<int, S...>);

// Two states and their divisions take more than 64 registers.
template <class Storage, bool IsMomentum, int States, class Pieces, class Deferred>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm - (States > 1))
    compressed_kernel(const __grid_constant__ Pieces batch, const __grid_constant__ Deferred rule,
                      Types types, const float* found_inf) {
    using Numbers = std::make_integer_sequence<int, States>;
    using Chunk = decltype(compressed_of<Storage, IsMomentum>(Numbers{}));
    const Chunk chunk(batch, types);
    if (is_set(found_inf))
        chunk.restore();
    else
        chunk.update(rule.get());
}

template <class Scalars>
constexpr bool kMayBeMomentum = kListsWith<Scalars, kMomenta> > 0;

template <template <class> class Of>
void compressed_update(const Tensors& t, const Of<Scalar>& s, const float* found_inf, int device,
                       Stream stream) {
    using Scalars = Of<Scalar>;
    const DeviceGuard guard(device);
    const auto types_of = [&](std::size_t i) {
        return Types{t.dtype, t.gradient(i), t.state, t.correction};
    };
    const Role fifth =
        kMayBeMomentum<Scalars> ? Role{t.g_scales, nullptr} : Role{t.m, &Types::state};
    const Role roles[] = {{t.x, &Types::storage},
                          {t.b, &Types::storage},
                          {t.c, &Types::correction},
                          {t.g, &Types::other},
                          fifth,
                          {t.m_scales, nullptr},
                          {t.v, &Types::state},
                          {t.v_scales, nullptr}};
    const DeferredRule<Compressing<typename CompressedRule<Scalars>::Type>, Scalars> rule(s);
    static_assert(sizeof rule + sizeof(Types) + sizeof found_inf <= kOtherArgumentBytes);
    by_flag<true, kMayBeAbsent<Scalars, &Tensors::m>>(t.m != nullptr, [&](auto has_m) {
        constexpr int kStates = has_m ? kListsWith<Scalars, kState> : 0;
        static_assert(!kMayBeMomentum<Scalars> || kStates == 0);
        const auto launch = [&](const auto& batch, int blocks, const Types& types) {
            const auto run = [&](auto storage) {
                compressed_kernel<decltype(storage), kMayBeMomentum<Scalars>, kStates>
                    <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch, rule, types,
                                                                                 found_inf);
            };
            if (types.storage == DType::f32)
                run(Native<float>{});
            else
                by_narrow_dtype(types.storage, run);
            check(cudaGetLastError(), "launching an update");
        };
        for_each_batch<4 + kMayBeMomentum<Scalars> + 2 * kStates>(t, roles, types_of, launch);
    });
}

}  // namespace
}  // namespace eigenfilter::cuda
