// The `native` ops for CUDA tensors. ops_common.h holds what they do, cuda/ the kernels.
// Tests bring a device of their own: CPU tensors and a machine that runs PTX.
#ifndef FUSEDMLP_DISPATCH_KEY
#    include "bind/device_cuda.h"
#endif

#include "bind/ops_mlp.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fusedmlp {
namespace {

constexpr const char* kCrossEntropy = "cross_entropy";

// losses (M,) fp32, and dx (M, C) = grad_scale times the gradient of their sum.
std::tuple<Tensor, Tensor> cross_entropy(
    Tensor x,
    Tensor target,
    double label_smoothing,
    int64_t ignore_index,
    double grad_scale
) {
    const char* op = kCrossEntropy;
    const View xv(x), tv(target);
    CrossEntropyParams p{};
    p.dtype = check_tensor(op, "input", xv);
    if (xv.dim != 2 || xv.sizes[1] == 0)
        fail(op, ": input must be (M, C) with at least one class, got ", xv.shape());
    if (tv.dtype != aoti_torch_dtype_int64() || tv.dim != 1 || tv.sizes[0] != xv.sizes[0])
        fail(
            op, ": target must be an int64 tensor (M,) with M = ", xv.sizes[0], " to match input ",
            xv.shape(), ", got ", dtype_name(tv.dtype), " ", tv.shape()
        );
    check_same_device(op, "target", tv, xv);
    if (!(label_smoothing >= 0.0 && label_smoothing <= 1.0))
        fail(op, ": label_smoothing must be in [0, 1], got ", label_smoothing);

    Device device(op, xv);
    const Tensor losses = empty(op, device, xv.sizes, 1, aoti_torch_dtype_float32());
    const Tensor dx = empty(op, device, xv.sizes, 2, xv.dtype);
    if (xv.numel == 0)
        return {losses, dx};
    const Dense dense_x(x), dense_target(target);
    p.losses = static_cast<float*>(View(losses).data());
    p.dx = View(dx).data();
    p.x = dense_x.data();
    p.target = static_cast<const int64_t*>(dense_target.data());
    p.ignore_index = ignore_index;
    p.smoothing = float(label_smoothing);
    p.factor = float(grad_scale);
    p.rows = xv.sizes[0];
    p.cols = xv.sizes[1];
    check_kernel(device.cross_entropy(p), op);
    return {losses, dx};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedmlp, FUSEDMLP_DISPATCH_KEY, m) {
    m.impl("linear_act_fwd.native", TORCH_BOX(&linear_act_fwd<Device>));
    m.impl("linear_act_infer.native", TORCH_BOX(&linear_act_infer<Device>));
    m.impl("bias_act_dropout_fwd.native", TORCH_BOX(&bias_act_dropout_fwd<Device>));
    m.impl("bias_act_dropout_bwd.native", TORCH_BOX(&bias_act_dropout_bwd<Device>));
    m.impl("mlp_fwd.native", TORCH_BOX(&mlp_fwd<Device>));
    m.impl("mlp_bwd.native", TORCH_BOX(&mlp_bwd<Device>));
    m.impl("cross_entropy.native", TORCH_BOX(&cross_entropy));
}

}  // namespace fusedmlp

// "none=0 relu=1 ...", which Python compares with its own table.
EXPORT const char* fusedmlp_activations() {
    static const std::string table = [] {
        std::string text;
        for (int i = 0; i < fusedmlp::kActCount; ++i)
            text.append(i ? " " : "")
                .append(fusedmlp::kActNames[i])
                .append("=")
                .append(std::to_string(i));
        return text;
    }();
    return table.c_str();
}
