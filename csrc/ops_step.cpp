// The op behind the `native` engine of fusedmlp/train: checks, and pointers for cpu/step.cpp. The
// schema, and what each argument is, are in fusedmlp/train/native_op.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu/step.h"

namespace fusedmlp {
namespace {

constexpr const char* kOp = "train_steps";
constexpr size_t kInts = 4;    // of a layer: act, saves, threshold, number
constexpr size_t kFloats = 8;  // alpha, scale, then learning rate and weight decay of w, b, slope
constexpr size_t kParams = 3;  // w, b, slope; one that is not there has no elements

int parallel_for(
    int64_t begin,
    int64_t end,
    int64_t grain,
    void (*body)(int64_t, int64_t, void*),
    void* context
) {
    return torch_parallel_for(begin, end, grain, body, context);
}

View checked(const char* name, const Tensor& t, int32_t dtype) {
    const View v(t);
    if (v.layout != aoti_torch_layout_strided() || v.dtype != dtype || !v.contiguous() ||
        v.device_type != aoti_torch_device_type_cpu())
        fail(
            kOp, ": ", name, " must be contiguous ", dtype_name(dtype), " on the CPU, got ",
            dtype_name(v.dtype), " ", v.shape(), " on ", device_name(v)
        );
    return v;
}

float* floats(const char* name, const Tensor& t, int64_t size) {
    const View v = checked(name, t, aoti_torch_dtype_float32());
    if (v.numel != size)
        fail(kOp, ": ", name, " must have ", size, " elements, got ", v.shape());
    return size ? static_cast<float*>(v.data()) : nullptr;
}

using Tensors = std::vector<Tensor>;

cpu::StepParam parameter(
    const char* name,
    size_t at,
    int64_t size,
    const Tensors& params,
    const Tensors& m1,
    const Tensors& m2,
    const double* rates
) {
    cpu::StepParam p{};
    if (View(params[at]).numel == 0 && size != 0)
        return p;
    p.value = floats(name, params[at], size);
    if (!m1.empty())
        p.m1 = floats(name, m1[at], size);
    if (!m2.empty())
        p.m2 = floats(name, m2[at], size);
    p.size = size;
    p.lr = rates[0];
    p.weight_decay = rates[1];
    return p;
}

std::vector<cpu::StepLayer> layers_of(
    const Tensors& params,
    const Tensors& m1,
    const Tensors& m2,
    const std::vector<int64_t>& ints,
    const std::vector<double>& numbers,
    int64_t width
) {
    const size_t count = ints.size() / kInts;
    if (count == 0 || ints.size() != count * kInts || numbers.size() != count * kFloats ||
        params.size() != count * kParams || (!m1.empty() && m1.size() != params.size()) ||
        (!m2.empty() && m2.size() != params.size()))
        fail(
            kOp, ": ", kInts, " ints, ", kFloats, " floats and ", kParams,
            " tensors must be given for each layer"
        );
    std::vector<cpu::StepLayer> layers(count);
    for (size_t i = 0; i < count; ++i) {
        cpu::StepLayer& l = layers[i];
        const int64_t* n = ints.data() + i * kInts;
        const double* f = numbers.data() + i * kFloats;
        const View w = checked("weight", params[i * kParams], aoti_torch_dtype_float32());
        if (w.dim != 2 || w.sizes[1] != width || w.numel == 0)
            fail(kOp, ": weight ", i, " must be (N, ", width, "), got ", w.shape());
        l.n = w.sizes[0];
        l.k = width;
        width = l.n;
        if (n[0] < 0 || n[0] >= kActCount)
            fail(kOp, ": act must be an id in [0, ", int(kActCount), "), got ", n[0]);
        l.act = int(n[0]);
        l.saves = int(n[1]);
        const bool possible = l.act == kNone       ? l.saves == kSavesNothing
                              : l.saves == kSavesY ? act_has_grad_y(l.act)
                                                   : l.saves == kSavesZ;
        if (!possible)
            fail(
                kOp, ": saves must be one that ", kActNames[l.act],
                " can be differentiated from, got ", n[1]
            );
        if (n[2] < 0 || n[2] > int64_t(1) << 32)
            fail(kOp, ": threshold must be in [0, 2^32], got ", n[2]);
        l.threshold = uint64_t(n[2]);
        l.layer = n[3];
        l.alpha = float(f[0]);
        l.scale = float(f[1]);
        const size_t at = i * kParams;
        l.w = parameter("weight", at, w.numel, params, m1, m2, f + 2);
        l.b = parameter("bias", at + 1, l.n, params, m1, m2, f + 4);
        if (l.act != kPrelu)
            continue;
        const int64_t slopes = View(params[at + 2]).numel;
        if (slopes != 1 && slopes != l.n)
            fail(kOp, ": slope must have 1 or N = ", l.n, " elements for prelu, got ", slopes);
        l.slope = parameter("slope", at + 2, slopes, params, m1, m2, f + 6);
    }
    return layers;
}

void check_order(const View& order, int64_t rows) {
    const auto* numbers = static_cast<const int64_t*>(order.data());
    for (int64_t i = 0; i < order.numel; ++i)
        if (numbers[i] < 0 || numbers[i] >= rows)
            fail(kOp, ": order must hold rows of the data, in [0, ", rows, "), got ", numbers[i]);
}

int64_t train_steps(
    Tensor x,
    Tensor y,
    Tensor order,
    OptionalTensor mean,
    OptionalTensor std,
    OptionalTensor lr_scale,
    Tensors params,
    Tensors m1,
    Tensors m2,
    Tensor totals,
    Tensor work,
    std::vector<int64_t> ints,
    std::vector<double> numbers,
    double divisor,
    int64_t batch,
    int64_t loss,
    double smoothing,
    int64_t rule,
    double momentum,
    double beta1,
    double beta2,
    double eps,
    int64_t updates,
    double max_norm,
    int64_t seed,
    int64_t first_step,
    int64_t mask_layers
) {
    const int32_t f32 = aoti_torch_dtype_float32(), i64 = aoti_torch_dtype_int64();
    const int32_t f64 = aoti_torch_dtype_float64();
    cpu::StepParams p{};
    const View xv(x), yv(y), ov = checked("order", order, i64);
    p.scaling.is_bytes = xv.dtype == aoti_torch_dtype_uint8();
    checked("x", x, p.scaling.is_bytes ? xv.dtype : f32);
    if (xv.dim == 0 || xv.numel == 0)
        fail(kOp, ": x must be (n, ...) rows, got ", xv.shape());
    const int64_t rows = xv.sizes[0];
    p.scaling.rows = xv.data();
    p.scaling.width = xv.numel / rows;
    p.scaling.divisor = float(divisor);
    if (mean && std) {
        p.scaling.mean_size = View(*mean).numel;
        if (p.scaling.mean_size != 1 && p.scaling.mean_size != p.scaling.width)
            fail(
                kOp, ": mean must have 1 or ", p.scaling.width, " elements, got ",
                p.scaling.mean_size
            );
        p.scaling.mean = floats("mean", *mean, p.scaling.mean_size);
        p.scaling.std = floats("std", *std, p.scaling.mean_size);
    }
    p.layers = layers_of(params, m1, m2, ints, numbers, p.scaling.width);

    const bool is_classes = loss == cpu::kCrossEntropy;
    checked("y", y, is_classes ? i64 : f32);
    const int64_t outputs = p.layers.back().n;
    if (yv.dim == 0 || yv.sizes[0] != rows || yv.numel != (is_classes ? rows : rows * outputs))
        fail(
            kOp, ": y must be (", rows,
            is_classes ? ",)" : ", N) with N = ", is_classes ? 0 : outputs, ", got ", yv.shape()
        );
    p.targets = yv.data();
    p.loss = int(loss);
    p.smoothing = float(smoothing);
    if (batch < 1)
        fail(kOp, ": batch must be at least 1, got ", batch);
    p.order = static_cast<const int64_t*>(ov.data());
    p.rows = ov.numel;
    p.batch = batch;
    p.seed = seed;
    p.first_step = first_step;
    p.mask_layers = mask_layers;
    if (rule < cpu::kSgd || rule > cpu::kAdamW)
        fail(kOp, ": rule must be 0, 1 or 2, got ", rule);
    if (rule == cpu::kAdamW && (m1.empty() || m2.empty()))
        fail(kOp, ": AdamW needs both moments");
    p.rule = int(rule);
    p.momentum = momentum;
    p.beta1 = beta1;
    p.beta2 = beta2;
    p.eps = eps;
    p.updates = updates;
    p.max_norm = max_norm;
    const int64_t steps = (p.rows + batch - 1) / batch;
    if (lr_scale) {
        const View v = checked("lr_scale", *lr_scale, f64);
        if (v.numel != steps)
            fail(kOp, ": lr_scale must have one number a step, ", steps, ", got ", v.shape());
        p.lr_scale = static_cast<const double*>(v.data());
    }
    const View tv = checked("totals", totals, f64), wv = checked("work", work, f32);
    if (tv.numel != 3)
        fail(kOp, ": totals must be (3,), got ", tv.shape());
    p.totals = static_cast<double*>(tv.data());

    const int64_t needed = cpu::step_work(p);
    if (wv.numel < needed || p.rows == 0)
        return needed;
    p.work = static_cast<float*>(wv.data());
    check_order(ov, rows);
    if (cpu::launch_steps(p, parallel_for))
        throw std::runtime_error("train_steps: the CPU kernel failed");
    return needed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedmlp, CPU, m) {
    m.impl("train_steps.native", TORCH_BOX(&train_steps));
}

}  // namespace fusedmlp
