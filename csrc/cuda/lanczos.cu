// Kernels over the vectors of Lanczos' iterations on the GPU: a block of threads has a tile of
// columns, of one row or of a few.
#include "core/rules.hpp"
#include "tiles.cuh"

namespace eigenfilter::cuda {
namespace {

// Calls body(j) for the columns of a row's tile, Size at a time, some of them under way at once.
template <int Size, class Body>
__device__ __forceinline__ void along(const Tile& tile, Body body) {
    if (tile.columns == kTile) {  // not needed for the result: loads of a whole tile overlap
#pragma unroll 2
        for (int a = 0; a < kTile / (kThreads * Size); ++a)
            body((a * kThreads + static_cast<int>(threadIdx.x)) * Size);
        return;
    }
    for (int j = static_cast<int>(threadIdx.x) * Size; j < tile.columns; j += kThreads * Size)
        body(j);
}

// Stores a group by one access, which the compiler takes apart where elements were doubles before.
template <class Group, class T>
__device__ __forceinline__ void put(const Group& group, T* p) {
    if constexpr (sizeof(Group) == kAccessBytes) {
        uint4 raw;
        __builtin_memcpy(&raw, &group, sizeof raw);
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                     :
                     : "l"(p), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w));
    } else {
        group.store(p);
    }
}

// sums[k][row][tile] <- the block's k-th sum.
__device__ __forceinline__ void put_sums(double* sums, double first, double second) {
    first = block_sum<kThreads>(first);
    __syncthreads();
    second = block_sum<kThreads>(second);
    if (threadIdx.x != 0) return;
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    sums[at] = first;
    sums[static_cast<std::int64_t>(gridDim.y) * gridDim.x + at] = second;
}

template <class Group, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    row_dots_kernel(Recurrence r, double* sums) {
    const Tile tile(r.columns);
    const std::int64_t start = blockIdx.y * r.columns + tile.first;
    const T* q = static_cast<const T*>(r.q) + start;
    const T* w = static_cast<const T*>(r.w) + start;
    double dots = 0, squares = 0;
    along<Group::kSize>(tile, [&](int j) {
        const Group present = Group::load(q + j), product = Group::load(w + j);
#pragma unroll
        for (int k = 0; k < Group::kSize; ++k) {
            const double value = product.v[k];
            dots += static_cast<double>(present.v[k]) * value;
            squares += value * value;
        }
    });
    put_sums(sums, dots, squares);
}

template <class Group, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    lanczos_step_kernel(Recurrence r, double* sums) {
    const Tile tile(r.columns);
    const std::int64_t start = blockIdx.y * r.columns + tile.first;
    T* u = static_cast<T*>(r.u) + start;
    const T* q = static_cast<const T*>(r.q) + start;
    const T* w = static_cast<const T*>(r.w) + start;
    const LanczosStep rule(r.factors, r.rows, blockIdx.y);
    double squares = 0, dots = 0;
    along<Group::kSize>(tile, [&](int j) {
        const Group present = Group::load(q + j), product = Group::load(w + j);
        Group group = Group::load(u + j);
#pragma unroll
        for (int k = 0; k < Group::kSize; ++k) {
            const double along_q = present.v[k];
            group.v[k] = static_cast<T>(
                rule(static_cast<double>(product.v[k]), along_q, static_cast<double>(group.v[k])));
            const double rounded = group.v[k];
            squares += rounded * rounded;
            dots += rounded * along_q;
        }
        put(group, u + j);
    });
    put_sums(sums, squares, dots);
}

// out[i] <- the sum of all tiles' sums[i].
__global__ void __launch_bounds__(kThreads)
    add_sums_kernel(const double* sums, std::int64_t tiles, double* out) {
    const double sum = sum_of_tiles(sums + blockIdx.x * tiles, tiles);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

constexpr int kMixed = 128;  // columns of a few rows that a block has in double at once

// A block's columns of a few rows, in double; rows lie so that threads in different rows do not
// collide.
struct Wide {
    double at[kMostRows][kMixed + 1];

    // Columns from `first` on, n of them; the rest of the array is zero. A thread loads a few
    // groups before it needs the first.
    template <class Group, class T>
    __device__ __forceinline__ void read(const T* first, std::int64_t stride, int rows, int n) {
        constexpr int kGroups = kMixed / Group::kSize, kAhead = 4;
        static_assert(kThreads % kGroups == 0);  // then all of them are in the same columns
        // The bound of i is not needed for the result, which the tests of row guard; it saves work.
        for (int i = static_cast<int>(threadIdx.x); i < rows * kGroups; i += kAhead * kThreads) {
            Group groups[kAhead] = {};
#pragma unroll
            for (int a = 0; a < kAhead; ++a) {
                const int row = (i + a * kThreads) / kGroups, j = i % kGroups * Group::kSize;
                if (row < rows && j < n) groups[a] = Group::load(first + row * stride + j);
            }
#pragma unroll
            for (int a = 0; a < kAhead; ++a) {
                const int row = (i + a * kThreads) / kGroups, j = i % kGroups * Group::kSize;
                // This is not needed for the result: other rows would become zero, and none lies
                // beyond the array, which whole turns fill.
                if (row >= rows) continue;
#pragma unroll
                for (int k = 0; k < Group::kSize; ++k) at[row][j + k] = groups[a].v[k];
            }
        }
    }
};

// sums[i][j][tile] <- v_i . v_j over the tile's columns. A team of 32 threads, of which each has a
// part of the columns, takes a pair at a time.
template <class Group, class T>
__global__ void __launch_bounds__(kThreads) gram_kernel(Rows v, double* sums) {
    __shared__ Wide wide;
    constexpr int kTeam = 32, kTeams = kThreads / kTeam;
    constexpr int kPairs = (kMostRows * (kMostRows + 1) / 2 + kTeams - 1) / kTeams;
    __shared__ double totals[kPairs * kTeams];
    const Tile tile(v.columns);
    const int rows = static_cast<int>(v.rows), pairs = rows * (rows + 1) / 2;
    const int lane = static_cast<int>(threadIdx.x) % kTeam;
    for (int p = static_cast<int>(threadIdx.x); p < pairs; p += kThreads) totals[p] = 0;
    // One turn more is not needed for the result: it would add zeros.
    for (int start = 0; start < tile.columns; start += kMixed) {
        __syncthreads();
        wide.read<Group>(static_cast<const T*>(v.vectors) + tile.first + start, v.columns, rows,
                         min(kMixed, tile.columns - start));  // min is not needed for the result
        __syncthreads();
        for (int p = static_cast<int>(threadIdx.x) / kTeam; p < pairs; p += kTeams) {
            int i = static_cast<int>((sqrtf(8.0f * p + 1.0f) - 1.0f) * 0.5f);
            if ((i + 1) * (i + 2) / 2 <= p) ++i;  // not needed for a correctly rounded root
            const int j = p - i * (i + 1) / 2;
            double sum = 0;
#pragma unroll
            for (int k = lane; k < kMixed; k += kTeam) sum += wide.at[i][k] * wide.at[j][k];
#pragma unroll
            for (int width = kTeam / 2; width > 0; width /= 2)
                sum += __shfl_down_sync(0xffffffffu, sum, width);
            if (lane == 0) totals[p] += sum;
        }
    }
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < rows * rows; at += kThreads) {
        const int i = max(at / rows, at % rows), j = min(at / rows, at % rows);
        sums[static_cast<std::int64_t>(at) * gridDim.x + blockIdx.x] = totals[i * (i + 1) / 2 + j];
    }
}

// v_i <- sum_{j <= i} factors_ij v_j over kMixed columns.
template <class Group, class T>
__global__ void __launch_bounds__(kThreads) mix_rows_kernel(Rows v, const double* factors) {
    __shared__ Wide wide;
    __shared__ double lower[kMostRows * kMostRows];
    constexpr int kGroups = kMixed / Group::kSize;
    const int rows = static_cast<int>(v.rows);
    const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * kMixed;
    // The minimum is not needed for the result, but for the conversion to int.
    const int n = static_cast<int>(min(static_cast<std::int64_t>(kMixed), v.columns - start));
    T* first = static_cast<T*>(v.vectors) + start;
    wide.read<Group>(first, v.columns, rows, n);
    for (int i = static_cast<int>(threadIdx.x); i < rows * rows; i += kThreads)
        lower[i] = factors[i];
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < rows * kGroups; at += kThreads) {
        const int i = at / kGroups, column = at % kGroups * Group::kSize;
        if (column >= n) continue;
        double sum[Group::kSize] = {};
        for (int j = 0; j <= i; ++j) {
            const double factor = lower[i * rows + j];
#pragma unroll
            for (int k = 0; k < Group::kSize; ++k) sum[k] += factor * wide.at[j][column + k];
        }
        Group group;
#pragma unroll
        for (int k = 0; k < Group::kSize; ++k) group.v[k] = static_cast<T>(sum[k]);
        put(group, first + i * v.columns + column);
    }
}

// Calls call(group, t) with the widest accesses that all rows at p allow, T the vectors' type.
template <class Call, class... Pointers>
void by_access(DType dtype, std::int64_t columns, Call call, Pointers... p) {
    const auto with = [&](auto t) {
        using Storage = Native<decltype(t)>;
        if (rows_are_aligned<Storage>(columns, p...))  // not needed for the result: wide accesses
            call(Pack<Storage>{}, t);
        else
            call(Element<Storage>{}, t);
    };
    if (dtype == DType::f64)
        with(double{});
    else
        with(float{});
}

void add_sums(const double* workspace, std::int64_t sums, std::int64_t columns, double* out,
              cudaStream_t queue, const char* what) {
    add_sums_kernel<<<static_cast<unsigned>(sums), kThreads, 0, queue>>>(workspace,
                                                                         tiles_of(columns), out);
    check(cudaGetLastError(), what);
}

dim3 grid_of(const Recurrence& r) {
    return {static_cast<unsigned>(tiles_of(r.columns)), static_cast<unsigned>(r.rows)};
}

}  // namespace

std::int64_t sums_workspace(std::int64_t sums, std::int64_t columns) {
    return sums * tiles_of(columns);
}

void row_dots(const Recurrence& r, double* workspace, int device, Stream stream) {
    const DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    by_access(
        r.dtype, r.columns,
        [&](auto group, auto t) {
            row_dots_kernel<decltype(group), decltype(t)>
                <<<grid_of(r), kThreads, 0, queue>>>(r, workspace);
        },
        r.q, r.w);
    add_sums(workspace, 2 * r.rows, r.columns, r.sums, queue, "launching row_dots");
}

void lanczos_step(const Recurrence& r, double* workspace, int device, Stream stream) {
    const DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    by_access(
        r.dtype, r.columns,
        [&](auto group, auto t) {
            lanczos_step_kernel<decltype(group), decltype(t)>
                <<<grid_of(r), kThreads, 0, queue>>>(r, workspace);
        },
        r.u, r.q, r.w);
    add_sums(workspace, 2 * r.rows, r.columns, r.sums, queue, "launching lanczos_step");
}

void gram(const Rows& v, double* out, double* workspace, int device, Stream stream) {
    const DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto tiles = static_cast<unsigned>(tiles_of(v.columns));
    by_access(
        v.dtype, v.columns,
        [&](auto group, auto t) {
            gram_kernel<decltype(group), decltype(t)><<<tiles, kThreads, 0, queue>>>(v, workspace);
        },
        v.vectors);
    add_sums(workspace, v.rows * v.rows, v.columns, out, queue, "launching gram");
}

void mix_rows(const Rows& v, const double* factors, int device, Stream stream) {
    const DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto blocks = static_cast<unsigned>((v.columns + kMixed - 1) / kMixed);
    by_access(
        v.dtype, v.columns,
        [&](auto group, auto t) {
            mix_rows_kernel<decltype(group), decltype(t)>
                <<<blocks, kThreads, 0, queue>>>(v, factors);
        },
        v.vectors);
    check(cudaGetLastError(), "launching mix_rows");
}

}  // namespace eigenfilter::cuda
