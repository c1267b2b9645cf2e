// The launchers of csrc/cuda for ctypes.
#include "common/params.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace fusedmlp;

EXPORT int ptx_bias_act_dropout_fwd(const BiasActDropoutFwdParams* p) {
    return cuda::launch_bias_act_dropout_fwd(*p, nullptr);
}

EXPORT int64_t ptx_bias_act_dropout_bwd_scratch(const BiasActDropoutBwdParams* p) {
    return cuda::bias_act_dropout_bwd_scratch(*p);
}

EXPORT int ptx_bias_act_dropout_bwd(const BiasActDropoutBwdParams* p, float* scratch) {
    return cuda::launch_bias_act_dropout_bwd(*p, scratch, nullptr);
}

EXPORT int ptx_linear_act(const LinearActParams* p, int tile) {
    return cuda::launch_linear_act(*p, nullptr, static_cast<cuda::LinearTile>(tile));
}

EXPORT int ptx_linear_act_takes(const LinearActParams* p) { return cuda::linear_act_takes(*p); }

EXPORT int ptx_cross_entropy(const CrossEntropyParams* p) {
    return cuda::launch_cross_entropy(*p, nullptr);
}
