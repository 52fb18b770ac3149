// Many tensors in one launch: their addresses travel as a kernel argument, cut into chunks, one
// block a chunk.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/ops.hpp"

namespace eigenfilter::cuda {

constexpr int kThreads = 256;
constexpr int kBlocksAnSm = 4;  // leaves 64 registers a thread: no spills
constexpr int kAccessBytes = 16;
constexpr int kAccesses = 4;  // to each role by a thread in a whole chunk
constexpr int kChunkBytes = kThreads * kAccessBytes * kAccesses;

// All arguments of a kernel together may take 32,764 bytes from CUDA 12.1 on, 4,096 before.
#if CUDART_VERSION >= 12010
constexpr int kArgumentBytes = 32764;
#else
constexpr int kArgumentBytes = 4096;
#endif
constexpr int kOtherArgumentBytes = 512;

// Whatever a launch's arguments take is copied by the host, by the driver and to the device,
// however few tensors there are: few of them get a batch that fits into so much.
constexpr int kFewArgumentBytes = 4096;

// Tensors with more elements are cut into pieces of so many, which is a whole number of chunks:
// every number in a batch then fits 32 bits.
constexpr int kMostElements = 1 << 30;
static_assert(kMostElements % kChunkBytes == 0);

template <int Roles, int ArgumentBytes = kArgumentBytes>
struct Batch {
    static constexpr int kRoles = Roles;
    static constexpr int kBytesAPiece = 8 * Roles + 4 + 4;
    static constexpr int kOtherBytes = 16;  // with padding
    static constexpr int kMost = (ArgumentBytes - kOtherArgumentBytes - kOtherBytes) / kBytesAPiece;

    void* pointers[Roles][kMost];
    int numel[kMost];
    int last_chunk[kMost];  // one past the piece's last chunk, counted over the batch
    int n;
    Place place;  // of the first piece; each other is a whole tensor, the next one
};

template <int Roles>
using FewTensors = Batch<Roles, kFewArgumentBytes>;

// Calls call(batch) with the batch, or with the smaller one if that holds its pieces.
template <int Roles, class Call>
void by_count(const Batch<Roles>& batch, Call call) {
    using Few = FewTensors<Roles>;
    if (batch.n > Few::kMost) {  // always: not needed for the result, a small argument is faster
        call(batch);
        return;
    }
    Few few;
    for (int r = 0; r < Roles; ++r) std::copy_n(batch.pointers[r], batch.n, few.pointers[r]);
    std::copy_n(batch.numel, batch.n, few.numel);
    std::copy_n(batch.last_chunk, batch.n, few.last_chunk);
    few.n = batch.n;
    few.place = batch.place;
    call(few);
}

// Even an update with five lists takes three launches for 2,000 tensors.
static_assert(kArgumentBytes <= 4096 || 3 * Batch<5>::kMost >= 2000);

// Storage types, as on the CPU: Bits in memory, Arithmetic computed with.
template <class T>
struct Native {
    using Arithmetic = T;
    using Bits = T;
    static __device__ __forceinline__ T widen(T v) { return v; }
    static __device__ __forceinline__ T narrow(T v) { return v; }
};

struct BFloat16 {
    static constexpr DType kDType = DType::bf16;
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
    static constexpr DType kDType = DType::f16;
    using Arithmetic = float;
    using Bits = std::uint16_t;
    static __device__ __forceinline__ float widen(Bits v) {
        return __half2float(__ushort_as_half(v));
    }
    static __device__ __forceinline__ Bits narrow(float v) {
        return __half_as_ushort(__float2half_rn(v));
    }
};

// Floats that are computed with in double, because their gradients are doubles.
struct FloatInDouble {
    using Arithmetic = double;
    using Bits = float;
    static __device__ __forceinline__ double widen(float v) { return v; }
    static __device__ __forceinline__ float narrow(double v) { return __double2float_rn(v); }
};

template <class Call>
auto by_narrow_dtype(DType dtype, Call call) {
    return dtype == DType::bf16 ? call(BFloat16{}) : call(Float16{});
}

template <class Call>
auto by_dtype(DType dtype, Call call) {
    if (dtype == DType::f32) return call(Native<float>{});
    if (dtype == DType::f64) return call(Native<double>{});
    return by_narrow_dtype(dtype, call);
}

// Calls call(storage, gradient storage) where gradients are wider; both are of one arithmetic.
template <class Call>
auto by_wide_gradient(DType dtype, Call call) {
    if (dtype == DType::f32) return call(FloatInDouble{}, Native<double>{});
    return by_narrow_dtype(dtype, [&](auto storage) { return call(storage, Native<float>{}); });
}

// Calls `call` with the flag as a constant, which is true unless it may be false.
template <bool MayBeTrue, bool MayBeFalse, class Call>
void by_flag(bool flag, Call call) {
    if constexpr (MayBeTrue) {
        if (flag || !MayBeFalse) return call(std::true_type{});
    }
    if constexpr (MayBeFalse) call(std::false_type{});
}

// Elements of another type beside those of a Pack, moved by as few accesses as there can be.
template <class Storage, int Size>
struct Beside {
    using Bits = typename Storage::Bits;
    using Access = std::conditional_t<Size * sizeof(Bits) % kAccessBytes == 0, uint4, uint2>;
    static constexpr int kAccesses = Size * sizeof(Bits) / sizeof(Access);
    Bits v[Size];

    static __device__ __forceinline__ Beside load(const Bits* p) {
        Access raw[kAccesses];
#pragma unroll
        for (int k = 0; k < kAccesses; ++k) raw[k] = reinterpret_cast<const Access*>(p)[k];
        Beside beside;
        static_assert(sizeof raw == sizeof beside);
        __builtin_memcpy(&beside, raw, sizeof raw);
        return beside;
    }
};

// Elements in 16 bytes, moved by one access.
template <class Storage>
struct alignas(kAccessBytes) Pack {
    using Bits = typename Storage::Bits;
    static constexpr int kSize = kAccessBytes / sizeof(Bits);
    template <class Other>
    using Of = std::conditional_t<std::is_same_v<Other, Storage>, Pack, Beside<Other, kSize>>;
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

// One element, with Pack's interface.
template <class Storage>
struct Element {
    using Bits = typename Storage::Bits;
    static constexpr int kSize = 1;
    template <class Other>
    using Of = Element<Other>;
    Bits v[1];
    static __device__ __forceinline__ Element load(const Bits* p) { return {{*p}}; }
    __device__ __forceinline__ void store(Bits* p) const { *p = v[0]; }
};

// Loads a group of another type than the pointers of a chunk.
template <class Group>
__device__ __forceinline__ Group load_other(const void* p, int i) {
    return Group::load(static_cast<const typename Group::Bits*>(p) + i);
}

// Where the chunk of a block, of so many elements at most, lies in its batch.
struct Cut {
    int piece, first, count;  // the number of the piece, and elements of it
    Place place;

    template <class Pieces>
    __device__ __forceinline__ Cut(const Pieces& batch, int size) {
        const int block = static_cast<int>(blockIdx.x);
        int low = 0, high = batch.n - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (batch.last_chunk[middle] > block)
                high = middle;
            else
                low = middle + 1;
        }
        piece = low;
        first = (block - (low > 0 ? batch.last_chunk[low - 1] : 0)) * size;
        count = min(batch.numel[low] - first, size);
        place = {batch.place.tensor + low, (low > 0 ? 0 : batch.place.first) + first};
    }
};

// The chunk of a block: where it starts in its piece, and how much of it there is. The roles from 1
// to Others are of another storage type; their pointers are to be cast to it.
template <class Storage, int Roles, class Other = Storage, int Others = 0>
struct Chunk {
    using Bits = typename Storage::Bits;
    static constexpr int kSize = kChunkBytes / static_cast<int>(sizeof(Bits));

    Bits* p[Roles];
    int count;
    Place place;
    bool aligned;  // 16-byte accesses are allowed in every role

    template <class Pieces>
    __device__ __forceinline__ explicit Chunk(const Pieces& batch) {
        static_assert(Pieces::kRoles == Roles);
        const Cut cut(batch, kSize);
        count = cut.count;
        place = cut.place;
        std::uintptr_t bits = 0;
#pragma unroll
        for (int r = 0; r < Roles; ++r) {
            void* const whole = batch.pointers[r][cut.piece];
            if (r >= 1 && r <= Others)
                p[r] =
                    reinterpret_cast<Bits*>(static_cast<typename Other::Bits*>(whole) + cut.first);
            else
                p[r] = static_cast<Bits*>(whole) + cut.first;
            bits |= reinterpret_cast<std::uintptr_t>(p[r]);
        }
        aligned = bits % kAccessBytes == 0;
    }

    // Calls body.read(p, i) for InFlight packs, then body.write(p, i, rule) for the same, so that
    // all loads are under way before the first result is needed; single elements where 16 bytes are
    // not allowed or not there. A body is made for Pack and for Element.
    template <template <class> class Body, int InFlight = 2, class Rule>
    __device__ __forceinline__ void each(const Rule& rule) const {
        constexpr int kPack = Pack<Storage>::kSize;
        if (aligned && count == kSize) {  // not needed for the result: loads overlap
#pragma unroll 1
            for (int first = 0; first < kAccesses; first += InFlight) {
                Body<Pack<Storage>> body[InFlight];
#pragma unroll
                for (int a = 0; a < InFlight; ++a) body[a].read(p, at<kPack>(first + a));
#pragma unroll
                for (int a = 0; a < InFlight; ++a) body[a].write(p, at<kPack>(first + a), rule);
            }
            return;
        }
        int packed = 0;
        if (aligned) {  // not needed for the result: wide accesses
            packed = count / kPack * kPack;
            for (int i = static_cast<int>(threadIdx.x) * kPack; i < packed; i += kThreads * kPack) {
                Body<Pack<Storage>> body;
                body.read(p, i);
                body.write(p, i, rule);
            }
        }
        for (int i = packed + static_cast<int>(threadIdx.x); i < count; i += kThreads) {
            Body<Element<Storage>> body;
            body.read(p, i);
            body.write(p, i, rule);
        }
    }

 private:
    template <int Size>
    static __device__ __forceinline__ int at(int access) {
        return (access * kThreads + static_cast<int>(threadIdx.x)) * Size;
    }
};

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)  // not needed for a device that works
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes a device current, and the one before it again at the end.
class DeviceGuard {
 public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        changed_ = before_ != device;
        // Not to ask first is as good: the question is not needed for the result.
        if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);  // asking first is not needed for the result
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

// The types of a batch: of most roles, and of those between the first and the states; of states and
// corrections in a compressed form.
struct Types {
    DType storage, other, state = storage, correction = storage;
};

// A list of tensors as a role of a batch, and which type its elements have; without one they are
// the scales of groups, float32. Absent lists are nullptr.
struct Role {
    void* const* list;
    DType Types::* type;

    // The address of an element of the i-th tensor.
    void* at(std::size_t i, const Types& types, std::int64_t first) const {
        if (list == nullptr) return nullptr;
        // The offset is not needed for a tensor's first elements, which lie at its address.
        return static_cast<char*>(list[i]) +
               (type != nullptr ? first * size_of(types.*type) : groups_of(first) * sizeof(float));
    }
};

// Fills batches with all tensors and calls launch(batch, blocks, types) for each that has elements;
// types_of(i) are those of the i-th tensors.
template <int Roles, class TypesOf, class Launch>
void for_each_batch(const Tensors& t, const Role* roles, TypesOf types_of, Launch launch) {
    static_assert(sizeof(Batch<Roles>) + kOtherArgumentBytes <= kArgumentBytes);
    Types types = types_of(0);
    Batch<Roles> batch;
    batch.n = 0;
    int blocks = 0;
    const auto flush = [&] {
        if (blocks > 0) launch(batch, blocks, types);
        batch.n = 0;
        blocks = 0;
    };
    for (std::size_t i = 0; i < t.n; ++i) {
        const Types own = types_of(i);
        // That tensors share a launch is not needed for the result.
        if (own.storage != types.storage || own.other != types.other) flush();
        types = own;
        std::int64_t first = 0;
        do {
            const auto numel = std::min<std::int64_t>(t.numel[i] - first, kMostElements);
            const auto chunks = static_cast<int>(chunks_of(types.storage, numel));
            const bool full = batch.n == Batch<Roles>::kMost || chunks > INT32_MAX - blocks;
            if (full || first > 0) flush();  // to share one is not needed for the result
            if (batch.n == 0)
                batch.place = {static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(first)};
            for (int r = 0; r < Roles; ++r)
                batch.pointers[r][batch.n] = roles[r].at(i, types, first);
            batch.numel[batch.n] = static_cast<int>(numel);
            blocks += chunks;
            batch.last_chunk[batch.n++] = blocks;
            // Another round is not needed for tensors that an emulator could take through a test.
        } while ((first += kMostElements) < t.numel[i]);
    }
    flush();
}

// The same for the lists that are there, in this order.
template <int Roles, class TypesOf, class Launch>
void for_each_batch(const Tensors& t, TypesOf types_of, Launch launch) {
    const Role all[] = {{t.x, &Types::storage}, {t.g, &Types::other},   {t.g0, &Types::other},
                        {t.m, &Types::storage}, {t.v, &Types::storage}, {t.b, &Types::storage}};
    Role roles[std::size(all)];
    const auto end = std::remove_copy_if(std::begin(all), std::end(all), roles,
                                         [](const Role& role) { return role.list == nullptr; });
    if (end - roles != Roles)  // not needed for kernels that pass their lists
        throw std::invalid_argument("this kernel takes " + std::to_string(Roles) +
                                    " lists of tensors");
    for_each_batch<Roles>(t, roles, types_of, launch);
}

}  // namespace eigenfilter::cuda
