// The `native` ops for CPU tensors. ops_common.h holds what they do, cpu/ the kernels.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "bind/ops_common.h"
#include "bind/parallel_for.h"

namespace fusedmlp {
namespace {

// What ops_common.h asks of a device. The GEMM is that of F.linear, called without the dispatcher:
// no autograd, no autocast.
struct Device {
    Device(const char*, const View&) {}

    AtenTensorHandle
    empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
        AtenTensorHandle result = nullptr;
        const int32_t cpu = aoti_torch_device_type_cpu();
        return aoti_torch_empty_strided(dim, sizes, strides, dtype, cpu, 0, &result) ? nullptr
                                                                                     : result;
    }
    int mm(AtenTensorHandle out, AtenTensorHandle x, AtenTensorHandle w) {
        return aoti_torch_cpu_mm_out(out, x, w);
    }
    int addmm(AtenTensorHandle out, AtenTensorHandle b, AtenTensorHandle x, AtenTensorHandle w) {
        return aoti_torch_cpu_addmm_out(out, b, x, w, 1.0, 1.0);
    }
    int fwd(const BiasActDropoutFwdParams& p) {
        return cpu::launch_bias_act_dropout_fwd(p, parallel_for);
    }
    int64_t bwd_scratch(const BiasActDropoutBwdParams&) { return 0; }
    int bwd(const BiasActDropoutBwdParams& p, float*) {
        return cpu::launch_bias_act_dropout_bwd(p, parallel_for);
    }
    bool takes(const LinearActParams&) { return false; }
    int linear_act(const LinearActParams&) { return 1; }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedmlp, CPU, m) {
    m.impl("linear_act_fwd.native", TORCH_BOX(&linear_act_fwd<Device>));
    m.impl("linear_act_infer.native", TORCH_BOX(&linear_act_infer<Device>));
    m.impl("bias_act_dropout_fwd.native", TORCH_BOX(&bias_act_dropout_fwd<Device>));
    m.impl("bias_act_dropout_bwd.native", TORCH_BOX(&bias_act_dropout_bwd<Device>));
}

}  // namespace fusedmlp
