// All layers of a network as one call, forward or backward, in fp32. Plain pointers, no torch.
#pragma once

#include <vector>

#include "cpu/network.h"

namespace fusedmlp::cpu {

// What forward and backward leave of a layer; a gradient that is null is not wanted.
struct MlpOutputs {
    float* y;       // (M, N); null where forward need not keep it
    float* h;       // (M, N) x w^T where z is saved, else null
    float* dw;      // (N, K) or null
    float* db;      // (N,) or null
    float* dslope;  // or null
};

struct MlpParams {
    std::vector<Layer> layers;
    std::vector<MlpOutputs> out;
    int64_t rows;     // M
    const float* x;   // (M, K)
    const float* dy;  // (M, N) of the last layer; backward only
    float* dx;        // (M, K) or null
    size_t first;     // backward goes down to this layer
    float* work;      // mlp_fwd_work or mlp_bwd_work floats
};

// Floats of memory that a call takes.
int64_t mlp_fwd_work(const MlpParams& p);
int64_t mlp_bwd_work(const MlpParams& p);
int launch_mlp_fwd(const MlpParams& p, ParallelFor parallel);
int launch_mlp_bwd(const MlpParams& p, ParallelFor parallel);

}  // namespace fusedmlp::cpu
