// Sums over rows in a fixed order: of the threads of a block, then of the blocks.
#pragma once

#include "cuda/epilogue.cuh"

namespace fusedmlp::cuda {

constexpr int kLogThreads = 7, kThreads = 1 << kLogThreads;

// Where a block's thread stands.
struct TilePlace {
    int64_t chunk;  // of rows
    int64_t row;    // the first of this thread
    int64_t col;    // the first of its eight columns
    int row_step;   // to its next row
    int rows;       // of it in the chunk
    int count;      // of its columns that exist
};

// (M, N) cut into chunks of rows and tiles of 2^log_lanes groups of eight columns, a block each.
struct ColumnTiles {
    int log_lanes = 0;
    int64_t rows_of_chunk = 0, chunks = 0;
    Divider by_col_tiles;

    __device__ __forceinline__ TilePlace place(int64_t rows, int64_t cols) const {
        TilePlace p;
        const int lanes = 1 << log_lanes, lane = int(threadIdx.x) & (lanes - 1);
        p.row_step = kThreads >> log_lanes;
        p.chunk = by_col_tiles.quotient(blockIdx.x);
        const int64_t tile = blockIdx.x - p.chunk * int64_t(by_col_tiles.divisor);
        const int64_t first = p.chunk * rows_of_chunk;
        p.row = first + (threadIdx.x >> log_lanes);
        const int64_t end = first + rows_of_chunk < rows ? first + rows_of_chunk : rows;
        p.rows = int((end - p.row + p.row_step - 1) >> (kLogThreads - log_lanes));
        p.col = (tile * lanes + lane) * kEight;
        const int64_t left = cols - p.col;
        p.count = int(left < 0 ? 0 : left < kEight ? left : kEight);
        return p;
    }
};

// Where the sums of a block go: row `chunk` of (chunks, N) or, if one, element `block` of
// (blocks,). With a single chunk (block) that is the result itself.
struct SumTarget {
    void* out;
    Dtype dtype;
    bool one;
};

__device__ __forceinline__ void store_as(void* out, Dtype dtype, int64_t at, float v) {
    const auto put = [&](auto element) {
        round_to(element, v);
        static_cast<decltype(element)*>(out)[at] = element;
    };
    if (dtype == Dtype::kFloat32)
        put(float{});
    else if (dtype == Dtype::kFloat16)
        put(Half{});
    else
        put(BFloat{});
}

constexpr size_t kSumShared = size_t(kThreads) * kEight * sizeof(float);

// Adds up the block's threads and stores the sums of its columns, or of all of them. Each thread
// first adds eight rows of one column, then a few threads what is left. After ONE, the block must
// not write to shared memory any more.
template <bool ONE>
__device__ __forceinline__ void add_block(
    const float (&mine)[kEight],
    const ColumnTiles& tiles,
    const TilePlace& place,
    int64_t cols,
    const SumTarget& to
) {
    auto* sums = reinterpret_cast<float*>(shared_memory());  // (kThreads / lanes, columns)
    const int thread = int(threadIdx.x);
    const int columns = kEight << tiles.log_lanes, parts = kThreads / columns;
    const int column = thread & (columns - 1), part = thread / columns;
#pragma unroll
    for (int j = 0; j < kEight; ++j)
        sums[thread * kEight + j] = mine[j];
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kEight; ++i)
        sum += sums[(part * kEight + i) * columns + column];
    __syncthreads();
    sums[thread] = sum;  // (parts, columns)
    __syncthreads();
    if (thread < columns) {
        for (int i = 1; i < parts; ++i)
            sum += sums[i * columns + thread];
        const int64_t col =
            place.col - (threadIdx.x & ((1u << tiles.log_lanes) - 1)) * kEight + thread;
        if (ONE)
            sums[thread] = sum;
        else if (col < cols)
            store_as(to.out, to.dtype, place.chunk * cols + col, sum);
    }
    __syncthreads();
    if (ONE && thread == 0) {
        // Columns beyond the last hold 0.
        for (int i = 1; i < columns; ++i)
            sum += sums[i];
        store_as(to.out, to.dtype, blockIdx.x, sum);
    }
}

// out (N,) = sum over rows of in (R, N).
int add_rows(void* out, Dtype dtype, const float* in, int64_t rows, int64_t cols, void* stream);

}  // namespace fusedmlp::cuda
