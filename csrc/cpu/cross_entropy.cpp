// Products with the Hessian of cross-entropy on the CPU: a thread has a row at a time, in blocks of
// columns.
#include <algorithm>
#include <cfloat>
#include <cstring>
#include <vector>

#include "core/exponential.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace eigenfilter::cpu {
namespace {

// A thread's memory for one row: its exponentials, each relative to the largest logit so far, which
// is kept for each block.
struct Scratch {
    std::vector<double> exponentials, largest;

    explicit Scratch(std::int64_t columns)
        : exponentials(columns), largest((columns + kColumns - 1) / kColumns) {}
};

void multiply_row(const SoftmaxProduct& p, std::int64_t row, Scratch& scratch) {
    const Loops& table = loops();
    const std::int64_t size = size_of(p.dtype), start = row * p.columns * size;
    const char* z = static_cast<const char*>(p.logits) + start;
    char* const out = static_cast<char*>(p.out) + start;
    const char* const u = p.u != nullptr ? static_cast<const char*>(p.u) + start : out;
    char* const e = reinterpret_cast<char*>(scratch.exponentials.data());
    const double scale = p.scales[row];
    if (scale == 0) {
        std::memset(out, 0, p.columns * size);
        p.means[row] = 0;
        return;
    }
    const auto for_each_block = [&](const auto& body) {
        for (std::int64_t first = 0; first < p.columns; first += kColumns)
            body(first * size, std::min(kColumns, p.columns - first),
                 scratch.largest[first / kColumns]);
    };
    SoftmaxSums sums{p.dtype == DType::f32 ? -FLT_MAX : -DBL_MAX, 0, 0};
    for_each_block([&](std::int64_t at, std::int64_t n, double& largest) {
        table.softmax_sums(p.dtype, z + at, u + at, e + at, n, sums);
        largest = sums.largest;
    });
    const double mean = p.means[row] = sums.products / sums.total;
    for_each_block([&](std::int64_t at, std::int64_t n, double largest) {
        const double later = exponential<double, std::uint64_t>(largest - sums.largest);
        table.softmax_product(p.dtype, e + at, u + at, out + at, n, scale / sums.total * later,
                              mean);
    });
}

}  // namespace

void cross_entropy_hvp(const SoftmaxProduct& p, int threads) {
    const std::int64_t bytes = 3 * p.rows * p.columns * size_of(p.dtype);
    const auto workers =
        static_cast<int>(std::min<std::int64_t>(workers_for(bytes, threads), p.rows));
    std::vector<Scratch> scratch(workers, Scratch(p.columns));
    // Rows whose scale is 0 take no time, and often lie together: threads take turns.
#pragma omp parallel for num_threads(workers) schedule(static, 1)
    for (int worker = 0; worker < workers; ++worker) {
        for (std::int64_t row = worker; row < p.rows; row += workers)
            multiply_row(p, row, scratch[worker]);
    }
}

}  // namespace eigenfilter::cpu
