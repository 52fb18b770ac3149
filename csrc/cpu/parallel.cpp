#include "parallel.hpp"

#include <pthread.h>
#include <sys/stat.h>

namespace eigenfilter::cpu {
namespace {

bool forks_threads = false;       // whether the process had other threads when it last forked
bool is_fork_of_threads = false;  // whether this process was forked from one that had

// The kernel counts a process's threads as directories; where it cannot be asked there may be some.
bool has_threads() {
    struct stat tasks{};
    return stat("/proc/self/task", &tasks) != 0 || tasks.st_nlink != 3;
}

const bool watched = [] {
    pthread_atfork([] { forks_threads = has_threads(); }, nullptr,
                   [] { is_fork_of_threads |= forks_threads; });
    return true;
}();

}  // namespace

bool is_serial() { return is_fork_of_threads; }

int workers_for(std::int64_t bytes, int threads) {
    if (is_fork_of_threads) return 1;
    return static_cast<int>(
        std::clamp<std::int64_t>(bytes / kBytesAThread, 1, std::max(threads, 1)));
}

}  // namespace eigenfilter::cpu
