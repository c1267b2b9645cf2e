// The `native` ops for CPU tensors. ops_common.h holds what they do, cpu/ the kernels.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "ops_common.h"

namespace fusedmlp {
namespace {

int parallel_for(
    int64_t begin,
    int64_t end,
    int64_t grain,
    void (*body)(int64_t, int64_t, void*),
    void* context
) {
    return torch_parallel_for(begin, end, grain, body, context);
}

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
        int32_t dtype = 0;
        int64_t* sizes = nullptr;
        BiasActDropoutFwdParams p{};
        bool dense = false;
        if (aoti_torch_get_dtype(out, &dtype) || aoti_torch_is_contiguous(b, &dense))
            return 1;
        if (dtype != aoti_torch_dtype_float32() || !dense)
            return aoti_torch_cpu_addmm_out(out, b, x, w, 1.0, 1.0);
        // In fp32, where both round alike, the epilogue is quicker: 1.4 us of 6 at 1 x 8 x 8.
        void* bias = nullptr;
        if (mm(out, x, w) || aoti_torch_get_sizes(out, &sizes) ||
            aoti_torch_get_data_ptr(out, &p.y) || aoti_torch_get_data_ptr(b, &bias))
            return 1;
        p.x = p.y;
        p.e.bias = bias;
        p.e.rows = sizes[0];
        p.e.cols = sizes[1];
        return fwd(p);
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
