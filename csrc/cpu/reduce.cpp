// norm and the non-finite flag on the CPU.
#include <atomic>
#include <cfloat>
#include <cmath>

#include "isa.hpp"
#include "parallel.hpp"

namespace eigenfilter::cpu {

// Elements whose squares are summed before the sum is put down: the order of summation is fixed by
// the sizes, whatever the number of threads.
constexpr std::int64_t kChunk = 16 * 1024;

namespace {

// Calls body(i, first, n) for the chunks of all tensors.
template <class Body>
void for_each_chunk(const Tensors& t, int threads, Body body) {
    for_each_range(t.numel, t.n, size_of(t.dtype), kChunk, threads,
                   [&](std::size_t i, std::int64_t first, std::int64_t count) {
                       for (const std::int64_t end = first + count; first < end; first += kChunk)
                           body(i, first, std::min(kChunk, end - first));
                   });
}

// Where a chunk of a list's i-th tensor begins, or nullptr where the list is absent.
const void* at(void* const* list, std::size_t i, std::int64_t first, DType dtype) {
    return list != nullptr ? static_cast<const char*>(list[i]) + first * size_of(dtype) : nullptr;
}

// A sum of squares from here on has lost nothing that counts to squares below the normal numbers.
constexpr double kLeastSum = 0x1p-700;

// The norm where squares of float64 elements are beyond what float64 holds: that of all elements
// divided by the power of two of the largest, times it. Of other tensors the sums are exact enough.
double scaled_norm(const Tensors& t, const std::vector<std::int64_t>& chunks_before,
                   const std::vector<double>& sums) {
    const auto each = [&](const auto& take) {
        for (std::size_t i = 0; i < t.n; ++i) {
            if (t.gradient(i) != DType::f64) {
                for (std::int64_t c = chunks_before[i]; c < chunks_before[i + 1]; ++c)
                    take(std::sqrt(sums[c]));
                continue;
            }
            const auto* x = static_cast<const double*>(t.x[i]);
            const void* w = t.g != nullptr ? t.g[i] : nullptr;
            for (std::int64_t j = 0; j < t.numel[i]; ++j) {
                take(w == nullptr            ? x[j]
                     : t.dtype == DType::f64 ? x[j] * static_cast<const double*>(w)[j]
                                             : x[j] * static_cast<const float*>(w)[j]);
            }
        }
    };
    double largest = 0;
    each([&](double value) { largest = std::max(largest, std::abs(value)); });
    if (largest == 0 || !std::isfinite(largest)) return largest;
    int exponent = 0;
    std::frexp(largest, &exponent);
    double sum = 0, lost = 0;  // by rounding: one sum of all elements is a long one
    each([&](double value) {
        const double scaled = std::ldexp(value, -exponent);
        const double term = scaled * scaled - lost, next = sum + term;
        lost = (next - sum) - term;
        sum = next;
    });
    return std::ldexp(std::sqrt(sum), exponent);
}

double norm_of(const Tensors& t, int threads) {
    const Loops& table = loops();
    std::vector<std::int64_t> chunks_before(t.n + 1, 0);
    for (std::size_t i = 0; i < t.n; ++i)
        chunks_before[i + 1] = chunks_before[i] + (t.numel[i] + kChunk - 1) / kChunk;
    std::vector<double> sums(chunks_before[t.n], 0.0);
    for_each_chunk(t, threads, [&](std::size_t i, std::int64_t first, std::int64_t n) {
        const DType dtype = t.gradient(i);
        double& sum = sums[chunks_before[i] + first / kChunk];
        if (t.g_scales != nullptr) {
            const auto* const scales = static_cast<const float*>(t.g_scales[i]) + first / kGroup;
            sum = table.sum_squares_of_codes(static_cast<const std::int8_t*>(t.x[i]) + first,
                                             scales, n);
            return;
        }
        const DTypes dtypes{t.g != nullptr ? t.dtype : dtype, dtype};
        sum =
            table.sum_squares(dtypes, at(t.x, i, first, dtype), at(t.g, i, first, dtypes.param), n);
    });
    const double sum = std::accumulate(sums.begin(), sums.end(), 0.0);
    if (sum < kLeastSum || sum > DBL_MAX) return scaled_norm(t, chunks_before, sums);
    return std::sqrt(sum);
}

}  // namespace

void norm(const Tensors& t, const Reduction& r, int threads) {
    const double value = norm_of(t, threads) * (1 / r.grad_scale.value);
    if (r.out_is_double)
        *static_cast<double*>(r.out) = value;
    else
        *static_cast<float*>(r.out) = static_cast<float>(value);
}

void flag_nonfinite(const Tensors& t, float* found_inf, int threads) {
    const Loops& table = loops();
    std::atomic<bool> nonfinite{false};
    for_each_chunk(t, threads, [&](std::size_t i, std::int64_t first, std::int64_t n) {
        const DType dtype = t.gradient(i);
        if (!nonfinite.load(std::memory_order_relaxed) &&
            table.has_nonfinite(dtype, at(t.x, i, first, dtype), n))
            nonfinite.store(true, std::memory_order_relaxed);
    });
    if (nonfinite.load()) *found_inf = 1;
}

}  // namespace eigenfilter::cpu
