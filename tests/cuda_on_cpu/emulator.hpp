// A GPU made of fibers: launches, threads and blocks, barriers, shuffles, shared and device memory.
//
// A launch runs its blocks one after another, in an order that is shuffled. The threads of a block
// are fibers, which run in an order that is shuffled again at every barrier. Whatever a GPU would
// not survive, or would answer with numbers that differ from run to run, ends the process with the
// block, the thread and the line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

// A place in the source.
struct At {
    const char* file;
    int line;
};

struct Index {
    unsigned x, y, z;
};

// Of the thread that runs.
extern Index thread_index, block_index, grid_size;
// Whether a kernel runs, and not the host.
bool on_device();

// Writes which thread of which block runs, if one does.
void describe_position();
// Ends the process, and says where.
[[noreturn]] void fail(const char* what, At at);

// __syncthreads: waits for all threads of the block.
void synchronize(At at);

constexpr int kWarp = 32;
inline int lane() { return static_cast<int>(thread_index.x) % kWarp; }

// The bits that another lane of the warp shows, all of whose lanes take part; the own ones if there
// is no such lane.
std::uint64_t shuffle(std::uint64_t bits, int from, At at);

template <class T>
T shuffle(unsigned mask, T value, int from, At at) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t) && std::is_trivially_copyable_v<T>);
    if (mask != 0xffffffffu) fail("a shuffle of a part of the warp, which is not emulated", at);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = shuffle(bits, from, at);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The block's memory for a variable in shared memory, full of NaN when the block begins. `key`
// tells variables apart.
void* shared_memory(const void* key, std::size_t bytes, std::size_t alignment);

// Runs `kernel` in every thread of a grid, or notes an error as a launch on a GPU does.
void launch(dim3 grid, dim3 block, std::size_t shared, std::size_t argument_bytes,
            const std::function<void()>& kernel, At at);

// A kernel with its launch configuration, to be called with its arguments.
template <class Kernel>
auto configured(At at, dim3 grid, dim3 block, std::size_t shared, void* /* stream */,
                Kernel kernel) {
    return [=](auto... arguments) {
        launch(
            grid, block, shared, (sizeof(arguments) + ... + 0), [&] { kernel(arguments...); }, at);
    };
}

// Whether the process runs the change of the sources with this number: see mutants.py.
extern int chosen_mutant;
inline bool mutant(int number) { return number == chosen_mutant; }

// The error of the last launch; 0 after that.
int take_error();
const char* text_of(int error);

// The host's current device.
int device();
void set_device(int device);

// Device memory: what the host has at an address lies on the device at another, where the host can
// neither read nor write. A launch finds the host's values there, and leaves its own.

// Puts memory of the host on the device; returns where it is there. It stays until `leave` has been
// called as often as `enter`.
void* put_on_device(void* host, std::size_t bytes);
void enter();
void leave();

}  // namespace emulator
