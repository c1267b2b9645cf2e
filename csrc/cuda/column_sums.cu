// The second stage of sums over rows.
#include "cuda/column_sums.cuh"

namespace fusedmlp::cuda {
namespace {

constexpr int kColumns = kWarp, kParts = 8;  // of a block: columns, and threads for each
constexpr int kSumThreads = kColumns * kParts;

struct AddRowsArgs {
    void* out;        // (N,)
    const float* in;  // (R, N)
    Dtype dtype;      // of out
    int64_t rows;     // R
    int64_t cols;     // N
};

// Thread (part, column) adds every kParts-th row, the first part then all parts.
__global__ void __launch_bounds__(kSumThreads, 4) add_rows_kernel(const AddRowsArgs p) {
    auto* sums = reinterpret_cast<float*>(shared_memory());  // (kParts, kColumns)
    const int column = int(threadIdx.x) % kColumns, part = int(threadIdx.x) / kColumns;
    const int64_t col = int64_t(blockIdx.x) * kColumns + column;
    float sum = 0.0f;
    if (col < p.cols) {
#pragma unroll 4
        for (int64_t row = part; row < p.rows; row += kParts)
            sum += p.in[row * p.cols + col];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (part == 0 && col < p.cols) {
#pragma unroll
        for (int i = 1; i < kParts; ++i)
            sum += sums[i * kColumns + column];
        store_as(p.out, p.dtype, col, sum);
    }
}

// For one column, with one block: by thread, then by halves of the threads.
__global__ void __launch_bounds__(kSumThreads, 4) add_column_kernel(const AddRowsArgs p) {
    auto* sums = reinterpret_cast<float*>(shared_memory());
    const int thread = int(threadIdx.x);
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t row = thread; row < p.rows; row += kSumThreads)
        sum += p.in[row];
    sums[thread] = sum;
    for (int half = kSumThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half)
            sums[thread] += sums[thread + half];
    }
    if (thread == 0)
        store_as(p.out, p.dtype, 0, sums[0]);
}

}  // namespace

int add_rows(void* out, Dtype dtype, const float* in, int64_t rows, int64_t cols, void* stream) {
    const AddRowsArgs args{out, in, dtype, rows, cols};
    return launch(
        cols == 1 ? add_column_kernel : add_rows_kernel, ceil_div(cols, kColumns), kSumThreads,
        kSumThreads * sizeof(float), stream, args
    );
}

}  // namespace fusedmlp::cuda
