// Says in which thread of a kernel it was that the process ends.
#include <csignal>
#include <cstdio>

#include "device_memory.hpp"
#include "emulator.hpp"

extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

namespace emulator {
namespace {

struct sigaction before;

void report(int, siginfo_t* fault, void*) {
    if (device_memory::has(fault->si_addr) && !on_device())
        std::fprintf(stderr, "emulator: the host touched device memory at %p\n", fault->si_addr);
    else if (on_device())
        std::fprintf(stderr, "emulator: an access outside device memory, at %p\n", fault->si_addr);
    describe_position();
    sigaction(SIGSEGV, &before, nullptr);  // which is next: the access is tried again
}

[[maybe_unused]] const bool installed = [] {
    if (__sanitizer_set_death_callback != nullptr)
        __sanitizer_set_death_callback(&describe_position);
    struct sigaction action = {};
    action.sa_sigaction = &report;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    return sigaction(SIGSEGV, &action, &before) == 0;
}();

}  // namespace
}  // namespace emulator
