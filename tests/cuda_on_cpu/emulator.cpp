#include "emulator.hpp"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "device_memory.hpp"
#include "sanitizers.hpp"

// Called by forking.py.
extern "C" __attribute__((visibility("default"))) void choose_mutant(int number) {
    emulator::chosen_mutant = number;
}

namespace emulator {

Index thread_index, block_index, grid_size;

int chosen_mutant = -1;

namespace {

constexpr unsigned kMostThreads = 1024;
constexpr std::size_t kMostArgumentBytes = 32764;
constexpr std::size_t kMostSharedBytes = 48 << 10;  // of variables, which are not asked for
constexpr std::size_t kStackBytes = (sanitizers::kThreads ? 16 : 64) << 10;

constexpr int kInvalidConfiguration = 9;

int last_error = 0;
constexpr int kCallersDevice = 1;  // not the tensors', so that every call has to change it
int current_device = kCallersDevice;

enum class State { ready, at_barrier, at_shuffle, done };

struct Stack {
    ucontext_t context;
    jmp_buf registers;
    bool is_new = false;  // whether nothing ran on it yet
};

struct Fiber {
    Stack stack;
    State state;
    At at;               // where it waits
    std::uint64_t bits;  // what it shows the other lanes
    sanitizers::Fiber sanitized;
};

struct SharedVariable {
    std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
};

// Everything that belongs to a launch; there is one at a time.
struct Machine {
    std::vector<Fiber> fibers = std::vector<Fiber>(kMostThreads);
    Stack host;
    sanitizers::Host sanitized;
    const std::function<void()>* kernel = nullptr;
    unsigned threads = 0;  // of a block
    int running = -1;      // the thread that runs
    int barriers = 0;      // that the block has passed
    std::map<const void*, SharedVariable> shared;
    std::size_t shared_bytes = 0;
    std::mt19937 random{seed()};

    static unsigned seed() {
        const char* const seed = std::getenv("EIGENFILTER_EMULATOR_SEED");
        return seed != nullptr ? static_cast<unsigned>(std::atoi(seed)) : 1;
    }
};

Machine& machine() {
    static Machine* const made = new Machine;  // the process may end in the middle of a launch
    return *made;
}

bool same(At a, At b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// Leaves one stack for another, as swapcontext does, which also asks the kernel for the signal
// mask; the sanitizers know swapcontext alone.
void switch_stacks(Stack& from, Stack& to) {
#if defined(EMULATOR_ASAN) || defined(EMULATOR_TSAN)
    swapcontext(&from.context, &to.context);
#else
    if (_setjmp(from.registers) != 0) return;
    if (std::exchange(to.is_new, false)) setcontext(&to.context);
    _longjmp(to.registers, 1);
#endif
}

// Gives the host control, until the scheduler resumes this thread.
void wait(State state, At at) {
    Machine& m = machine();
    Fiber& self = m.fibers[m.running];
    self.state = state;
    self.at = at;
    sanitizers::to_host(self.sanitized, m.sanitized);
    switch_stacks(self.stack, m.host);
    sanitizers::arrived(self.sanitized, m.sanitized);
}

// What a fiber does: one kernel after another.
void live() {
    Machine& m = machine();
    sanitizers::arrived(m.fibers[m.running].sanitized, m.sanitized);
    for (;;) {
        (*m.kernel)();
        sanitizers::release(sanitizers::launch_end());
        sanitizers::release(sanitizers::block_end());
        wait(State::done, {"", 0});
    }
}

void resume(int thread) {
    Machine& m = machine();
    m.running = thread;
    thread_index = {static_cast<unsigned>(thread), 0, 0};
    Fiber& fiber = m.fibers[thread];
    fiber.state = State::ready;
    sanitizers::to_fiber(m.sanitized, fiber.sanitized);
    switch_stacks(m.host, fiber.stack);
    sanitizers::returned(m.sanitized);
    m.running = -1;
}

// Fails for a thread, from the host's side.
[[noreturn]] void fail_in(int thread, const char* what) {
    machine().running = thread;
    thread_index = {static_cast<unsigned>(thread), 0, 0};
    fail(what, machine().fibers[thread].at);
}

// Threads of warps whose lanes are all at one shuffle go on.
void pass_shuffles(std::vector<int>& ready) {
    Machine& m = machine();
    const int n = static_cast<int>(m.threads);
    for (int first = 0; first < n; first += kWarp) {
        const int end = std::min(n, first + kWarp);
        int waiting = -1;
        for (int i = first; i < end; ++i) {
            if (m.fibers[i].state == State::at_shuffle) waiting = i;
        }
        if (waiting < 0) continue;
        if (end - first < kWarp)
            fail_in(waiting, "a shuffle in a warp that has less than 32 lanes");
        for (int i = first; i < end; ++i) {
            const Fiber& other = m.fibers[i];
            if (other.state == State::done)
                fail_in(waiting, "a shuffle that not all lanes reach: some have left the kernel");
            if (other.state == State::at_barrier)
                fail_in(waiting, "a shuffle that not all lanes reach: some are at a barrier");
            if (!same(other.at, m.fibers[waiting].at))
                fail_in(waiting, "a shuffle that not all lanes reach: some are at another");
        }
        for (int i = first; i < end; ++i) ready.push_back(i);
    }
}

// All threads of the block go on, if they are all at one barrier.
void pass_barrier(std::vector<int>& ready) {
    Machine& m = machine();
    const int n = static_cast<int>(m.threads);
    int waiting = -1;
    for (int i = 0; i < n; ++i) {
        if (m.fibers[i].state == State::at_barrier) waiting = i;
    }
    if (waiting < 0) return;  // all are done
    for (int i = 0; i < n; ++i) {
        if (m.fibers[i].state == State::done)
            fail_in(waiting, "a barrier that not all threads reach: some have left the kernel");
        if (!same(m.fibers[i].at, m.fibers[waiting].at))
            fail_in(waiting, "a barrier that not all threads reach: some are at another");
        ready.push_back(i);
    }
    ++m.barriers;
}

// Puts a fiber at its beginning, on a stack of pages that nothing has used.
void make(int thread) {
    Fiber& fiber = machine().fibers[thread];
    void* const stack =
        mmap(fiber.sanitized.stack, kStackBytes, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (fiber.sanitized.stack ? MAP_FIXED : 0),
             -1, 0);
    if (stack == MAP_FAILED) fail("no memory for stacks", {__FILE__, __LINE__});
    fiber.sanitized.stack = stack;
    fiber.sanitized.stack_bytes = kStackBytes;
    ucontext_t& context = fiber.stack.context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    fiber.stack.is_new = true;
    makecontext(&context, &live, 0);
}

void run_block() {
    Machine& m = machine();
    const int n = static_cast<int>(m.threads);
    m.barriers = 0;
    for (int i = 0; i < n; ++i) {
        // The thread sanitizer takes a stack that is used again for memory that is shared.
        if (sanitizers::kThreads || m.fibers[i].sanitized.stack == nullptr) make(i);
        sanitizers::begin(m.fibers[i].sanitized);
    }
    std::vector<int> ready(n);
    std::iota(ready.begin(), ready.end(), 0);
    while (!ready.empty()) {
        std::shuffle(ready.begin(), ready.end(), m.random);
        for (int i : ready) resume(i);
        ready.clear();
        pass_shuffles(ready);
        if (ready.empty()) pass_barrier(ready);
    }
    {
        const sanitizers::AfterTheBlock after(m.sanitized);
        m.shared.clear();
    }
    m.shared_bytes = 0;
    for (int i = 0; i < n; ++i) sanitizers::end(m.fibers[i].sanitized);
}

}  // namespace

bool on_device() { return machine().running >= 0; }

void describe_position() {
    if (on_device())
        std::fprintf(stderr, "emulator: in block (%u, %u), thread %u\n", block_index.x,
                     block_index.y, thread_index.x);
}

void fail(const char* what, At at) {
    std::fprintf(stderr, "emulator: %s:%d: %s\n", at.file, at.line, what);
    describe_position();
    std::abort();
}

void synchronize(At at) {
    void* const barrier = sanitizers::barrier(machine().barriers);
    sanitizers::release(barrier);
    wait(State::at_barrier, at);
    sanitizers::acquire(barrier);
}

std::uint64_t shuffle(std::uint64_t bits, int from, At at) {
    Machine& m = machine();
    const int self = m.running;
    m.fibers[self].bits = bits;
    wait(State::at_shuffle, at);
    const bool within = from >= 0 && from < kWarp;
    const std::uint64_t value = within ? m.fibers[self - self % kWarp + from].bits : bits;
    wait(State::at_shuffle, at);  // all have read before one shows anything else
    return value;
}

void* shared_memory(const void* key, std::size_t bytes, std::size_t alignment) {
    Machine& m = machine();
    SharedVariable& variable = m.shared[key];
    if (variable.memory == nullptr) {
        m.shared_bytes += bytes;
        if (m.shared_bytes > kMostSharedBytes) fail("too much shared memory", {"a kernel", 0});
        const sanitizers::OnTheHost host(m.sanitized, m.fibers[m.running].sanitized);
        void* memory = nullptr;
        if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes) != 0)
            fail("no memory", {__FILE__, __LINE__});
        std::memset(memory, 0xff, bytes);  // NaN
        variable.memory.reset(memory);
    }
    sanitizers::acquire(sanitizers::allocations());
    return variable.memory.get();
}

void launch(dim3 grid, dim3 block, std::size_t shared, std::size_t argument_bytes,
            const std::function<void()>& kernel, At at) {
    Machine& m = machine();
    if (on_device()) fail("a launch from a kernel, which is not emulated", at);
    if (current_device != 0) fail("a launch on another device than the tensors'", at);
    if (shared != 0) fail("dynamic shared memory, which is not emulated", at);
    if (block.y != 1 || block.z != 1)
        fail("blocks of several dimensions, which are not emulated", at);
    if (argument_bytes > kMostArgumentBytes) fail("more arguments than a launch can have", at);
    const bool possible = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 &&
                          grid.z == 1 && block.x >= 1 && block.x <= kMostThreads;
    if (!possible) {
        last_error = kInvalidConfiguration;
        return;
    }
    m.threads = block.x;
    m.kernel = &kernel;
    grid_size = {grid.x, grid.y, 1};
    std::vector<std::uint64_t> order(std::uint64_t{grid.x} * grid.y);
    std::iota(order.begin(), order.end(), std::uint64_t{0});
    std::shuffle(order.begin(), order.end(), m.random);
    device_memory::open();
    for (const std::uint64_t b : order) {
        block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x), 0};
        run_block();
    }
    sanitizers::acquire(sanitizers::launch_end());
    device_memory::close(at);
}

int take_error() { return std::exchange(last_error, 0); }

const char* text_of(int error) {
    return error == kInvalidConfiguration ? "invalid configuration argument" : "no error";
}

int device() {
    // A call asks for it as it begins.
    if (current_device != kCallersDevice)
        fail("the call before left its device current", {"a call", 0});
    return current_device;
}
void set_device(int device) { current_device = device; }

}  // namespace emulator
