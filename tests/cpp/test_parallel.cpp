// Work splitting: every element is in one range, whatever the tensors, the grain and the threads.
#include <doctest/doctest.h>
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "parallel.hpp"

namespace {

using eigenfilter::cpu::for_each_range;
using eigenfilter::cpu::is_serial;
using eigenfilter::cpu::kBytesAThread;
using eigenfilter::cpu::workers_for;
using Sizes = std::vector<std::int64_t>;

struct Range {
    std::size_t tensor;
    std::int64_t first, count;
    int thread;
};

struct Split {
    Sizes numel;
    std::int64_t bytes_an_element, grain;
    int threads;

    std::int64_t total() const {
        std::int64_t sum = 0;
        for (const std::int64_t n : numel) sum += n;
        return sum;
    }

    // The ranges, in the order of the elements.
    std::vector<Range> ranges() const {
        std::vector<Range> ranges;
        std::mutex lock;
        for_each_range(numel.data(), numel.size(), bytes_an_element, grain, threads,
                       [&](std::size_t tensor, std::int64_t first, std::int64_t count) {
                           const std::lock_guard guard(lock);
                           ranges.push_back({tensor, first, count, omp_get_thread_num()});
                       });
        std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
            return std::pair(a.tensor, a.first) < std::pair(b.tensor, b.first);
        });
        return ranges;
    }

    std::string text() const {
        std::string text = "sizes";
        for (const std::int64_t n : numel) text += " " + std::to_string(n);
        return text + ", " + std::to_string(bytes_an_element) + " bytes an element, grain " +
               std::to_string(grain) + ", " + std::to_string(threads) + " threads";
    }
};

struct Case {
    Split split;
    std::vector<Range> ranges;
};

// Elements of kBytesAThread are enough for as many workers as there are elements, and larger ones
// for more.
std::vector<Case> all_cases() {
    std::vector<Sizes> lists = {{},           {0},          {1},    {2},          {0, 0, 0},
                                {0, 5, 0},    {63, 64, 65}, {1000}, {1, 1, 1, 1}, {128, 0, 0, 128},
                                {200, 1, 300}};
    lists.push_back(Sizes(100, 1));
    std::mt19937 random(3);
    for (int i = 0; i < 40; ++i) {
        Sizes sizes(1 + random() % 12);
        for (auto& size : sizes) size = random() % 4 == 0 ? 0 : random() % 300;
        lists.push_back(sizes);
    }
    std::vector<Case> cases;
    for (const Sizes& sizes : lists) {
        for (const std::int64_t bytes : {std::int64_t{1}, kBytesAThread, 10 * kBytesAThread}) {
            for (const std::int64_t grain : {1, 16, 64}) {
                for (const int threads : {1, 2, 3, 7, 16}) {
                    const Split split{sizes, bytes, grain, threads};
                    cases.push_back({split, split.ranges()});
                }
            }
        }
    }
    return cases;
}

const std::vector<Case>& cases() {
    static const std::vector<Case> cases = all_cases();
    return cases;
}

}  // namespace

// The first test of this process: it needs a process without threads.
TEST_CASE("a fork of a process without threads is parallel, and one with threads is serial") {
    namespace fs = std::filesystem;
    const auto tasks = fs::directory_iterator("/proc/self/task");
    REQUIRE(std::distance(fs::begin(tasks), fs::end(tasks)) == 1);
    const auto fork_is_serial = [] {
        const pid_t child = fork();
        if (child == 0) _exit(is_serial() && workers_for(100 * kBytesAThread, 4) == 1 ? 1 : 0);
        int status = 0;
        REQUIRE(waitpid(child, &status, 0) == child);
        REQUIRE(WIFEXITED(status));
        return WEXITSTATUS(status) == 1;
    };
    CHECK(!fork_is_serial());

    std::mutex lock;
    std::condition_variable changed;
    bool may_end = false;
    std::thread other([&] {
        std::unique_lock guard(lock);
        changed.wait(guard, [&] { return may_end; });
    });
    CHECK(fork_is_serial());
    {
        const std::lock_guard guard(lock);
        may_end = true;
    }
    changed.notify_one();
    other.join();
    CHECK(!is_serial());
}

TEST_CASE("there are as many workers as have enough to do, of those that are allowed") {
    CHECK(workers_for(0, 8) == 1);
    CHECK(workers_for(2 * kBytesAThread - 1, 8) == 1);
    CHECK(workers_for(2 * kBytesAThread, 8) == 2);
    CHECK(workers_for(3 * kBytesAThread + 1, 8) == 3);
    CHECK(workers_for(100 * kBytesAThread, 8) == 8);
    CHECK(workers_for(100 * kBytesAThread, 1) == 1);
    CHECK(workers_for(100 * kBytesAThread, 0) == 1);
    CHECK(workers_for(100 * kBytesAThread, -1) == 1);
    CHECK(workers_for(std::int64_t{1} << 60, 8) == 8);
}

TEST_CASE("every element is in exactly one range, and no range is empty") {
    for (const auto& [split, ranges] : cases()) {
        INFO(split.text());
        Sizes next(split.numel.size(), 0);
        for (const Range& range : ranges) {
            REQUIRE(range.tensor < next.size());
            REQUIRE(range.first == next[range.tensor]);
            REQUIRE(range.count > 0);
            next[range.tensor] += range.count;
        }
        REQUIRE(next == split.numel);
    }
}

TEST_CASE("a range starts at a multiple of the grain") {
    for (const auto& [split, ranges] : cases()) {
        INFO(split.text());
        for (const Range& range : ranges) REQUIRE(range.first % split.grain == 0);
    }
}

TEST_CASE("the workers share the elements evenly, up to the grain") {
    int parallel_splits = 0;
    for (const auto& [split, ranges] : cases()) {
        INFO(split.text());
        const std::int64_t total = split.total();
        const int workers = workers_for(total * split.bytes_an_element, split.threads);
        std::map<int, std::int64_t> shares;
        for (const Range& range : ranges) shares[range.thread] += range.count;
        for (const auto& [thread, share] : shares) {
            REQUIRE(thread < workers);
            REQUIRE(share <= (total + workers - 1) / workers + split.grain - 1);
        }
        parallel_splits += shares.size() > 1;
    }
    CHECK(parallel_splits > 100);
}

TEST_CASE("a tensor of more elements than an int holds is split, too") {
    const std::int64_t huge = std::int64_t{5} << 32;
    const std::vector<Range> ranges = Split{{7, huge}, 4, 64, 3}.ranges();
    std::int64_t total = 0;
    for (const Range& range : ranges) {
        CHECK(range.count <= huge / 3 + 64);
        total += range.count;
    }
    CHECK(total == huge + 7);
}
