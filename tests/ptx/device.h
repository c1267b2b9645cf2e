// Takes the place of device_cuda.h: CPU tensors, and launches that go to the PTX machine, so that
// the whole binding of the CUDA ops (checks, views, allocations, routes) runs without a GPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "bind/checks.h"

#define FUSEDMLP_DISPATCH_KEY CPU

namespace fusedmlp {

class Device {
  public:
    Device(const char*, const View&) {}

    AtenTensorHandle
    empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
        AtenTensorHandle t = nullptr;
        aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &t);
        return t;
    }
    int mm(AtenTensorHandle out, AtenTensorHandle x, AtenTensorHandle w) {
        return aoti_torch_cpu_mm_out(out, x, w);
    }
    int addmm(AtenTensorHandle out, AtenTensorHandle b, AtenTensorHandle x, AtenTensorHandle w) {
        return aoti_torch_cpu_addmm_out(out, b, x, w, 1.0, 1.0);
    }
    int fwd(const BiasActDropoutFwdParams& p) {
        return cuda::launch_bias_act_dropout_fwd(p, nullptr);
    }
    int64_t bwd_scratch(const BiasActDropoutBwdParams& p) {
        return cuda::bias_act_dropout_bwd_scratch(p);
    }
    int bwd(const BiasActDropoutBwdParams& p, float* scratch) {
        return cuda::launch_bias_act_dropout_bwd(p, scratch, nullptr);
    }
    bool takes(const LinearActParams& p) { return cuda::linear_act_takes(p); }
    int linear_act(const LinearActParams& p) { return cuda::launch_linear_act(p, nullptr); }
    int cross_entropy(const CrossEntropyParams& p) {
        return cuda::launch_cross_entropy(p, nullptr);
    }
};

}  // namespace fusedmlp
