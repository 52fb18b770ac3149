// Kernels over the vectors of Lanczos' iterations on the CPU. The sums of blocks of columns lie
// apart and are added in the blocks' order, whatever the threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.hpp"
#include "parallel.hpp"

namespace eigenfilter::cpu {
namespace {

std::int64_t blocks_of(std::int64_t columns, std::int64_t block) {
    return (columns + block - 1) / block;
}

// Calls body(row, first, n, out[2]) for blocks of columns of every row; r.sums are those of `out`.
template <class Body>
void sum_rows(const Recurrence& r, int accesses, int threads, Body body) {
    const std::int64_t blocks = blocks_of(r.columns, kColumns);
    std::vector<double> sums(2 * r.rows * blocks);
    const int workers = workers_for(accesses * r.rows * r.columns * size_of(r.dtype), threads);
#pragma omp parallel for num_threads(workers) schedule(static)
    for (std::int64_t i = 0; i < r.rows * blocks; ++i) {
        const std::int64_t first = i % blocks * kColumns;
        body(i / blocks, first, std::min(kColumns, r.columns - first), sums.data() + 2 * i);
    }
    for (std::int64_t row = 0; row < r.rows; ++row) {
        double total[2] = {};
        for (std::int64_t i = row * blocks; i < (row + 1) * blocks; ++i) {
            total[0] += sums[2 * i];
            total[1] += sums[2 * i + 1];
        }
        r.sums[row] = total[0];
        r.sums[r.rows + row] = total[1];
    }
}

// Calls body(block, first, last) for blocks of columns of all rows together.
template <class Body>
void for_each_block(const Rows& v, std::int64_t size, int accesses, int threads, Body body) {
    const std::int64_t blocks = blocks_of(v.columns, size);
    const int workers = workers_for(accesses * v.rows * v.columns * size_of(v.dtype), threads);
#pragma omp parallel for num_threads(workers) schedule(static)
    for (std::int64_t block = 0; block < blocks; ++block)
        body(block, block * size, std::min((block + 1) * size, v.columns));
}

}  // namespace

// Sweeps over blocks of columns, the last of one pass and the first of the next in one.
void orthogonalize(const Orthogonalization& p, int threads) {
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

void row_dots(const Recurrence& r, int threads) {
    const Loops& table = loops();
    const auto* q = static_cast<const char*>(r.q);
    const auto* w = static_cast<const char*>(r.w);
    sum_rows(r, 2, threads, [&](std::int64_t row, std::int64_t first, std::int64_t n, double* out) {
        const std::int64_t at = (row * r.columns + first) * size_of(r.dtype);
        table.row_dots(r.dtype, q + at, w + at, n, out);
    });
}

void lanczos_step(const Recurrence& r, int threads) {
    const Loops& table = loops();
    auto* u = static_cast<char*>(r.u);
    const auto* q = static_cast<const char*>(r.q);
    const auto* w = static_cast<const char*>(r.w);
    sum_rows(r, 4, threads, [&](std::int64_t row, std::int64_t first, std::int64_t n, double* out) {
        const std::int64_t at = (row * r.columns + first) * size_of(r.dtype);
        const LanczosStep rule(r.factors, r.rows, row);
        table.lanczos_step(r.dtype, rule, u + at, q + at, w + at, n, out);
    });
}

void gram(const Rows& v, int threads) {
    double* const out = v.matrix;
    const Loops& table = loops();
    constexpr std::int64_t size = 16 * kMixed;
    const std::int64_t products = v.rows * v.rows;
    std::vector<double> sums(products * blocks_of(v.columns, size));
    const auto* rows = static_cast<const char*>(v.vectors);
    for_each_block(
        v, size, 1, threads, [&](std::int64_t block, std::int64_t first, std::int64_t last) {
            for (; first < last; first += kMixed)
                table.gram(v.dtype, rows + first * size_of(v.dtype), v.columns, v.rows,
                           std::min(kMixed, last - first), sums.data() + block * products);
        });
    std::fill(out, out + products, 0.0);
    for (std::size_t i = 0; i < sums.size(); ++i) out[i % products] += sums[i];
    for (std::int64_t i = 0; i < v.rows; ++i) {
        for (std::int64_t j = 0; j < i; ++j) out[j * v.rows + i] = out[i * v.rows + j];
    }
}

void mix_rows(const Rows& v, int threads) {
    const Loops& table = loops();
    auto* rows = static_cast<char*>(v.vectors);
    for_each_block(v, kMixed, 2, threads, [&](std::int64_t, std::int64_t first, std::int64_t last) {
        table.mix_rows(v.dtype, v.matrix, rows + first * size_of(v.dtype), v.columns, v.rows,
                       last - first);
    });
}

}  // namespace eigenfilter::cpu
