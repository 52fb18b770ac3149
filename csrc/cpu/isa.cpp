// Chooses the instruction set at run time.
#include "isa.hpp"

#include <atomic>
#include <cstring>

namespace eigenfilter::cpu {

int available(const Loops** tables) {
    int count = 0;
    tables[count++] = &loops_baseline;
#ifdef EIGENFILTER_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
        tables[count++] = &loops_avx2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            tables[count++] = &loops_avx512;
        }
    }
#endif
    return count;
}

static std::atomic<const Loops*>& chosen() {
    static std::atomic<const Loops*> table{[] {
        const Loops* tables[3];
        return tables[available(tables) - 1];
    }()};
    return table;
}

const Loops& loops() { return *chosen().load(std::memory_order_relaxed); }

bool set_isa(const char* name) {
    const Loops* tables[3];
    for (int i = available(tables) - 1; i >= 0; --i) {
        if (std::strcmp(tables[i]->isa, name) == 0) {
            chosen().store(tables[i], std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

}  // namespace eigenfilter::cpu
