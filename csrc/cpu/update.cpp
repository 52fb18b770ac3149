// ascend and descend on the CPU.
#include <unistd.h>

#include <cstring>

#include "loops.hpp"
#include "parallel.hpp"

namespace eigenfilter::cpu {
namespace {

constexpr std::int64_t kGrain = 64;

char* at(void* p, std::int64_t element, int size) { return static_cast<char*>(p) + element * size; }

// Past the caches pays once a call touches more than the last level of them holds.
bool exceeds_cache(const Tensors& t, int lists) {
    static const std::int64_t cache = [] {
#ifdef _SC_LEVEL3_CACHE_SIZE
        const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
        if (size > 0) return static_cast<std::int64_t>(size);
#endif
        return std::int64_t{32} << 20;
    }();
    const std::int64_t total = std::accumulate(t.numel, t.numel + t.n, std::int64_t{0});
    return total * size_of(t.dtype) * lists > cache;
}

void copy(const Tensors& t, void* const* to, void* const* from, int threads) {
    const int size = size_of(t.dtype);
    for_each_range(t.numel, t.n, 2 * size, kGrain, threads,
                   [=](std::size_t i, std::int64_t first, std::int64_t count) {
                       std::memcpy(at(to[i], first, size), at(from[i], first, size), count * size);
                   });
}

}  // namespace

void ascend(const Tensors& t, const AscendScalars<double>& s, const float* found_inf, int threads) {
    if (found_inf != nullptr && *found_inf != 0) return copy(t, t.b, t.x, threads);
    const Loops& table = loops();
    const int size = size_of(t.dtype);
    const bool stream = exceeds_cache(t, 3);
    for_each_range(t.numel, t.n, 3 * size, kGrain, threads,
                   [&, size, stream](std::size_t i, std::int64_t first, std::int64_t count) {
                       table.ascend(t.dtype, s, at(t.x[i], first, size), at(t.g[i], first, size),
                                    at(t.b[i], first, size), count, stream);
                   });
}

void descend(const Tensors& t, const DescendScalars<double>& s, const float* found_inf,
             int threads) {
    if (found_inf != nullptr && *found_inf != 0) {
        if (t.b != nullptr) copy(t, t.x, t.b, threads);
        return;
    }
    const Loops& table = loops();
    const int size = size_of(t.dtype);
    const int lists = 2 + (t.m != nullptr) + (t.b != nullptr);
    const bool stream = exceeds_cache(t, lists);
    for_each_range(t.numel, t.n, lists * size, kGrain, threads,
                   [&, size, stream](std::size_t i, std::int64_t first, std::int64_t count) {
                       table.descend(t.dtype, s, at(t.x[i], first, size), at(t.g[i], first, size),
                                     t.m != nullptr ? at(t.m[i], first, size) : nullptr,
                                     t.b != nullptr ? at(t.b[i], first, size) : nullptr, count,
                                     stream);
                   });
}

}  // namespace eigenfilter::cpu
