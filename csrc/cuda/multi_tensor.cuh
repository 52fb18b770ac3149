// Many tensors in one launch: their addresses travel as a kernel argument, cut into chunks, one
// block a chunk.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "eigenfilter/contract.hpp"

namespace eigenfilter::cuda {

constexpr int kThreads = 256;
constexpr int kBlocksAnSm = 4;  // leaves 64 registers a thread: no spills
constexpr int kAccessBytes = 16;
constexpr int kAccesses = 2;  // of each role that a thread keeps in flight
constexpr int kRounds = 2;
constexpr int kChunkBytes = kThreads * kAccessBytes * kAccesses * kRounds;

// All arguments of a kernel together may take 32,764 bytes from CUDA 12.1 on, 4,096 before.
#if CUDART_VERSION >= 12010
constexpr int kArgumentBytes = 32764;
#else
constexpr int kArgumentBytes = 4096;
#endif
constexpr int kOtherArgumentBytes = 512;

template <int Roles>
struct Batch {
    static constexpr int kBytesATensor = 8 * Roles + 8 + 4;
    static constexpr int kMost = (kArgumentBytes - kOtherArgumentBytes) / kBytesATensor;

    void* pointers[Roles][kMost];
    std::int64_t numel[kMost];
    int last_chunk[kMost];  // one past the tensor's last chunk, counted over the batch
    int n;
};

// Storage types, as on the CPU: Bits in memory, Arithmetic computed with.
template <class T>
struct Native {
    using Arithmetic = T;
    using Bits = T;
    static __device__ __forceinline__ T widen(T v) { return v; }
    static __device__ __forceinline__ T narrow(T v) { return v; }
};

struct BFloat16 {
    using Arithmetic = float;
    using Bits = std::uint16_t;
    static __device__ __forceinline__ float widen(Bits v) {
        return __uint_as_float(static_cast<unsigned>(v) << 16);
    }
    static __device__ __forceinline__ Bits narrow(float v) {
        return __bfloat16_as_ushort(__float2bfloat16_rn(v));
    }
};

struct Float16 {
    using Arithmetic = float;
    using Bits = std::uint16_t;
    static __device__ __forceinline__ float widen(Bits v) {
        return __half2float(__ushort_as_half(v));
    }
    static __device__ __forceinline__ Bits narrow(float v) {
        return __half_as_ushort(__float2half_rn(v));
    }
};

template <class Call>
auto by_dtype(DType dtype, Call call) {
    switch (dtype) {
        case DType::f32: return call(Native<float>{});
        case DType::f64: return call(Native<double>{});
        case DType::bf16: return call(BFloat16{});
        case DType::f16: break;
    }
    return call(Float16{});
}

// Elements in 16 bytes, moved by one access.
template <class Storage>
struct alignas(kAccessBytes) Pack {
    using Bits = typename Storage::Bits;
    static constexpr int kSize = kAccessBytes / sizeof(Bits);
    Bits v[kSize];

    static __device__ __forceinline__ Pack load(const Bits* p) {
        const uint4 raw = *reinterpret_cast<const uint4*>(p);
        Pack pack;
        __builtin_memcpy(&pack, &raw, sizeof raw);
        return pack;
    }
    __device__ __forceinline__ void store(Bits* p) const {
        uint4 raw;
        __builtin_memcpy(&raw, this, sizeof raw);
        *reinterpret_cast<uint4*>(p) = raw;
    }
};

// The chunk of a block: where it starts in its tensor, and how much of it there is.
template <class Storage, int Roles>
struct Chunk {
    using Bits = typename Storage::Bits;
    static constexpr int kSize = kChunkBytes / static_cast<int>(sizeof(Bits));

    Bits* p[Roles];
    int count;
    bool aligned;  // 16-byte accesses are allowed in every role

    __device__ __forceinline__ explicit Chunk(const Batch<Roles>& batch) {
        const int block = static_cast<int>(blockIdx.x);
        int low = 0, high = batch.n - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (batch.last_chunk[middle] > block)
                high = middle;
            else
                low = middle + 1;
        }
        const int chunk = block - (low > 0 ? batch.last_chunk[low - 1] : 0);
        const std::int64_t first = static_cast<std::int64_t>(chunk) * kSize;
        const std::int64_t rest = batch.numel[low] - first;
        count = rest < kSize ? static_cast<int>(rest) : kSize;
        std::uintptr_t bits = 0;
#pragma unroll
        for (int r = 0; r < Roles; ++r) {
            p[r] = static_cast<Bits*>(batch.pointers[r][low]) + first;
            bits |= reinterpret_cast<std::uintptr_t>(p[r]);
        }
        aligned = bits % kAccessBytes == 0;
    }

    // Calls body.read(slot, i) for kAccesses packs, then body.write(slot, i) for the same, so that
    // all loads are under way before the first result is needed; single elements where 16 bytes are
    // not allowed or not there. A body is made for Pack and for one element: see Elements.
    template <template <class> class Body, class Rule>
    __device__ __forceinline__ void each(const Rule& rule) const {
        constexpr int kPack = Pack<Storage>::kSize;
        if (aligned && count == kSize) {
#pragma unroll 1
            for (int first = 0; first < kRounds * kAccesses; first += kAccesses) {
                Body<Pack<Storage>> body[kAccesses];
#pragma unroll
                for (int a = 0; a < kAccesses; ++a) body[a].read(p, at<kPack>(first + a));
#pragma unroll
                for (int a = 0; a < kAccesses; ++a) body[a].write(p, at<kPack>(first + a), rule);
            }
            return;
        }
        int done = 0;
        if (aligned) {
            done = count / kPack * kPack;
            for (int i = static_cast<int>(threadIdx.x) * kPack; i < done; i += kThreads * kPack) {
                Body<Pack<Storage>> body;
                body.read(p, i);
                body.write(p, i, rule);
            }
        }
        for (int i = done + static_cast<int>(threadIdx.x); i < count; i += kThreads) {
            Body<Element> body;
            body.read(p, i);
            body.write(p, i, rule);
        }
    }

    // One element, with Pack's interface.
    struct Element {
        using Bits = typename Storage::Bits;
        static constexpr int kSize = 1;
        Bits v[1];
        static __device__ __forceinline__ Element load(const Bits* p) { return {{*p}}; }
        __device__ __forceinline__ void store(Bits* p) const { *p = v[0]; }
    };

 private:
    template <int Size>
    static __device__ __forceinline__ int at(int access) {
        return (access * kThreads + static_cast<int>(threadIdx.x)) * Size;
    }
};

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes a device current, and the one before it again at the end.
class DeviceGuard {
 public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        changed_ = before_ != device;
        if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
    int before_ = 0;
    bool changed_ = false;
};

inline std::int64_t chunks_of(DType dtype, std::int64_t numel) {
    const std::int64_t size = kChunkBytes / size_of(dtype);
    return (numel + size - 1) / size;
}

// Fills batches with all tensors that have elements and calls launch(batch, blocks) for each.
template <int Roles, class Launch>
void for_each_batch(const Tensors& t, void* const* const (&roles)[Roles], Launch launch) {
    Batch<Roles> batch;
    batch.n = 0;
    std::int64_t blocks = 0;
    const auto flush = [&] {
        if (batch.n > 0) launch(batch, static_cast<int>(blocks));
        batch.n = 0;
        blocks = 0;
    };
    for (std::size_t i = 0; i < t.n; ++i) {
        if (t.numel[i] == 0) continue;
        const std::int64_t chunks = chunks_of(t.dtype, t.numel[i]);
        if (chunks > INT32_MAX)
            throw std::runtime_error("a tensor is too large for one launch: split it");
        if (batch.n == Batch<Roles>::kMost || blocks + chunks > INT32_MAX) flush();
        for (int r = 0; r < Roles; ++r) batch.pointers[r][batch.n] = roles[r][i];
        batch.numel[batch.n] = t.numel[i];
        blocks += chunks;
        batch.last_chunk[batch.n++] = static_cast<int>(blocks);
    }
    flush();
}

}  // namespace eigenfilter::cuda
