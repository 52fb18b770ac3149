// In the place of the emulator: launches that cost what they cost the host, and run nothing.
//
// A launch takes its arguments by value, as the kernel's host function does, and copies them into a
// buffer, as a driver has to. What the driver does beyond that is left out. No kernel is called,
// and so none is compiled.
#pragma once

#include <cstddef>
#include <cstdint>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

struct At {
    const char* file;
    int line;
};

// What kernels name, which nobody calls.
struct Index {
    unsigned x, y, z;
};
extern Index thread_index, block_index, grid_size;
constexpr bool on_device() { return false; }
void synchronize(At at);
int lane();
template <class T>
T shuffle(unsigned mask, T value, int from, At at);
void* shared_memory(const void* key, std::size_t bytes, std::size_t alignment);

// Counts a launch, and copies arguments into the buffer of the driver that is not there.
void begin_launch(dim3 grid, dim3 block, std::size_t shared, void* stream);
void copy_argument(const void* argument, std::size_t bytes);

template <class Kernel>
auto configured(At, dim3 grid, dim3 block, std::size_t shared, void* stream, Kernel) {
    return [=](auto... arguments) {
        begin_launch(grid, block, shared, stream);
        (copy_argument(&arguments, sizeof arguments), ...);
    };
}

inline int take_error() { return 0; }
inline const char* text_of(int) { return "no error"; }
inline int device() { return 0; }
inline void set_device(int) {}

}  // namespace emulator
