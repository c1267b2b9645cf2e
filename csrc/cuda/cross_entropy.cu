// loss_i = -sum_j q_j log softmax(x_i)_j and dx_i = factor * (softmax(x_i) - q), where q is the
// target smoothed: q_j = smoothing / C, plus 1 - smoothing at the target.
//
// A warp takes a row, three times over it: largest logit, sums, gradient. Masked: columns beyond C,
// rows beyond M.
#include "cuda/epilogue.cuh"

namespace fusedmlp::cuda {
namespace {

constexpr int kRows = 8;  // of a block, a warp each
constexpr int kThreads = kRows * kWarp;

template <class T>
__global__ void __launch_bounds__(kThreads, 4) cross_entropy_kernel(const CrossEntropyParams p) {
    const int lane = int(threadIdx.x) % kWarp;
    const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
    if (row >= p.rows)
        return;  // the whole warp
    const T* const x = static_cast<const T*>(p.x) + row * p.cols;
    const int64_t target = p.target[row];
    const bool ignored = target == p.ignore_index;
    const bool known = target >= 0 && target < p.cols;
    float largest = -INFINITY;
    for (int64_t j = lane; j < p.cols; j += kWarp) {
        const float v = to_float(x[j]);
        largest = v > largest ? v : largest;
    }
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const float other = __shfl_xor_sync(~0u, largest, mask);
        largest = other > largest ? other : largest;
    }
    // From the largest logit on: nothing overflows, and the loss loses no digits to its size.
    float powers = 0.0f, logits = 0.0f;
    for (int64_t j = lane; j < p.cols; j += kWarp) {
        const float v = to_float(x[j]) - largest;
        powers += expf(v);
        logits += v;
    }
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        powers += __shfl_xor_sync(~0u, powers, mask);
        logits += __shfl_xor_sync(~0u, logits, mask);
    }
    const float everywhere = p.smoothing / float(p.cols), there = 1.0f - p.smoothing;
    if (lane == 0) {
        const float at_target = known ? to_float(x[target]) - largest : NAN;
        float loss = logf(powers) - there * at_target;
        // Not at 0: a logit of -inf elsewhere must not become a NaN.
        if (p.smoothing != 0.0f)
            loss -= everywhere * logits;
        p.losses[row] = ignored ? 0.0f : loss;
    }
    const float share = 1.0f / powers;
    for (int64_t j = lane; j < p.cols; j += kWarp) {
        float d = expf(to_float(x[j]) - largest) * share - everywhere;
        if (j == target)
            d -= there;
        T rounded;
        round_to(rounded, ignored ? 0.0f : known ? d * p.factor : NAN);
        static_cast<T*>(p.dx)[row * p.cols + j] = rounded;
    }
}

}  // namespace

int launch_cross_entropy(const CrossEntropyParams& p, void* stream) {
    if (p.rows == 0)
        return 0;
    return with_dtype(p.dtype, [&](auto element) {
        const auto kernel = cross_entropy_kernel<decltype(element)>;
        return launch(kernel, ceil_div(p.rows, kRows), kThreads, 0, stream, p);
    });
}

}  // namespace fusedmlp::cuda
