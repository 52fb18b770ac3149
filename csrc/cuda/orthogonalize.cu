// orthogonalize on the GPU. A block of threads has a tile of columns; the sums of all tiles lie
// apart and are added in one order.
#include "tiles.cuh"

namespace eigenfilter::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// sums[v][i][tile] <- q_i . w_v over the tile's columns. A warp has a row at a time.
template <class Group, class Storage, class Vector>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    dots_kernel(Orthogonalization p, double* sums) {
    __shared__ double wide[kTile];
    const Tile tile(p.columns);
    const auto* w = static_cast<const Vector*>(p.vectors) + blockIdx.y * p.columns + tile.first;
    for (int j = threadIdx.x; j < kTile; j += kThreads) wide[j] = j < tile.columns ? w[j] : 0;
    __syncthreads();
    const int lane = threadIdx.x % kWarp;
    for (std::int64_t i = threadIdx.x / kWarp; i < p.rows; i += kWarps) {
        const auto* q =
            static_cast<const typename Storage::Bits*>(p.basis) + i * p.columns + tile.first;
        double sum = 0;
#pragma unroll 4
        for (int j = lane * Group::kSize; j < tile.columns; j += kWarp * Group::kSize) {
            const Group group = Group::load(q + j);
#pragma unroll
            for (int k = 0; k < Group::kSize; ++k)
                sum += static_cast<double>(Storage::widen(group.v[k])) * wide[j + k];
        }
#pragma unroll
        for (int width = kWarp / 2; width > 0; width /= 2)
            sum += __shfl_down_sync(0xffffffffu, sum, width);
        if (lane == 0) sums[(blockIdx.y * p.rows + i) * gridDim.x + blockIdx.x] = sum;
    }
}

// A block adds the sums of all tiles for one row and vector.
__global__ void __launch_bounds__(kThreads)
    add_tiles_kernel(const double* sums, std::int64_t tiles, double* pass, double* coefficients,
                     bool is_first) {
    const std::int64_t at = blockIdx.x;
    const double sum = sum_of_tiles(sums + at * tiles, tiles);
    if (threadIdx.x == 0) {
        pass[at] = sum;
        coefficients[at] = is_first ? sum : coefficients[at] + sum;
    }
}

constexpr int kRowsInFlight = 4;

// What a group is loaded as: its elements, taken apart, would fill a register each.
template <class Group>
struct Whole {
    std::conditional_t<sizeof(Group) == kAccessBytes, uint4, Group> raw;

    static __device__ __forceinline__ Whole load(const typename Group::Bits* p) {
        return {*reinterpret_cast<const decltype(raw)*>(p)};
    }
    __device__ __forceinline__ Group get() const {
        Group group;
        __builtin_memcpy(&group, &raw, sizeof raw);
        return group;
    }
};

// rest <- rest - c q
template <class Storage, class Group>
__device__ __forceinline__ void subtract(double (&rest)[Group::kSize], const Group& q, double c) {
#pragma unroll
    for (int k = 0; k < Group::kSize; ++k)
        rest[k] -= c * static_cast<double>(Storage::widen(q.v[k]));
}

// w_v <- w_v - sum_i c[v][i] q_i in the tile's columns, squares[v][tile] <- the sum of their
// squares. A thread has some columns and goes down the rows. Eight columns in double beside four
// loaded rows fill 80 registers.
template <class Group, class Storage, class Vector>
__global__ void __launch_bounds__(kThreads, Group::kSize == 8 ? kBlocksAnSm - 1 : kBlocksAnSm)
    subtract_kernel(Orthogonalization p, const double* c, double* squares) {
    const Tile tile(p.columns);
    auto* w = static_cast<Vector*>(p.vectors) + blockIdx.y * p.columns + tile.first;
    const double* own = c + blockIdx.y * p.rows;
    double sum = 0;
#pragma unroll 1
    for (int j = threadIdx.x * Group::kSize; j < tile.columns; j += kThreads * Group::kSize) {
        const auto* q = static_cast<const typename Storage::Bits*>(p.basis) + tile.first + j;
        double rest[Group::kSize];
#pragma unroll
        for (int k = 0; k < Group::kSize; ++k) rest[k] = w[j + k];
        // Rows are loaded so many ahead of their use: a row's registers are loaded again as soon as
        // it has been used.
        const double* factor = own;
        int rows = static_cast<int>(p.rows);
        if (rows >= kRowsInFlight) {  // not needed for the result: loads overlap
            Whole<Group> groups[kRowsInFlight];
#pragma unroll
            for (int a = 0; a < kRowsInFlight; ++a, q += p.columns)
                groups[a] = Whole<Group>::load(q);
#pragma unroll 1
            for (; rows >= 2 * kRowsInFlight; rows -= kRowsInFlight, factor += kRowsInFlight) {
#pragma unroll
                for (int a = 0; a < kRowsInFlight; ++a, q += p.columns) {
                    subtract<Storage>(rest, groups[a].get(), factor[a]);
                    groups[a] = Whole<Group>::load(q);
                }
            }
#pragma unroll
            for (int a = 0; a < kRowsInFlight; ++a)
                subtract<Storage>(rest, groups[a].get(), factor[a]);
            rows -= kRowsInFlight;
            factor += kRowsInFlight;
        }
#pragma unroll 1
        for (; rows > 0; --rows, q += p.columns) subtract<Storage>(rest, Group::load(q), *factor++);
#pragma unroll
        for (int k = 0; k < Group::kSize; ++k) {
            const auto rounded = static_cast<Vector>(rest[k]);
            w[j + k] = rounded;
            sum += static_cast<double>(rounded) * static_cast<double>(rounded);
        }
    }
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) squares[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    finish_norms_kernel(const double* squares, std::int64_t tiles, double* norms) {
    const double sum = sum_of_tiles(squares + blockIdx.x * tiles, tiles);
    if (threadIdx.x == 0) norms[blockIdx.x] = sqrt(sum);
}

template <class Group, class Storage, class Vector>
void launch(const Orthogonalization& p, double* workspace, cudaStream_t queue) {
    const std::int64_t tiles = tiles_of(p.columns);
    const std::int64_t dots = p.count * p.rows;
    double* pass = workspace;
    double* sums = pass + dots;
    double* squares = sums + dots * tiles;
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.count));
    for (int i = 0; i < p.passes; ++i) {
        if (dots > 0) {
            dots_kernel<Group, Storage, Vector><<<grid, kThreads, 0, queue>>>(p, sums);
            add_tiles_kernel<<<static_cast<unsigned>(dots), kThreads, 0, queue>>>(
                sums, tiles, pass, p.coefficients, i == 0);
        }
        subtract_kernel<Group, Storage, Vector><<<grid, kThreads, 0, queue>>>(p, pass, squares);
    }
    finish_norms_kernel<<<static_cast<unsigned>(p.count), kThreads, 0, queue>>>(squares, tiles,
                                                                                p.norms);
    check(cudaGetLastError(), "launching orthogonalize");
}

}  // namespace

std::int64_t orthogonalize_workspace(std::int64_t rows, std::int64_t columns, std::int64_t count) {
    return count * (rows + (rows + 1) * tiles_of(columns));
}

void orthogonalize(const Orthogonalization& p, double* workspace, int device, Stream stream) {
    const DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    by_dtype(p.basis_dtype, [&](auto storage) {
        using Storage = decltype(storage);
        const auto with = [&](auto vector) {
            using Vector = decltype(vector);
            if (rows_are_aligned<Storage>(p.columns, p.basis))  // not needed for the result
                launch<Pack<Storage>, Storage, Vector>(p, workspace, queue);
            else
                launch<Element<Storage>, Storage, Vector>(p, workspace, queue);
        };
        if (p.vector_dtype == DType::f64)
            with(double{});
        else
            with(float{});
    });
}

}  // namespace eigenfilter::cuda
