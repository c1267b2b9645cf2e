// Arguments of the kernels as plain structs, and every launcher. Host and device, no torch.
// Pointers are to dense row-major memory of the dtype named beside them.
#pragma once

#include <cstdint>

#include "common/activations.h"

namespace fusedmlp {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
constexpr int kDtypeCount = 3;

// Implements philox.py. threshold = 0: nothing is dropped and state is not read; 2^32: everything
// is.
struct DropoutParams {
    const int64_t* state;   // (2,) seed and stream, in the memory of the device
    uint64_t threshold;     // round(p * 2^32)
    float scale;            // 1 / (1 - p)
    int64_t stream_offset;  // added to the stream
    int64_t row_offset;     // added to the row
};

struct EpilogueParams {
    // inputs
    const void* bias;    // (N,) or null
    const void* slope;   // slope_size elements, prelu only, else null
    Dtype bias_dtype;    //
    Dtype slope_dtype;   //
    int64_t slope_size;  // 1 or N
    // numbers
    int act;             // an Act
    float alpha;         // slope of leaky_relu
    DropoutParams drop;  //
    // sizes
    Dtype dtype;   // of x, y, dy, dz and saved
    int64_t rows;  // M
    int64_t cols;  // N
};

// y = drop(act(x + bias)); y may be x.
struct BiasActDropoutFwdParams {
    void* y;           // (M, N)
    const void* x;     // (M, N)
    EpilogueParams e;  //
};

// dz = keep ? dy * scale * act'(z) : 0, and its column sum; saved is y or x by `saves`.
struct BiasActDropoutBwdParams {
    void* dz;           // (M, N)
    void* db;           // (N,) of bias_dtype, or null when it is not needed
    void* dslope;       // slope_size elements of slope_dtype, or null
    const void* dy;     // (M, N)
    const void* saved;  // (M, N) or null when saves = 0
    int saves;          // a Saves
    EpilogueParams e;   //
};

namespace cpu {

// Launchers return 0 on success.

// Calls body(begin, end, context) for parts of [0, n) of at least `grain`, on several threads.
// The signature of torch_parallel_for.
using ParallelFor = int (*)(
    int64_t begin,
    int64_t end,
    int64_t grain,
    void (*body)(int64_t, int64_t, void*),
    void* context
);

int launch_bias_act_dropout_fwd(const BiasActDropoutFwdParams& p, ParallelFor parallel);
int launch_bias_act_dropout_bwd(const BiasActDropoutBwdParams& p, ParallelFor parallel);

}  // namespace cpu

// y = drop(act(x w^T + b)), and h = x w^T where it is not null. Pointers and row strides are
// multiples of 16 bytes, elements of a row are neighbours.
struct LinearActParams {
    void* y;           // (M, N)
    void* h;           // (M, N) or null
    const void* x;     // (M, K)
    const void* w;     // (N, K)
    int64_t x_stride;  // elements from row to row
    int64_t w_stride;  //
    int64_t k;         // K
    EpilogueParams e;  //
};

// The cross-entropy of each row of softmax(x) with its smoothed target, 0 where the target is
// ignore_index; dx = factor * its gradient. Another target outside of [0, C) makes both NaN.
struct CrossEntropyParams {
    float* losses;          // (M,)
    void* dx;               // (M, C) of dtype
    const void* x;          // (M, C) logits
    const int64_t* target;  // (M,)
    int64_t ignore_index;   //
    float smoothing;        // label smoothing, in [0, 1]
    float factor;           //
    Dtype dtype;            //
    int64_t rows;           // M
    int64_t cols;           // C, not 0
};

namespace cuda {

// Launchers return a cudaError_t, 0 on success; stream is a cudaStream_t. They only enqueue. What
// they need of scratch memory, in floats, comes from the function beside them.

int launch_bias_act_dropout_fwd(const BiasActDropoutFwdParams& p, void* stream);

int64_t bias_act_dropout_bwd_scratch(const BiasActDropoutBwdParams& p);
int launch_bias_act_dropout_bwd(const BiasActDropoutBwdParams& p, float* scratch, void* stream);

// Whether the tensor-core kernel takes the call: dtype, alignment, and a size it is meant for.
bool linear_act_takes(const LinearActParams& p);
// The tile is chosen by size; tests and benchmarks name one.
enum class LinearTile : int { kBySize = 0, kSmall = 1, kMedium = 2, kLarge = 3 };
int launch_linear_act(
    const LinearActParams& p,
    void* stream,
    LinearTile tile = LinearTile::kBySize
);

int launch_cross_entropy(const CrossEntropyParams& p, void* stream);

}  // namespace cuda
}  // namespace fusedmlp
