// orthogonalize on the CPU: sweeps over blocks of columns, the last of one pass and the first of
// the next in one.
#include <algorithm>
#include <cmath>
#include <vector>

#include "loops.hpp"
#include "parallel.hpp"

namespace eigenfilter::cpu {

void orthogonalize(const Projection& p, int threads) {
    const Loops& table = loops();
    const std::int64_t blocks = (p.columns + kColumns - 1) / kColumns;
    const std::int64_t bytes =
        (p.passes + 1) * p.columns *
        (p.rows * size_of(p.basis_dtype) + p.count * size_of(p.vector_dtype));
    const int workers = workers_for(bytes, threads);
    const std::int64_t dots = p.count * p.rows;
    std::vector<double> sums(blocks * dots), squares(blocks * p.count);
    std::vector<double> pass(dots);
    std::fill(p.coefficients, p.coefficients + dots, 0.0);

    // Each block's sums lie apart and are added in the blocks' order, whatever the threads.
    const auto sweep = [&](bool subtracts, bool multiplies) {
#pragma omp parallel for num_threads(workers) schedule(static)
        for (std::int64_t block = 0; block < blocks; ++block) {
            const std::int64_t first = block * kColumns;
            const std::int64_t n = std::min<std::int64_t>(kColumns, p.columns - first);
            const char* q = static_cast<const char*>(p.basis) + first * size_of(p.basis_dtype);
            for (std::int64_t v = 0; v < p.count; ++v) {
                char* w = static_cast<char*>(p.vectors) +
                          (v * p.columns + first) * size_of(p.vector_dtype);
                if (subtracts)
                    squares[block * p.count + v] =
                        table.subtract(p.basis_dtype, p.vector_dtype, q, p.columns, p.rows,
                                       pass.data() + v * p.rows, w, n);
                if (multiplies)
                    table.dots(p.basis_dtype, p.vector_dtype, q, p.columns, p.rows, w, n,
                               sums.data() + block * dots + v * p.rows);
            }
        }
    };
    sweep(false, true);
    for (int i = 1; i <= p.passes; ++i) {
        std::fill(pass.begin(), pass.end(), 0.0);
        for (std::int64_t block = 0; block < blocks; ++block) {
            for (std::int64_t j = 0; j < dots; ++j) pass[j] += sums[block * dots + j];
        }
        for (std::int64_t j = 0; j < dots; ++j) p.coefficients[j] += pass[j];
        sweep(true, i < p.passes);
    }
    for (std::int64_t v = 0; v < p.count; ++v) {
        double sum = 0;
        for (std::int64_t block = 0; block < blocks; ++block) sum += squares[block * p.count + v];
        p.norms[v] = std::sqrt(sum);
    }
}

}  // namespace eigenfilter::cpu
