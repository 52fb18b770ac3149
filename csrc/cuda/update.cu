// ascend and descend on the GPU.
#include "multi_tensor.cuh"
#include "scalars.cuh"

namespace eigenfilter::cuda {
namespace {

bool __device__ __forceinline__ is_set(const float* flag) { return flag != nullptr && *flag != 0; }

// Roles of ascend: x, g, b.
template <class Storage>
struct Ascending {
    template <class Group>
    struct Body {
        Group x, g;
        template <class Pointers>
        __device__ __forceinline__ void read(const Pointers& p, int i) {
            x = Group::load(p[0] + i);
            g = Group::load(p[1] + i);
        }
        template <class Pointers, class Rule>
        __device__ __forceinline__ void write(const Pointers& p, int i, const Rule& rule) {
            x.store(p[2] + i);
#pragma unroll
            for (int j = 0; j < Group::kSize; ++j)
                x.v[j] = Storage::narrow(rule(Storage::widen(x.v[j]), Storage::widen(g.v[j])));
            x.store(p[0] + i);
        }
    };
};

// Roles of descend: x, g, then m and b where they are.
template <class Storage, bool Momentum, bool Backup>
struct Descending {
    static constexpr int kFrom = Backup ? 2 + Momentum : 0;
    template <class Group>
    struct Body {
        Group x, g, m;
        template <class Pointers>
        __device__ __forceinline__ void read(const Pointers& p, int i) {
            x = Group::load(p[kFrom] + i);
            g = Group::load(p[1] + i);
            if constexpr (Momentum) m = Group::load(p[2] + i);
        }
        template <class Pointers, class Rule>
        __device__ __forceinline__ void write(const Pointers& p, int i, const Rule& rule) {
#pragma unroll
            for (int j = 0; j < Group::kSize; ++j) {
                const auto origin = Storage::widen(x.v[j]), gradient = Storage::widen(g.v[j]);
                if constexpr (Momentum) {
                    auto momentum = Storage::widen(m.v[j]);
                    x.v[j] = Storage::narrow(rule(origin, gradient, momentum));
                    m.v[j] = Storage::narrow(momentum);
                } else {
                    x.v[j] = Storage::narrow(rule(origin, gradient));
                }
            }
            if constexpr (Momentum) m.store(p[2] + i);
            x.store(p[0] + i);
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

template <class Storage>
using AscendRule = DeferredRule<Ascend<typename Storage::Arithmetic>, AscendScalars<Scalar>>;
template <class Storage>
using DescendRule = DeferredRule<Descend<typename Storage::Arithmetic>, DescendScalars<Scalar>>;

template <class Storage>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    ascend_kernel(const __grid_constant__ Batch<3> batch,
                  const __grid_constant__ AscendRule<Storage> rule, const float* found_inf) {
    const Chunk<Storage, 3> chunk(batch);
    if (is_set(found_inf))
        chunk.template each<Copying<2, 0>::template Body>(0);
    else
        chunk.template each<Ascending<Storage>::template Body>(rule.get());
}

template <class Storage, bool Momentum, bool Backup>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    descend_kernel(const __grid_constant__ Batch<2 + Momentum + Backup> batch,
                   const __grid_constant__ DescendRule<Storage> rule, const float* found_inf) {
    const Chunk<Storage, 2 + Momentum + Backup> chunk(batch);
    using Step = Descending<Storage, Momentum, Backup>;
    if (is_set(found_inf)) {
        if constexpr (Backup) chunk.template each<Copying<0, Step::kFrom>::template Body>(0);
    } else {
        chunk.template each<Step::template Body>(rule.get());
    }
}

template <class Storage, bool Momentum, bool Backup>
void launch_descend(const Tensors& t, const DescendScalars<Scalar>& s, const float* found_inf,
                    cudaStream_t stream) {
    static_assert(sizeof(DescendRule<Storage>) + 64 <= kOtherArgumentBytes);
    const DescendRule<Storage> rule(s);
    const auto launch = [&](const auto& batch, int blocks) {
        descend_kernel<Storage, Momentum, Backup>
            <<<blocks, kThreads, 0, stream>>>(batch, rule, found_inf);
        check(cudaGetLastError(), "launching descend");
    };
    if constexpr (Momentum && Backup)
        for_each_batch<4>(t, {t.x, t.g, t.m, t.b}, launch);
    else if constexpr (Momentum)
        for_each_batch<3>(t, {t.x, t.g, t.m}, launch);
    else if constexpr (Backup)
        for_each_batch<3>(t, {t.x, t.g, t.b}, launch);
    else
        for_each_batch<2>(t, {t.x, t.g}, launch);
}

}  // namespace

bool compiled() { return true; }

void require() {}

void ascend(const Tensors& t, const AscendScalars<Scalar>& s, const float* found_inf, int device,
            Stream stream) {
    const DeviceGuard guard(device);
    by_dtype(t.dtype, [&](auto storage) {
        using Storage = decltype(storage);
        const AscendRule<Storage> rule(s);
        for_each_batch<3>(t, {t.x, t.g, t.b}, [&](const Batch<3>& batch, int blocks) {
            ascend_kernel<Storage><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
                batch, rule, found_inf);
            check(cudaGetLastError(), "launching ascend");
        });
    });
}

void descend(const Tensors& t, const DescendScalars<Scalar>& s, const float* found_inf, int device,
             Stream stream) {
    const DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    by_dtype(t.dtype, [&](auto storage) {
        using Storage = decltype(storage);
        if (t.m != nullptr && t.b != nullptr)
            launch_descend<Storage, true, true>(t, s, found_inf, queue);
        else if (t.m != nullptr)
            launch_descend<Storage, true, false>(t, s, found_inf, queue);
        else if (t.b != nullptr)
            launch_descend<Storage, false, true>(t, s, found_inf, queue);
        else
            launch_descend<Storage, false, false>(t, s, found_inf, queue);
    });
}

}  // namespace eigenfilter::cuda
