// What the sanitizers are told: which fiber runs, and what orders the threads of a kernel.
//
// The thread sanitizer knows no order but this one: a barrier orders the threads of a block, a
// launch comes after what the host did before it, and the host goes on after all of a launch.
// Blocks are not ordered, although one runs after the other.
#pragma once

#include <cstddef>

#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator::sanitizers {

struct Fiber {
    void* stack = nullptr;
    std::size_t stack_bytes = 0;
    void* fake_stack = nullptr;  // of the address sanitizer
    void* thread = nullptr;      // of the thread sanitizer
};

struct Host {
    const void* stack = nullptr;
    std::size_t stack_bytes = 0;
    void* fake_stack = nullptr;
    void* thread = nullptr;
    void* janitor = nullptr;  // a fiber that comes after all blocks, and before none
};

// Addresses that stand for what orders threads.
inline void* barrier(int number) {
    static char both[2];  // a thread may reach the next one before another has left this one
    return &both[number % 2];
}
inline void* allocations() {
    static char address;
    return &address;
}
inline void* block_end() {
    static char address;
    return &address;
}
inline void* launch_end() {
    static char address;
    return &address;
}

// Whether the thread sanitizer watches.
#ifdef EMULATOR_TSAN
constexpr bool kThreads = true;
#else
constexpr bool kThreads = false;
#endif

#ifdef EMULATOR_TSAN
inline void release(void* address) { __tsan_release(address); }
inline void acquire(void* address) { __tsan_acquire(address); }
inline void switch_to(void* thread) {
    __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
}
#else
inline void release(void*) {}
inline void acquire(void*) {}
inline void switch_to(void*) {}
#endif

// A block begins, and ends: its threads are new to the thread sanitizer.
inline void begin([[maybe_unused]] Fiber& fiber) {
#ifdef EMULATOR_TSAN
    fiber.thread = __tsan_create_fiber(0);
#endif
}
inline void end([[maybe_unused]] Fiber& fiber) {
#ifdef EMULATOR_TSAN
    __tsan_destroy_fiber(fiber.thread);
#endif
}

// The host is about to give a fiber control.
inline void to_fiber(Host& host, const Fiber& fiber) {
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&host.fake_stack, fiber.stack, fiber.stack_bytes);
#endif
#ifdef EMULATOR_TSAN
    host.thread = __tsan_get_current_fiber();
#endif
    static_cast<void>(host);
    switch_to(fiber.thread);
}
// The fiber has control; or the host has it again.
inline void arrived([[maybe_unused]] const Fiber& fiber, [[maybe_unused]] Host& host) {
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &host.stack, &host.stack_bytes);
#endif
}
inline void returned([[maybe_unused]] Host& host) {
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(host.fake_stack, nullptr, nullptr);
#endif
}
// A fiber is about to give the host control.
inline void to_host([[maybe_unused]] Fiber& fiber, Host& host) {
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&fiber.fake_stack, host.stack, host.stack_bytes);
#endif
    switch_to(host.thread);
}

// What a fiber does in its life is the host's doing: memory that is made is every thread's.
class OnTheHost {
 public:
    OnTheHost(Host& host, Fiber& fiber) : fiber_(fiber) { switch_to(host.thread); }
    ~OnTheHost() {
        release(allocations());
        switch_to(fiber_.thread);
    }
    OnTheHost(const OnTheHost&) = delete;
    OnTheHost& operator=(const OnTheHost&) = delete;

 private:
    Fiber& fiber_;
};

// What the host does in its life comes after the block: memory that is freed is nobody's.
class AfterTheBlock {
 public:
    explicit AfterTheBlock([[maybe_unused]] Host& host) : host_(host) {
#ifdef EMULATOR_TSAN
        host.thread = __tsan_get_current_fiber();
        if (host.janitor == nullptr) host.janitor = __tsan_create_fiber(0);
#endif
        switch_to(host.janitor);
        acquire(block_end());
    }
    ~AfterTheBlock() { switch_to(host_.thread); }
    AfterTheBlock(const AfterTheBlock&) = delete;
    AfterTheBlock& operator=(const AfterTheBlock&) = delete;

 private:
    Host& host_;
};

// Whether memory may be used.
inline void forbid([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#ifdef EMULATOR_ASAN
    __asan_poison_memory_region(memory, bytes);
#endif
}
inline void allow([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(memory, bytes);
#endif
}

}  // namespace emulator::sanitizers
