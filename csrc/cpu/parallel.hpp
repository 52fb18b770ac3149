// One parallel region over all tensors of a call, work split by bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <numeric>
#include <vector>

namespace eigenfilter::cpu {

constexpr std::int64_t kBytesAThread = 4 << 20;  // less takes no longer than waking a thread

// Whether this process was forked from one with threads. The pool of OpenMP's threads was copied
// then without the threads, and waiting for them would never end.
bool is_serial();

// How many threads share some work: as many as it has use for, of those that are allowed; in a
// serial process one.
int workers_for(std::int64_t bytes, int threads);

// Calls body(tensor, first, count) on ranges that cover every element once; a range never spans two
// tensors and starts at a multiple of `grain` elements of its tensor.
template <class Body>
void for_each_range(const std::int64_t* numel, std::size_t n, std::int64_t bytes_an_element,
                    std::int64_t grain, int threads, Body body) {
    const std::int64_t total = std::accumulate(numel, numel + n, std::int64_t{0});
    const int workers = workers_for(total * bytes_an_element, threads);
    if (workers == 1) {
        for (std::size_t i = 0; i < n; ++i) {
            if (numel[i] > 0) body(i, std::int64_t{0}, numel[i]);
        }
        return;
    }
    struct Mark {
        std::size_t tensor;
        std::int64_t offset;
    };
    std::vector<Mark> marks(workers + 1, Mark{n, 0});
    std::int64_t before = 0;
    int next = 0;
    for (std::size_t i = 0; i < n && next < workers; ++i) {
        while (next < workers && total * next / workers < before + numel[i]) {
            const std::int64_t offset = total * next / workers - before;
            marks[next++] = {i, offset / grain * grain};
        }
        before += numel[i];
    }
#pragma omp parallel num_threads(workers)
    {
#pragma omp for schedule(static, 1)
        for (int worker = 0; worker < workers; ++worker) {
            const Mark from = marks[worker], to = marks[worker + 1];
            for (std::size_t i = from.tensor; i < n && i <= to.tensor; ++i) {
                const std::int64_t first = i == from.tensor ? from.offset : 0;
                const std::int64_t last = i == to.tensor ? to.offset : numel[i];
                if (first < last) body(i, first, last - first);
            }
        }
    }
}

}  // namespace eigenfilter::cpu
