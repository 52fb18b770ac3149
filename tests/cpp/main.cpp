// Runs the tests of one instruction set, or skips them on a CPU that lacks it.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

namespace {

constexpr int kSkipped = 77;  // the exit code by which ctest knows skipped tests

bool is_available(const char* isa) {
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (std::strcmp(isa, "avx2") == 0) return has_avx2;
    if (std::strcmp(isa, "avx512") == 0) {
        return has_avx2 && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
    }
#endif
    return std::strcmp(isa, "baseline") == 0;
}

// Unlike this file, the tests are compiled for one instruction set, which may be used as soon as
// they are registered. A constructor with this priority runs before.
__attribute__((constructor(101))) void skip_what_the_cpu_lacks() {
    if (!is_available(TESTED_ISA)) {
        std::puts("skipped: this CPU lacks " TESTED_ISA);
        std::fflush(stdout);
        _exit(kSkipped);
    }
}

}  // namespace
