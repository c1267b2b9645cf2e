// All layers of a network as one call, forward or backward, in fp32. Plain pointers, no torch.
#pragma once

#include <vector>

#include "common/params.h"

namespace fusedmlp::cpu {

// y = drop(act(x w^T + b)); a gradient that is null is not wanted.
struct MlpLayer {
    const float* w;    // (N, K)
    int64_t k;         //
    int saves;         // a Saves
    float* y;          // (M, N)
    float* h;          // (M, N) x w^T where z is saved, else null
    float* dw;         // (N, K) or null
    float* db;         // (N,) or null
    float* dslope;     // or null
    EpilogueParams e;  // with M and N
};

struct MlpParams {
    std::vector<MlpLayer> layers;
    const float* x;   // (M, K)
    const float* dy;  // (M, N) of the last layer; backward only
    float* dx;        // (M, K) or null
    size_t first;     // backward goes down to this layer
    float* work;      // mlp_fwd_work or mlp_bwd_work floats
};

// Floats of memory that a call takes. Forward: layers whose y is null get theirs from it.
int64_t mlp_fwd_work(const MlpParams& p);
int64_t mlp_bwd_work(const MlpParams& p);
int launch_mlp_fwd(MlpParams& p, ParallelFor parallel);
int launch_mlp_bwd(const MlpParams& p, ParallelFor parallel);

}  // namespace fusedmlp::cpu
