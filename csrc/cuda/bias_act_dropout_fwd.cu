// y = drop(act(x + b)), a pass over memory.
//
// The (M, N) elements are M * ceil(N / 8) groups of eight columns of a row, taken in memory order;
// a thread takes kGroups of them, a grid apart, and has all their loads under way before it uses
// one. One Philox call a group. Masked: the last group of a row, and groups beyond the end.
#include "cuda/epilogue.cuh"

namespace fusedmlp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroups = 2;  // of a thread
// Blocks below which a thread takes one group: the machine is not full.
constexpr int64_t kFewBlocks = 1024;

struct FwdArgs {
    void* y;        // (M, N)
    const void* x;  // (M, N), may be y
    Columns columns;
    Divider by_row;  // groups of a row
    int64_t groups;  // of all rows
    int steps;       // groups of a thread, 1 or kGroups
};

template <class T, bool VECTOR, int FAMILY>
__global__ void __launch_bounds__(kThreads, FAMILY == kSmooth ? 3 : 4) bias_act_dropout_fwd_kernel(
    const FwdArgs p
) {
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t cols = p.columns.e.cols;
    Octet<T, VECTOR> octet[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        const int64_t at = first + i * stride;
        if (i >= p.steps || at >= p.groups)
            break;
        const int64_t row = p.by_row.quotient(at);
        const int64_t col = (at - row * int64_t(p.by_row.divisor)) * kEight;
        octet[i].read(
            static_cast<const T*>(p.x) + row * cols + col,
            int(cols - col < kEight ? cols - col : kEight)
        );
    }
    const Draws draws = load_draws(p.columns.e.drop);
    const float scale = kept_scale(p.columns.e.drop);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        const int64_t at = first + i * stride;
        if (i >= p.steps || at >= p.groups)
            break;
        const int64_t row = p.by_row.quotient(at);
        const int64_t group = at - row * int64_t(p.by_row.divisor), col = group * kEight;
        const int count = int(cols - col < kEight ? cols - col : kEight);
        float v[kEight], bias[kEight];
        octet[i].get(v);
        p.columns.template load_bias<T>(bias, col, count);
#pragma unroll
        for (int j = 0; j < kEight; ++j)
            v[j] += bias[j];
        activate<T, FAMILY>(v, p.columns, scale, col, count);
        if (draws.on)
            drop(v, draws, p.columns.mask_row(row), uint32_t(group));
        Octet<T, VECTOR>::write(static_cast<T*>(p.y) + row * cols + col, v, count);
    }
}

}  // namespace

int launch_bias_act_dropout_fwd(const BiasActDropoutFwdParams& p, void* stream) {
    const EpilogueParams& e = p.e;
    if (e.rows == 0 || e.cols == 0)
        return 0;
    if (all_dropped(e))
        return fill_zero(p.y, size_t(e.rows * e.cols) * size_of(e.dtype), stream);
    FwdArgs args;
    args.y = p.y;
    args.x = p.x;
    args.columns = Columns(e);
    const int64_t row_groups = ceil_div(e.cols, kEight);
    args.groups = e.rows * row_groups;
    args.by_row = Divider(row_groups, args.groups);
    const int64_t blocks = ceil_div(args.groups, kThreads);
    args.steps = blocks <= kFewBlocks ? 1 : kGroups;
    const bool vectors = takes_vectors(e.dtype, e.cols, {p.x, p.y});
    return with_kernel(e, vectors, [&](auto element, auto vector, auto family) {
        const auto kernel =
            bias_act_dropout_fwd_kernel<decltype(element), vector.value, family.value>;
        return launch(kernel, ceil_div(blocks, args.steps), kThreads, 0, stream, args);
    });
}

}  // namespace fusedmlp::cuda
