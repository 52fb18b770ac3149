// Every update on the CPU: which stretches of the tensors a loop is called for, and what happens
// where found_inf is set.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "isa.hpp"
#include "parallel.hpp"

namespace eigenfilter::cpu {
namespace {

constexpr std::int64_t kGrain = 64;

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
                       std::memcpy(static_cast<char*>(to[i]) + first * size,
                                   static_cast<char*>(from[i]) + first * size, count * size);
                   });
}

template <class Scalars>
void update(const Tensors& t, const Scalars& s, const float* found_inf, int threads,
            void (*loop)(const Stretch&, const Scalars&)) {
    if (found_inf != nullptr && *found_inf != 0) {
        const Backup backup = backup_of(t, s);
        if (backup == Backup::saved) copy(t, t.b, t.x, threads);
        if (backup == Backup::restored) copy(t, t.x, t.b, threads);
        return;
    }
    void* const* const all[] = {t.x, t.g, t.g0, t.m, t.v, t.b};
    const auto lists = static_cast<int>(std::size(all) - std::count(all, std::end(all), nullptr));
    const bool streams = exceeds_cache(t, lists);
    for_each_range(t.numel, t.n, lists * size_of(t.dtype), kGrain, threads,
                   [&](std::size_t i, std::int64_t first, std::int64_t count) {
                       loop({t, i, first, count, streams}, s);
                   });
}

}  // namespace

#define UPDATE(name, Scalars)                                                                    \
    void name(const Tensors& t, const Scalars<double>& s, const float* found_inf, int threads) { \
        update(t, s, found_inf, threads, loops().name);                                          \
    }
EIGENFILTER_UPDATES(UPDATE)

}  // namespace eigenfilter::cpu
