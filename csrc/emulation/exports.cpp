// The launchers of cuda/ for ctypes, on the emulated machine.
#include <vector>

#include "common/params.h"
#include "emulation/simt.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void fusedmlp_emulation_memory(const void* at, int64_t bytes, int writable);

namespace fusedmlp {
namespace {

// Scratch memory as an allocator gives it: anything, here NaN.
struct Scratch {
    explicit Scratch(int64_t floats) : values(size_t(floats), NAN) {
        if (floats)
            fusedmlp_emulation_memory(values.data(), floats * int64_t(sizeof(float)), 1);
    }
    std::vector<float> values;
};

}  // namespace
}  // namespace fusedmlp

using namespace fusedmlp;

EXPORT int fusedmlp_emulate_bias_act_dropout_fwd(const BiasActDropoutFwdParams* p) {
    return cuda::launch_bias_act_dropout_fwd(*p, nullptr);
}

EXPORT int fusedmlp_emulate_bias_act_dropout_bwd(const BiasActDropoutBwdParams* p) {
    Scratch scratch(cuda::bias_act_dropout_bwd_scratch(*p));
    return cuda::launch_bias_act_dropout_bwd(*p, scratch.values.data(), nullptr);
}

EXPORT int fusedmlp_emulate_linear_act(const LinearActParams* p, int tile) {
    return cuda::launch_linear_act(*p, nullptr, static_cast<cuda::LinearTile>(tile));
}

EXPORT int fusedmlp_emulated_linear_act_takes(const LinearActParams* p) {
    return cuda::linear_act_takes(*p);
}

EXPORT int fusedmlp_emulate_cross_entropy(const CrossEntropyParams* p) {
    return cuda::launch_cross_entropy(*p, nullptr);
}
