// Ascents and descents on the CPU.
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

void restore(const Tensors& t, int threads) {
    if (t.b != nullptr) copy(t, t.x, t.b, threads);
}

// A range of a tensor's elements. at(list) is where a list's range begins, nullptr for an absent
// list; grad(list) the same for a list of gradients.
struct Range {
    const Tensors& t;
    std::size_t i;
    std::int64_t first, count;
    bool stream;

    void* at(void* const* list) const { return begin(list, t.dtype); }
    void* grad(void* const* list) const { return begin(list, t.gradient(i)); }
    DTypes dtypes() const { return {t.dtype, t.gradient(i)}; }
    Place place() const {
        return {static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(first)};
    }

 private:
    void* begin(void* const* list, DType dtype) const {
        return list != nullptr ? cpu::at(list[i], first, size_of(dtype)) : nullptr;
    }
};

// Calls body(range) for ranges of all tensors.
template <class Body>
void update(const Tensors& t, int lists, int threads, Body body) {
    const bool stream = exceeds_cache(t, lists);
    for_each_range(t.numel, t.n, lists * size_of(t.dtype), kGrain, threads,
                   [&, stream](std::size_t i, std::int64_t first, std::int64_t count) {
                       body(Range{t, i, first, count, stream});
                   });
}

}  // namespace

void perturb(const Tensors& t, const PerturbScalars<double>& s, const float* found_inf,
             int threads) {
    if (found_inf != nullptr && *found_inf != 0) {
        if (s.save) copy(t, t.b, t.x, threads);
        return;
    }
    const Loops& table = loops();
    void* const* from = t.b != nullptr && !s.save ? t.b : t.x;
    update(t, 2 + (t.b != nullptr), threads, [&](const Range& r) {
        table.perturb(r.dtypes(), s, r.at(t.x), r.at(from), r.grad(t.g),
                      s.save ? r.at(t.b) : nullptr, r.count, r.stream);
    });
}

void perturb_hvp(const Tensors& t, const HvpScalars<double>& s, const float* found_inf,
                 int threads) {
    if (found_inf != nullptr && *found_inf != 0) return;
    const Loops& table = loops();
    update(t, 4, threads, [&](const Range& r) {
        table.perturb_hvp(r.dtypes(), s, r.at(t.x), r.grad(t.g), r.grad(t.g0), r.at(t.b), r.count,
                          r.stream);
    });
}

void sgd_step(const Tensors& t, const SgdScalars<double>& s, const float* found_inf, int threads) {
    if (found_inf != nullptr && *found_inf != 0) return restore(t, threads);
    const Loops& table = loops();
    const int lists = 2 + (t.m != nullptr) + (t.b != nullptr);
    update(t, lists, threads, [&](const Range& r) {
        table.sgd_step(r.dtypes(), s, r.at(t.x), r.grad(t.g), r.at(t.m), r.at(t.b), r.count,
                       r.stream, r.place());
    });
}

void adamw_step(const Tensors& t, const AdamWScalars<double>& s, const float* found_inf,
                int threads) {
    if (found_inf != nullptr && *found_inf != 0) return restore(t, threads);
    const Loops& table = loops();
    update(t, 4 + (t.b != nullptr), threads, [&](const Range& r) {
        table.adamw_step(r.dtypes(), s, r.at(t.x), r.grad(t.g), r.at(t.m), r.at(t.v), r.at(t.b),
                         r.count, r.stream, r.place());
    });
}

}  // namespace eigenfilter::cpu
