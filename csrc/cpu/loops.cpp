// The inner loops, compiled once for each instruction set (EIGENFILTER_ISA names it).
#include "loops.hpp"

#include "eigenfilter/rules.hpp"
#include "simd.hpp"

namespace eigenfilter::cpu {
namespace {

template <class Storage>
constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(typename Storage::Arithmetic));

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

template <class Storage>
void ascend(const AscendScalars<double>& s, typename Storage::Bits* x,
            const typename Storage::Bits* g, typename Storage::Bits* b, std::int64_t n,
            bool stream) {
    constexpr int L = kLanes<Storage>;
    const Ascend<typename Storage::Arithmetic> rule(s);
    walk<Storage>(n, stream ? b : nullptr, [=](auto io, std::int64_t i) {
        const auto saved = io.read(x + i);
        const auto gradient = Storage::template widen<L>(io.read(g + i));
        io.write_only(b + i, saved);
        io.write(x + i,
                 Storage::template narrow<L>(rule(Storage::template widen<L>(saved), gradient)));
    });
}

template <class Storage>
void descend(const DescendScalars<double>& s, typename Storage::Bits* x,
             const typename Storage::Bits* g, typename Storage::Bits* m,
             const typename Storage::Bits* b, std::int64_t n, bool stream) {
    constexpr int L = kLanes<Storage>;
    const Descend<typename Storage::Arithmetic> rule(s);
    const auto* from = b != nullptr ? b : x;
    const auto* streamed = stream && b != nullptr ? x : nullptr;
    if (m == nullptr) {
        walk<Storage>(n, streamed, [=](auto io, std::int64_t i) {
            const auto origin = Storage::template widen<L>(io.read(from + i));
            const auto gradient = Storage::template widen<L>(io.read(g + i));
            io.write_only(x + i, Storage::template narrow<L>(rule(origin, gradient)));
        });
    } else {
        walk<Storage>(n, streamed, [=](auto io, std::int64_t i) {
            const auto origin = Storage::template widen<L>(io.read(from + i));
            const auto gradient = Storage::template widen<L>(io.read(g + i));
            auto momentum = Storage::template widen<L>(io.read(m + i));
            const auto moved = rule(origin, gradient, momentum);
            io.write(m + i, Storage::template narrow<L>(momentum));
            io.write_only(x + i, Storage::template narrow<L>(moved));
        });
    }
}

// Element j of a block of 16 is added to sum j % 16, in every instruction set; then pairwise.
template <class Storage>
double sum_squares(const typename Storage::Bits* t, std::int64_t n) {
    constexpr int kSums = 16;
    constexpr int L = kRegisterBytes / static_cast<int>(sizeof(double));
    Vec<double, L> sums[kSums / L] = {};
    const auto add = [&](auto io, const typename Storage::Bits* p, int part) {
        const auto value =
            __builtin_convertvector(Storage::template widen<L>(io.read(p)), Vec<double, L>);
        sums[part] += value * value;
    };
    std::int64_t i = 0;
    for (; i + kSums <= n; i += kSums) {
        for (int part = 0; part < kSums / L; ++part)
            add(Whole<Storage, L>{}, t + i + part * L, part);
    }
    for (int part = 0; i < n; i += L, ++part)
        add(Partial<Storage, L>{n - i < L ? n - i : L}, t + i, part);
    double flat[kSums];
    std::memcpy(flat, sums, sizeof flat);
    for (int width = kSums / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) flat[j] += flat[j + width];
    }
    return flat[0];
}

// x - x is NaN for inf and NaN, 0 for every other x.
template <class Storage>
bool has_nonfinite(const typename Storage::Bits* t, std::int64_t n) {
    constexpr int L = kLanes<Storage>;
    Vec<typename Storage::Arithmetic, L> traces{};
    walk<Storage>(n, nullptr, [&](auto io, std::int64_t i) {
        const auto value = Storage::template widen<L>(io.read(t + i));
        traces += value - value;
    });
    for (int lane = 0; lane < L; ++lane) {
        if (traces[lane] != traces[lane]) return true;
    }
    return false;
}

template <class Call>
EIGENFILTER_INLINE auto by_dtype(DType dtype, Call call) {
    switch (dtype) {
        case DType::f32: return call(Native<float>{});
        case DType::f64: return call(Native<double>{});
        case DType::bf16: return call(BFloat16{});
        case DType::f16: break;
    }
    return call(Float16{});
}

template <class Storage>
auto* bits(Storage, void* p) {
    return static_cast<typename Storage::Bits*>(p);
}
template <class Storage>
auto* bits(Storage, const void* p) {
    return static_cast<const typename Storage::Bits*>(p);
}

void ascend_any(DType dtype, const AscendScalars<double>& s, void* x, const void* g, void* b,
                std::int64_t n, bool stream) {
    by_dtype(dtype, [&](auto t) {
        ascend<decltype(t)>(s, bits(t, x), bits(t, g), bits(t, b), n, stream);
    });
}

void descend_any(DType dtype, const DescendScalars<double>& s, void* x, const void* g, void* m,
                 const void* b, std::int64_t n, bool stream) {
    by_dtype(dtype, [&](auto t) {
        descend<decltype(t)>(s, bits(t, x), bits(t, g), bits(t, m), bits(t, b), n, stream);
    });
}

double sum_squares_any(DType dtype, const void* p, std::int64_t n) {
    return by_dtype(dtype, [&](auto t) { return sum_squares<decltype(t)>(bits(t, p), n); });
}

bool has_nonfinite_any(DType dtype, const void* p, std::int64_t n) {
    return by_dtype(dtype, [&](auto t) { return has_nonfinite<decltype(t)>(bits(t, p), n); });
}

}  // namespace

#define EIGENFILTER_STRING(name) #name
#define EIGENFILTER_NAME(name) EIGENFILTER_STRING(name)
#define EIGENFILTER_JOIN(left, right) left##right
#define EIGENFILTER_TABLE(name) EIGENFILTER_JOIN(loops_, name)

extern const Loops EIGENFILTER_TABLE(EIGENFILTER_ISA) = {
    EIGENFILTER_NAME(EIGENFILTER_ISA), ascend_any, descend_any, sum_squares_any, has_nonfinite_any,
};

}  // namespace eigenfilter::cpu
