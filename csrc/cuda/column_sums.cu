// The second stage of sums over rows: a block for 32 columns, eight threads a column.
#include "cuda/column_sums.cuh"

namespace fusedmlp::cuda {
namespace {

constexpr int kColumns = kWarp, kParts = 8;

struct AddRowsArgs {
    void* out;        // (N,)
    const float* in;  // (R, N)
    Dtype dtype;      // of out
    int64_t rows;     // R
    int64_t cols;     // N
    float factor;
};

FUSEDMLP_KERNEL(kColumns * kParts, 4) add_rows_kernel(const AddRowsArgs p) {
    auto* sums = reinterpret_cast<float*>(shared_memory());  // (kParts, kColumns)
    const int column = int(thread_index()) % kColumns, part = int(thread_index()) / kColumns;
    const int64_t col = int64_t(block_index()) * kColumns + column;
    float sum = 0.0f;
    if (col < p.cols) {
        FUSEDMLP_UNROLL_BY(4)
        for (int64_t row = part; row < p.rows; row += kParts) sum += load(p.in + row * p.cols + col);
    }
    sums[thread_index()] = sum;
    sync_block();
    if (part == 0 && col < p.cols) {
        FUSEDMLP_UNROLL
        for (int i = 1; i < kParts; ++i) sum += sums[i * kColumns + column];
        store_as(p.out, p.dtype, col, sum * p.factor);
    }
}

}  // namespace

int add_rows(
    void* out, Dtype dtype, const float* in, int64_t rows, int64_t cols, float factor, void* stream
) {
    const AddRowsArgs args{out, in, dtype, rows, cols, factor};
    return launch(
        add_rows_kernel, ceil_div(cols, kColumns), kColumns * kParts, kColumns * kParts * sizeof(float), stream, args
    );
}

}  // namespace fusedmlp::cuda
