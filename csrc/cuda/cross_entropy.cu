// loss = mean over rows of -sum_j q_j log softmax(x)_j and dx = (softmax(x) - q) / M, where q is
// the target smoothed: q_j = smoothing / C, plus 1 - smoothing at the target.
//
// A warp takes a row, three times over it: largest logit, sums, gradient. A block adds the losses
// of its rows, a second kernel the blocks. Masked: columns beyond C, rows beyond M.
#include "cuda/column_sums.cuh"

namespace fusedmlp::cuda {
namespace {

constexpr int kRows = 8;  // of a block, a warp each

struct CrossEntropyArgs {
    CrossEntropyParams p;
    float* losses;  // of blocks
    float weight;   // 1 / M
};

template <class T>
FUSEDMLP_KERNEL(kRows * kWarp, 4)
cross_entropy_kernel(const CrossEntropyArgs args) {
    const CrossEntropyParams& p = args.p;
    auto* losses = reinterpret_cast<float*>(shared_memory());  // (kRows,)
    const int warp = int(thread_index()) / kWarp, lane = int(thread_index()) % kWarp;
    const int64_t row = int64_t(block_index()) * kRows + warp;
    float loss = 0.0f;
    if (row < p.rows) {
        const T* const x = static_cast<const T*>(p.x) + row * p.cols;
        const int64_t target = load(p.target + row);
        const bool known = target >= 0 && target < p.cols;
        float largest = -INFINITY;
        for (int64_t j = lane; j < p.cols; j += kWarp) {
            const float v = to_float(load(x + j));
            largest = v > largest ? v : largest;
        }
        FUSEDMLP_UNROLL
        for (int mask = kWarp / 2; mask > 0; mask /= 2) {
            const float other = shuffle_xor(largest, mask);
            largest = other > largest ? other : largest;
        }
        // From the largest logit on: nothing overflows, and the loss loses no digits to its size.
        float powers = 0.0f, logits = 0.0f;
        for (int64_t j = lane; j < p.cols; j += kWarp) {
            const float v = to_float(load(x + j)) - largest;
            powers += expf(v);
            logits += v;
        }
        FUSEDMLP_UNROLL
        for (int mask = kWarp / 2; mask > 0; mask /= 2) {
            powers += shuffle_xor(powers, mask);
            logits += shuffle_xor(logits, mask);
        }
        const float everywhere = p.smoothing / float(p.cols), there = 1.0f - p.smoothing;
        const float at_target = known ? to_float(load(x + target)) - largest : NAN;
        loss = logf(powers) - there * at_target;
        if (p.smoothing != 0.0f)
            loss -= everywhere * logits;
        if (p.dx) {
            const float share = 1.0f / powers;
            for (int64_t j = lane; j < p.cols; j += kWarp) {
                float d = expf(to_float(load(x + j)) - largest) * share - everywhere;
                if (j == target)
                    d -= there;
                T rounded;
                round_to(rounded, known ? d * args.weight : NAN);
                store(static_cast<T*>(p.dx) + row * p.cols + j, rounded);
            }
        }
    }
    if (lane == 0)
        losses[warp] = loss;
    sync_block();
    if (thread_index() == 0) {
        FUSEDMLP_UNROLL
        for (int i = 1; i < kRows; ++i)
            loss += losses[i];
        store(args.losses + block_index(), loss);
    }
}

}  // namespace

int64_t cross_entropy_scratch(const CrossEntropyParams& p) { return ceil_div(p.rows, kRows); }

int launch_cross_entropy(const CrossEntropyParams& p, float* scratch, void* stream) {
    const int64_t blocks = ceil_div(p.rows, kRows);
    // The mean of no rows is NaN, as in PyTorch.
    const CrossEntropyArgs args{p, scratch, 1.0f / float(p.rows)};
    if (p.rows == 0)
        return add_rows(p.loss, Dtype::kFloat32, scratch, 0, 1, NAN, stream);
    const int failed = with_dtype(p.dtype, [&](auto element) {
        const auto kernel = cross_entropy_kernel<decltype(element)>;
        return launch(kernel, blocks, kRows * kWarp, kRows * sizeof(float), stream, args);
    });
    if (failed)
        return failed;
    return add_rows(p.loss, Dtype::kFloat32, scratch, blocks, 1, args.weight, stream);
}

}  // namespace fusedmlp::cuda
