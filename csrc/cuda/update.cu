// Ascents and descents on the GPU: one kernel, and a Step that says which lists an update has.
#include <type_traits>
#include <utility>

#include "eigenfilter/rounding.hpp"
#include "multi_tensor.cuh"
#include "scalars.cuh"

namespace eigenfilter::cuda {
namespace {

bool __device__ __forceinline__ is_set(const float* flag) { return flag != nullptr && *flag != 0; }

// What an update does with b: x is kept there first, also where found_inf is set; x starts from it;
// x starts from it, and is put back to it where found_inf is set.
enum class Backup { none, kept, origin, restored };

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
template <class Storage, int Inputs, int States, Backup B, bool IsSeeded>
struct Step {
    using Real = typename Storage::Arithmetic;
    static constexpr Backup kBackup = B;
    static constexpr int kRoles = 1 + Inputs + (B != Backup::none);
    static constexpr int kLast = kRoles - 1;
    static constexpr int kFrom = B == Backup::origin || B == Backup::restored ? kLast : 0;
    // Three inputs and a division fill the registers, and so do random bits: then floats have fewer
    // loads in flight, and doubles, whose rule alone takes 18, fewer blocks.
    static constexpr bool kFull = Inputs > 2 || IsSeeded;
    static constexpr int kInFlight = kFull && sizeof(Real) == 4 ? 1 : 2;
    static constexpr int kBlocks = kFull && sizeof(Real) == 8 ? 2 : kBlocksAnSm - IsSeeded;

    template <class Rule>
    static __device__ __forceinline__ auto rounding(const Rule& rule, const Place& place) {
        if constexpr (IsSeeded)
            return Stochastic(rule.seed, place);
        else
            return Nearest{};
    }

    template <class Group>
    struct Body {
        Group from, inputs[Inputs];

        template <class Pointers>
        __device__ __forceinline__ void read(const Pointers& p, int i) {
            from = Group::load(p[kFrom] + i);
#pragma unroll
            for (int k = 0; k < Inputs; ++k) inputs[k] = Group::load(p[1 + k] + i);
        }

        template <class Pointers, class Writer>
        __device__ __forceinline__ void write(const Pointers& p, int i, const Writer& writer) {
            if constexpr (B == Backup::kept) from.store(p[kLast] + i);
#pragma unroll
            for (int j = 0; j < Group::kSize; ++j)
                move(writer, i, j, std::make_integer_sequence<int, Inputs>{});
#pragma unroll
            for (int k = Inputs - States; k < Inputs; ++k) inputs[k].store(p[1 + k] + i);
            from.store(p[0] + i);
        }

     private:
        template <class Writer, int... K>
        __device__ __forceinline__ void move(const Writer& writer, int i, int j,
                                             std::integer_sequence<int, K...>) {
            const auto rounded = [&](Real v, Output output) {
                return Storage::narrow(
                    writer.rounding.template round<Storage>(v, output, std::uint32_t(i + j)));
            };
            Real wide[] = {Storage::widen(inputs[K].v[j])...};
            from.v[j] = rounded(writer.rule(Storage::widen(from.v[j]), wide[K]...), Output::x);
#pragma unroll
            for (int k = Inputs - States; k < Inputs; ++k)
                inputs[k].v[j] = rounded(wide[k], Output(k + 1 - (Inputs - States)));
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

template <class Storage, class Step, class Deferred>
__global__ void __launch_bounds__(kThreads, Step::kBlocks)
    update_kernel(const __grid_constant__ Batch<Step::kRoles> batch,
                  const __grid_constant__ Deferred rule, const float* found_inf) {
    const Chunk<Storage, Step::kRoles> chunk(batch);
    if (!is_set(found_inf)) {
        const auto known = rule.get();
        chunk.template each<Step::template Body, Step::kInFlight>(
            Writer{known, Step::rounding(known, chunk.place)});
    } else if constexpr (Step::kBackup == Backup::kept)
        chunk.template each<Copying<Step::kLast, 0>::template Body>(0);
    else if constexpr (Step::kBackup == Backup::restored)
        chunk.template each<Copying<0, Step::kLast>::template Body>(0);
}

template <template <class> class Rule, int Inputs, int States, Backup B, bool IsSeeded = false,
          class Scalars>
void update(const Tensors& t, const Scalars& s, const float* found_inf, int device, Stream stream) {
    const DeviceGuard guard(device);
    const auto run = [&](auto storage) {
        using Storage = decltype(storage);
        using Kind = Step<Storage, Inputs, States, B, IsSeeded>;
        using Plain = Rule<typename Storage::Arithmetic>;
        const DeferredRule<std::conditional_t<IsSeeded, Seeded<Plain>, Plain>, Scalars> rule(s);
        static_assert(sizeof rule + sizeof found_inf <= kOtherArgumentBytes);
        for_each_batch<Kind::kRoles>(t, [&](const auto& batch, int blocks) {
            update_kernel<Storage, Kind>
                <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch, rule,
                                                                             found_inf);
            check(cudaGetLastError(), "launching an update");
        });
    };
    if constexpr (IsSeeded)
        by_narrow_dtype(t.dtype, run);
    else
        by_dtype(t.dtype, run);
}

// Calls `call` with the flag as a constant.
template <class Call>
void by_flag(bool flag, Call call) {
    if (flag)
        call(std::true_type{});
    else
        call(std::false_type{});
}

}  // namespace

bool compiled() { return true; }

void require() {}

void ascend(const Tensors& t, const AscendScalars<Scalar>& s, const float* found_inf, int device,
            Stream stream) {
    update<Ascend, 1, 0, Backup::kept>(t, s, found_inf, device, stream);
}

void ascend_again(const Tensors& t, const AscendScalars<Scalar>& s, const float* found_inf,
                  int device, Stream stream) {
    by_flag(t.b != nullptr, [&](auto has_b) {
        constexpr Backup b = has_b ? Backup::origin : Backup::none;
        update<Ascend, 1, 0, b>(t, s, found_inf, device, stream);
    });
}

void ascend_hvp(const Tensors& t, const HvpScalars<Scalar>& s, const float* found_inf, int device,
                Stream stream) {
    update<AscendHvp, 2, 0, Backup::origin>(t, s, found_inf, device, stream);
}

void descend(const Tensors& t, const DescendScalars<Scalar>& s, const float* found_inf, int device,
             Stream stream) {
    by_flag(t.m != nullptr, [&](auto has_m) {
        by_flag(t.b != nullptr, [&](auto has_b) {
            by_flag(s.stochastic, [&](auto seeded) {
                constexpr Backup b = has_b ? Backup::restored : Backup::none;
                update<Descend, 1 + has_m, has_m, b, seeded>(t, s, found_inf, device, stream);
            });
        });
    });
}

void descend_adamw(const Tensors& t, const AdamWScalars<Scalar>& s, const float* found_inf,
                   int device, Stream stream) {
    by_flag(t.b != nullptr, [&](auto has_b) {
        by_flag(s.stochastic, [&](auto seeded) {
            constexpr Backup b = has_b ? Backup::restored : Backup::none;
            update<DescendAdamW, 3, 2, b, seeded>(t, s, found_inf, device, stream);
        });
    });
}

}  // namespace eigenfilter::cuda
