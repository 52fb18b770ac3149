// Tiles of columns, one a block of threads, whose sums lie apart and are added in one order.
#pragma once

#include "block_sum.cuh"
#include "multi_tensor.cuh"

namespace eigenfilter::cuda {

constexpr int kTile = 2048;  // columns

inline std::int64_t tiles_of(std::int64_t columns) { return (columns + kTile - 1) / kTile; }

// The columns of block blockIdx.x.
struct Tile {
    std::int64_t first;
    int columns;

    __device__ __forceinline__ explicit Tile(std::int64_t of)
        : first(static_cast<std::int64_t>(blockIdx.x) * kTile),
          columns(static_cast<int>(min(static_cast<std::int64_t>(kTile), of - first))) {}
};

// The sum of the tiles' sums, which lie one after the other; thread 0 has it.
__device__ __forceinline__ double sum_of_tiles(const double* sums, std::int64_t tiles) {
    double sum = 0;
    for (std::int64_t t = threadIdx.x; t < tiles; t += kThreads) sum += sums[t];
    return block_sum<kThreads>(sum);
}

// Whether every row of vectors at these addresses starts where 16-byte accesses are allowed, and
// ends with one.
template <class Storage, class... Pointers>
bool rows_are_aligned(std::int64_t columns, Pointers... p) {
    const bool starts = ((reinterpret_cast<std::uintptr_t>(p) % kAccessBytes == 0) && ...);
    return starts && columns % Pack<Storage>::kSize == 0;
}

}  // namespace eigenfilter::cuda
