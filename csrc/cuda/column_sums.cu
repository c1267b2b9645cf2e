// The second stage of sums over rows.
#include "cuda/column_sums.cuh"

namespace fusedmlp::cuda {
namespace {

constexpr int kColumns = kWarp, kParts = 8;  // of a block: columns, and threads for each

struct AddRowsArgs {
    void* out;        // (N,)
    const float* in;  // (R, N)
    Dtype dtype;      // of out
    int64_t rows;     // R
    int64_t cols;     // N
};

// Thread (part, column) adds every kParts-th row, the first part then all parts.
FUSEDMLP_KERNEL(kColumns* kParts, 4) add_rows_kernel(const AddRowsArgs p) {
    auto* sums = reinterpret_cast<float*>(shared_memory());  // (kParts, kColumns)
    const int column = int(thread_index()) % kColumns, part = int(thread_index()) / kColumns;
    const int64_t col = int64_t(block_index()) * kColumns + column;
    float sum = 0.0f;
    if (col < p.cols) {
        FUSEDMLP_UNROLL_BY(4)
        for (int64_t row = part; row < p.rows; row += kParts)
            sum += load(p.in + row * p.cols + col);
    }
    sums[thread_index()] = sum;
    sync_block();
    if (part == 0 && col < p.cols) {
        FUSEDMLP_UNROLL
        for (int i = 1; i < kParts; ++i)
            sum += sums[i * kColumns + column];
        store_as(p.out, p.dtype, col, sum);
    }
}

// For one column, with one block: by thread, then by halves of the threads.
FUSEDMLP_KERNEL(kColumns* kParts, 4) add_column_kernel(const AddRowsArgs p) {
    auto* sums = reinterpret_cast<float*>(shared_memory());
    const int thread = int(thread_index());
    float sum = 0.0f;
    FUSEDMLP_UNROLL_BY(4)
    for (int64_t row = thread; row < p.rows; row += kColumns * kParts)
        sum += load(p.in + row);
    sums[thread] = sum;
    for (int half = kColumns * kParts / 2; half > 0; half /= 2) {
        sync_block();
        if (thread < half)
            sums[thread] += sums[thread + half];
    }
    if (thread == 0)
        store_as(p.out, p.dtype, 0, sums[0]);
}

}  // namespace

int add_rows(void* out, Dtype dtype, const float* in, int64_t rows, int64_t cols, void* stream) {
    const AddRowsArgs args{out, in, dtype, rows, cols};
    const int threads = kColumns * kParts;
    return launch(
        cols == 1 ? add_column_kernel : add_rows_kernel, ceil_div(cols, kColumns), threads,
        threads * sizeof(float), stream, args
    );
}

}  // namespace fusedmlp::cuda
