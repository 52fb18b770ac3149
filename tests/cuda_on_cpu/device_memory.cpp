#include "device_memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "sanitizers.hpp"

namespace emulator {
namespace {

// The thread sanitizer has shadow only for memory where programs usually have theirs.
#ifdef EMULATOR_TSAN
constexpr std::uintptr_t kApart = 0;
#else
constexpr std::uintptr_t kApart = std::uintptr_t{1} << 45;
#endif

// From `begin` up to `end`, addresses on the device.
struct Stretch {
    std::uintptr_t begin, end;
};

std::vector<Stretch> tensors, pages;
bool are_mapped = false;
int depth = 0;

void* memory(std::uintptr_t address) { return reinterpret_cast<void*>(address); }
void* host(const Stretch& stretch) { return memory(stretch.begin + kApart); }
std::size_t size(const Stretch& stretch) { return stretch.end - stretch.begin; }

void unmap() {
    for (const Stretch& run : pages) {
        sanitizers::allow(memory(run.begin), size(run));
        munmap(memory(run.begin), size(run));
    }
    pages.clear();
    are_mapped = false;
}

// Runs of pages that hold all tensors.
void map() {
    unmap();
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    std::sort(tensors.begin(), tensors.end(),
              [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; });
    for (const Stretch& tensor : tensors) {
        const std::uintptr_t begin = tensor.begin / page * page;
        const std::uintptr_t end = (tensor.end + page - 1) / page * page;
        if (!pages.empty() && begin <= pages.back().end)
            pages.back().end = std::max(pages.back().end, end);
        else
            pages.push_back({begin, end});
    }
    for (const Stretch& run : pages) {
        void* const there = mmap(memory(run.begin), size(run), PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (there != memory(run.begin))
            fail("no addresses are free for device memory", {__FILE__, __LINE__});
    }
    are_mapped = true;
}

// Calls between(begin, end) for the stretches of the pages that belong to no tensor.
template <class Between>
void for_each_gap(Between between) {
    auto tensor = tensors.begin();
    for (const Stretch& run : pages) {
        std::uintptr_t at = run.begin;
        for (; tensor != tensors.end() && tensor->begin < run.end; ++tensor) {
            if (tensor->begin > at) between(at, tensor->begin);
            at = std::max(at, tensor->end);
        }
        if (run.end > at) between(at, run.end);
    }
}

}  // namespace

void* put_on_device(void* host, std::size_t bytes) {
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(host) - kApart;
    if (host == nullptr) return nullptr;
    if (bytes > 0 && kApart != 0) {
        tensors.push_back({begin, begin + bytes});
        are_mapped = false;
    }
    return memory(begin);
}

void enter() { ++depth; }

void leave() {
    if (--depth > 0) return;
    tensors.clear();
    unmap();
}

namespace device_memory {

void open() {
    if (!are_mapped) map();
    for (const Stretch& run : pages) {
        mprotect(memory(run.begin), size(run), PROT_READ | PROT_WRITE);
        sanitizers::allow(memory(run.begin), size(run));
    }
    for_each_gap([](std::uintptr_t begin, std::uintptr_t end) {
        std::memset(memory(begin), 0xff, end - begin);
    });
    for (const Stretch& tensor : tensors)
        std::memcpy(memory(tensor.begin), host(tensor), size(tensor));
    for_each_gap([](std::uintptr_t begin, std::uintptr_t end) {
        sanitizers::forbid(memory(begin), end - begin);
    });
}

void close(At launch) {
    for (const Stretch& run : pages) sanitizers::allow(memory(run.begin), size(run));
    for_each_gap([&](std::uintptr_t begin, std::uintptr_t end) {
        const auto* const bytes = static_cast<const unsigned char*>(memory(begin));
        if (!std::all_of(bytes, bytes + (end - begin), [](unsigned char b) { return b == 0xff; }))
            fail("the kernel wrote beside its tensors", launch);
    });
    for (const Stretch& tensor : tensors)
        std::memcpy(host(tensor), memory(tensor.begin), size(tensor));
    for (const Stretch& run : pages) mprotect(memory(run.begin), size(run), PROT_NONE);
}

bool has(const void* address) {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    return std::any_of(pages.begin(), pages.end(),
                       [&](const Stretch& run) { return run.begin <= at && at < run.end; });
}

}  // namespace device_memory
}  // namespace emulator
