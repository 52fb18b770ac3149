// Every update on the GPU: one kernel, and a Step that says which lists an update has. There is a
// source for each rule that includes this, so that their forms compile side by side.
#pragma once

#include <type_traits>
#include <utility>

#include "compressed.cuh"
#include "core/rounding.hpp"
#include "multi_tensor.cuh"
#include "scalars.cuh"

namespace eigenfilter::cuda {
namespace {

// A rule whose results are rounded stochastically.
template <class Rule>
struct Seeded : Rule {
    std::uint32_t seed;
    template <class Scalars>
    EIGENFILTER_RULE explicit Seeded(const Scalars& s)
        : Rule(s), seed(static_cast<std::uint32_t>(s.rounding_seed)) {}
};

// What a body needs to write the results of a chunk.
template <class Rule, class Rounding>
struct Writer {
    Rule rule;
    Rounding rounding;
};
template <class Rule, class Rounding>
Writer(Rule, Rounding) -> Writer<Rule, Rounding>;

// x <- rule(from, inputs...). The inputs: first gradients, then States that the rule changes too.
// Roles: x, the inputs, and last b where there is one.
template <class Storage, class Gradient, int Inputs, int States, Backup B, bool IsSeeded,
          bool IsAhead>
struct Step {
    using Real = typename Storage::Arithmetic;
    static constexpr bool kWide = !std::is_same_v<Storage, Gradient>;
    // The longest kernels have no second form for few tensors: they are two fifths of all code.
    static constexpr bool kForFew = !IsSeeded && !IsAhead && !kWide;
    static constexpr Backup kBackup = B;
    static constexpr int kRoles = 1 + Inputs + (B != Backup::none);
    static constexpr int kGradients = Inputs - States;
    using Lists = Chunk<Storage, kRoles, Gradient, kGradients>;
    static constexpr int kLast = kRoles - 1;
    static constexpr int kFrom = B == Backup::origin || B == Backup::restored ? kLast : 0;
    // Three inputs and a division fill the registers, and so do random bits: then floats have fewer
    // loads in flight, and doubles, whose rule alone takes 18, fewer blocks. Wide gradients fill
    // them too, and so does an extrapolation that divides again.
    static constexpr bool kFull = Inputs > 2 || IsSeeded || IsAhead || kWide;
    static constexpr int kInFlight = kFull && sizeof(Real) == 4 ? 1 : 2;
    // Conversions from and to float16 fill them where x, g and m are all read, and those of
    // bfloat16 where an extrapolation starts from backups.
    static constexpr bool kConverts =
        !IsSeeded &&
        ((std::is_same_v<Storage, Float16> && States == 1 && B == Backup::none) ||
         (std::is_same_v<Storage, BFloat16> && IsAhead && B != Backup::none && !kWide));
    static constexpr int kFewer = IsSeeded + IsAhead + (kWide && Inputs > 2) + kConverts;
    static constexpr int kBlocks = kFull && sizeof(Real) == 8 ? 2 : kBlocksAnSm - kFewer;

    template <class Rule>
    static __device__ __forceinline__ auto rounding(const Rule& rule, const Place& place) {
        if constexpr (IsSeeded)
            return Stochastic(rule.seed, place);
        else
            return Nearest{};
    }

    template <class Group>
    struct Body {
        using Gradients = typename Group::template Of<Gradient>;
        Group from, states[States > 0 ? States : 1];
        Gradients grads[kGradients];

        template <class Pointers>
        __device__ __forceinline__ void read(const Pointers& p, int i) {
            from = Group::load(p[kFrom] + i);
#pragma unroll
            for (int k = 0; k < kGradients; ++k) grads[k] = load_other<Gradients>(p[1 + k], i);
#pragma unroll
            for (int k = 0; k < States; ++k) states[k] = Group::load(p[kStates + k] + i);
        }

        template <class Pointers, class Writer>
        __device__ __forceinline__ void write(const Pointers& p, int i, const Writer& writer) {
            if constexpr (B == Backup::saved) from.store(p[kLast] + i);
#pragma unroll
            for (int j = 0; j < Group::kSize; ++j)
                update_element(writer, i, j, std::make_integer_sequence<int, kGradients>{},
                               std::make_integer_sequence<int, States>{});
#pragma unroll
            for (int k = 0; k < States; ++k) states[k].store(p[kStates + k] + i);
            from.store(p[0] + i);
        }

     private:
        static constexpr int kStates = 1 + kGradients;  // the first one's role

        template <class Writer, int... G, int... S>
        __device__ __forceinline__ void update_element(const Writer& writer, int i, int j,
                                                       std::integer_sequence<int, G...>,
                                                       std::integer_sequence<int, S...>) {
            const auto rounded = [&](Real v, Output output) {
                return Storage::narrow(
                    writer.rounding.template round<Storage>(v, output, std::uint32_t(i + j)));
            };
            [[maybe_unused]] Real wide[] = {Storage::widen(states[S].v[j])..., Real{}};
            Real x = writer.rule(Storage::widen(from.v[j]), Real{Gradient::widen(grads[G].v[j])}...,
                                 wide[S]...);
            if constexpr (States > 0) {
                const typename Storage::Bits stored[] = {rounded(wide[S], Output(S + 1))...};
                const Real before[] = {Storage::widen(states[S].v[j])...};
                const Real after[] = {Storage::widen(stored[S])...};
                x = writer.rule.finish(x, before, after);
                ((states[S].v[j] = stored[S]), ...);
            }
            from.v[j] = rounded(x, Output::x);
        }
    };
};

// p[To] <- p[From]: what is left of an update that found_inf stops.
template <int To, int From>
struct Copying {
    template <class Group>
    struct Body {
        Group x;
        template <class Pointers>
        __device__ __forceinline__ void read(const Pointers& p, int i) {
            x = Group::load(p[From] + i);
        }
        template <class Pointers>
        __device__ __forceinline__ void write(const Pointers& p, int i, int) {
            x.store(p[To] + i);
        }
    };
};

template <class Storage, class Step, class Pieces, class Deferred>
__global__ void __launch_bounds__(kThreads, Step::kBlocks)
    update_kernel(const __grid_constant__ Pieces batch, const __grid_constant__ Deferred rule,
                  const float* found_inf) {
    const typename Step::Lists chunk(batch);
    if (!is_set(found_inf)) {
        const auto ready = rule.get();
        chunk.template each<Step::template Body, Step::kInFlight>(
            Writer{ready, Step::rounding(ready, chunk.place)});
    } else if constexpr (Step::kBackup == Backup::saved)
        chunk.template each<Copying<Step::kLast, 0>::template Body>(0);
    else if constexpr (Step::kBackup == Backup::restored)
        chunk.template each<Copying<0, Step::kLast>::template Body>(0);
}

// Calls call(storage, gradient storage) for the types of a batch.
template <bool AreNarrow, bool MayBeWide, class Call>
void by_types(Types types, Call call) {
    const auto alike = [&](auto storage) { call(storage, storage); };
    if constexpr (MayBeWide) {
        if (types.other != types.storage) {
            if constexpr (AreNarrow)
                by_narrow_dtype(types.storage,
                                [&](auto storage) { call(storage, Native<float>{}); });
            else
                by_wide_gradient(types.storage, call);
            return;
        }
    }
    if constexpr (AreNarrow)
        by_narrow_dtype(types.storage, alike);
    else
        by_dtype(types.storage, alike);
}

template <template <class> class Rule, int Inputs, int States, Backup B, bool IsSeeded = false,
          bool IsAhead = false, class Scalars>
void update(const Tensors& t, const Scalars& s, const float* found_inf, int device, Stream stream) {
    const DeviceGuard guard(device);
    const auto types_of = [&](std::size_t i) { return Types{t.dtype, t.gradient(i)}; };
    const auto launch = [&](const auto& batch, int blocks, Types types) {
        const auto run = [&](auto storage, auto gradient) {
            using Storage = decltype(storage);
            using Kind = Step<Storage, decltype(gradient), Inputs, States, B, IsSeeded, IsAhead>;
            using Plain = Rule<typename Storage::Arithmetic>;
            const DeferredRule<std::conditional_t<IsSeeded, Seeded<Plain>, Plain>, Scalars> rule(s);
            static_assert(sizeof rule + sizeof found_inf <= kOtherArgumentBytes);
            const auto queue = static_cast<cudaStream_t>(stream);
            const auto call = [&](const auto& pieces) {
                update_kernel<Storage, Kind>
                    <<<blocks, kThreads, 0, queue>>>(pieces, rule, found_inf);
            };
            if constexpr (Kind::kForFew)
                by_count(batch, call);
            else
                call(batch);
            check(cudaGetLastError(), "launching an update");
        };
        by_types<IsSeeded, B != Backup::none>(types, run);
    };
    for_each_batch<1 + Inputs + (B != Backup::none)>(t, types_of, launch);
}

// Wide gradients are read where a step starts from backups, which are then the parameters: as many
// kernels need not be compiled.
Tensors from_backups(Tensors t) {
    // To ask for wide ones is not needed for the result: without backups there is less to read.
    if (t.b == nullptr && t.wide != nullptr) t.b = t.x;
    return t;
}

template <class Scalars>
bool is_stochastic(const Scalars& s) {
    if constexpr (kMayRound<Scalars>)
        return s.stochastic;
    else
        return false;
}

// An update in the form of its call. Of each form that the update has, a kernel is compiled.
template <template <class> class Of>
void update_of(const Tensors& lists, const Of<Scalar>& s, const float* found_inf, int device,
               Stream stream) {
    using Scalars = Of<Scalar>;
    if constexpr (kMayBeCompressed<Scalars>) {
        if (lists.is_compressed())
            return compressed_update<Of>(lists, s, found_inf, device, stream);
    }
    constexpr int kGrads = kListsWith<Scalars, kGradients>, kStates = kListsWith<Scalars, kState>;
    if constexpr (kListsWith<Scalars, kSaved> != 0) {
        if (s.save)
            return update<Scalars::template Rule, kGrads + kStates, kStates, Backup::saved>(
                lists, s, found_inf, device, stream);
    }
    const Tensors t = from_backups(lists);
    by_flag<true, kMayBeAbsent<Scalars, &Tensors::b>>(t.b != nullptr, [&](auto has_b) {
        by_flag<true, kMayBeAbsent<Scalars, &Tensors::m>>(t.m != nullptr, [&](auto has_m) {
            by_flag<kMayRound<Scalars>, true>(is_stochastic(s), [&](auto is_seeded) {
                constexpr Backup b = has_b ? Scalars::kBackup : Backup::none;
                constexpr int states = has_m ? kStates : 0;
                if constexpr (kHasAhead<Scalars>) {
                    const Scalar& e = s.extrapolation;
                    // Its rule takes 0, too: this is not needed for the result, but for speed.
                    if (e.device != nullptr || e.value != 0)
                        return update<Scalars::template Ahead, kGrads + states, states, b,
                                      is_seeded, true>(t, s, found_inf, device, stream);
                }
                update<Scalars::template Rule, kGrads + states, states, b, is_seeded>(
                    t, s, found_inf, device, stream);
            });
        });
    });
}

}  // namespace

// The entry point of an update.
#define EIGENFILTER_CUDA_UPDATE(name, Scalars)                                                \
    void name(const Tensors& t, const Scalars<Scalar>& s, const float* found_inf, int device, \
              Stream stream) {                                                                \
        update_of(t, s, found_inf, device, stream);                                           \
    }

}  // namespace eigenfilter::cuda
