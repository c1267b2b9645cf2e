// What the ops over whole networks have in common: checks of their arguments, and pointers
// for cpu/step.h. What each argument is, is said in fusedmlp/train/engines/native_op.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "bind/checks.h"
#include "bind/parallel_for.h"
#include "cpu/step.h"

namespace fusedmlp {

constexpr size_t kInts = 4;    // of a layer: act, saves, threshold, stream offset
constexpr size_t kFloats = 8;  // alpha, scale, then learning rate and weight decay of w, b, slope
constexpr size_t kParams = 3;  // w, b, slope; one that is not there has no elements

using Tensors = std::vector<Tensor>;

inline View checked(const char* op, const char* name, const Tensor& t, int32_t dtype) {
    const View v(t);
    if (v.layout != aoti_torch_layout_strided() || v.dtype != dtype || !v.contiguous() ||
        v.device_type != aoti_torch_device_type_cpu())
        fail(
            op, ": ", name, " must be contiguous ", dtype_name(dtype), " on the CPU, got ",
            dtype_name(v.dtype), " ", v.shape(), " on ", device_name(v)
        );
    return v;
}

inline float* floats(const char* op, const char* name, const Tensor& t, int64_t size) {
    const View v = checked(op, name, t, aoti_torch_dtype_float32());
    if (v.numel != size)
        fail(op, ": ", name, " must have ", size, " elements, got ", v.shape());
    return size ? static_cast<float*>(v.data()) : nullptr;
}

// The layers of one network: its part of the lists, from entry `first` of each on.
struct LayerArgs {
    const char* op;
    const Tensors& params;
    const Tensors& m1;
    const Tensors& m2;
    const std::vector<int64_t>& ints;
    const std::vector<double>& numbers;

    size_t count() const { return ints.size() / kInts; }

    void check() const {
        const size_t n = count();
        if (n == 0 || ints.size() != n * kInts || numbers.size() != n * kFloats ||
            params.size() != n * kParams || (!m1.empty() && m1.size() != params.size()) ||
            (!m2.empty() && m2.size() != params.size()))
            fail(
                op, ": ", kInts, " ints, ", kFloats, " floats and ", kParams,
                " tensors must be given for each layer"
            );
    }

    float* moment(const Tensors& list, size_t at, int64_t size) const {
        return list.empty() || View(list[at]).numel == 0 ? nullptr
                                                         : floats(op, "state", list[at], size);
    }

    cpu::StepParam parameter(const char* name, size_t at, int64_t size, const double* rates) const {
        cpu::StepParam p{};
        if (View(params[at]).numel == 0 && size != 0)
            return p;
        p.value = floats(op, name, params[at], size);
        p.m1 = moment(m1, at, size);
        p.m2 = moment(m2, at, size);
        p.size = size;
        p.lr = rates[0];
        p.weight_decay = rates[1];
        return p;
    }

    cpu::StepLayer layer(size_t i, int64_t width) const {
        cpu::StepLayer l{};
        const int64_t* n = ints.data() + i * kInts;
        const double* f = numbers.data() + i * kFloats;
        const View w = checked(op, "weight", params[i * kParams], aoti_torch_dtype_float32());
        if (w.dim != 2 || w.sizes[1] != width || w.numel == 0)
            fail(op, ": weight ", i, " must be (N, ", width, "), got ", w.shape());
        const int64_t outputs = w.sizes[0];
        l.layer.k = width;
        EpilogueParams& e = l.layer.e;
        e.dtype = e.bias_dtype = e.slope_dtype = Dtype::kFloat32;
        e.cols = outputs;
        if (n[0] < 0 || n[0] >= kActCount)
            fail(op, ": act must be an id in [0, ", int(kActCount), "), got ", n[0]);
        e.act = int(n[0]);
        l.layer.saves = int(n[1]);
        if (!(e.act == kNone ? n[1] == kSavesNothing : can_read(e.act, f[0], n[1])))
            fail(
                op, ": saves must be one that ", kActNames[e.act],
                " can be differentiated from, got ", n[1]
            );
        if (n[2] < 0 || n[2] > int64_t(1) << 32)
            fail(op, ": threshold must be in [0, 2^32], got ", n[2]);
        e.drop = {nullptr, uint64_t(n[2]), float(f[1]), n[3], 0};
        e.alpha = float(f[0]);
        const size_t at = i * kParams;
        l.w = parameter("weight", at, w.numel, f + 2);
        l.layer.w = l.w.value;
        l.b = parameter("bias", at + 1, outputs, f + 4);
        e.bias = l.b.value;
        if (e.act != kPrelu)
            return l;
        const int64_t slopes = View(params[at + 2]).numel;
        if (slopes != 1 && slopes != outputs)
            fail(op, ": slope must have 1 or N = ", outputs, " elements for prelu, got ", slopes);
        l.slope = parameter("slope", at + 2, slopes, f + 6);
        e.slope = l.slope.value;
        e.slope_size = slopes;
        return l;
    }

    std::vector<cpu::StepLayer> layers(size_t first, size_t n, int64_t width) const {
        std::vector<cpu::StepLayer> found;
        for (size_t i = first; i < first + n; ++i) {
            found.push_back(layer(i, width));
            width = found.back().layer.n();
        }
        return found;
    }
};

// The data of all networks of a call.
struct DataArgs {
    const char* op;
    int64_t rows = 0;
    int64_t width = 0;
    cpu::ScalingParams scaling{};
    int loss = 0;
    View y;

    DataArgs(
        const char* op_,
        const Tensor& x,
        const Tensor& y_,
        const OptionalTensor& mean,
        const OptionalTensor& std,
        double divisor,
        int64_t loss_
    )
        : op(op_), loss(int(loss_)),
          y(checked(
              op_,
              "y",
              y_,
              loss_ == cpu::kCrossEntropy ? aoti_torch_dtype_int64() : aoti_torch_dtype_float32()
          )) {
        if (loss_ < cpu::kCrossEntropy || loss_ > cpu::kLogistic)
            fail(op, ": loss must be 0, 1 or 2, got ", loss_);
        const View xv(x);
        scaling.is_bytes = xv.dtype == aoti_torch_dtype_uint8();
        checked(op, "x", x, scaling.is_bytes ? xv.dtype : aoti_torch_dtype_float32());
        if (xv.dim == 0 || xv.numel == 0)
            fail(op, ": x must be (n, ...) rows, got ", xv.shape());
        rows = xv.sizes[0];
        width = xv.numel / rows;
        scaling.rows = xv.data();
        scaling.width = width;
        scaling.divisor = float(divisor);
        if (!mean != !std)
            fail(op, ": mean and std must be given together");
        if (!mean)
            return;
        scaling.mean_size = View(*mean).numel;
        if (scaling.mean_size != 1 && scaling.mean_size != width)
            fail(op, ": mean must have 1 or ", width, " elements, got ", scaling.mean_size);
        scaling.mean = floats(op, "mean", *mean, scaling.mean_size);
        scaling.std = floats(op, "std", *std, scaling.mean_size);
    }

    // Data and rows of a network that has its layers. order: (epochs * rows,)
    void fill(cpu::Member& member, const Tensor& order, int64_t batch, int64_t epochs) const {
        cpu::StepParams& p = member.steps;
        const bool is_classes = loss == cpu::kCrossEntropy;
        const int64_t outputs = p.layers.back().layer.n();
        if (y.dim == 0 || y.sizes[0] != rows || y.numel != (is_classes ? rows : rows * outputs))
            fail(
                op, ": y must be (", rows,
                is_classes ? ",)" : ", N) with N = ", is_classes ? 0 : outputs, ", got ", y.shape()
            );
        if (batch < 1)
            fail(op, ": batch must be at least 1, got ", batch);
        const View ov = checked(op, "order", order, aoti_torch_dtype_int64());
        if (epochs < 1 || epochs > std::max<int64_t>(1, ov.numel) || ov.numel % epochs)
            fail(
                op, ": an order must hold equally many rows for each of its epochs, got ", ov.numel,
                " for ", epochs
            );
        member.epochs = epochs;
        p.scaling = scaling;
        p.targets = y.data();
        p.loss = loss;
        p.order = ov.numel ? static_cast<const int64_t*>(ov.data()) : nullptr;
        p.rows = ov.numel / epochs;
        // Sums of rows and batches would overflow with a larger one.
        p.batch = std::min(batch, std::max<int64_t>(1, p.rows));
    }

    void check_orders(const std::vector<cpu::Member>& members) const {
        for (const cpu::Member& m : members)
            for (int64_t i = 0; i < m.steps.rows * m.epochs; ++i)
                if (m.steps.order[i] < 0 || m.steps.order[i] >= rows)
                    fail(
                        op, ": order must hold rows of the data, in [0, ", rows, "), got ",
                        m.steps.order[i]
                    );
    }
};

inline void check_precision(const char* op, bool is_bf16) {
    if (is_bf16 && !cpu::gemm_bf16())
        fail(op, ": bf16 must be false where the processor has no products in bf16, got true");
}

inline int rule_of(const char* op, int64_t rule) {
    if (rule < cpu::kSgd || rule > cpu::kAdamEpsilonHat)
        fail(op, ": rule must be in [0, 4], got ", rule);
    return int(rule);
}

// That the rule has the moments that it needs.
inline void check_moments(const char* op, const cpu::StepParams& p) {
    const bool is_adam = cpu::has_moments(p.rule);
    if (!is_adam && p.momentum == 0)
        return;
    for (const cpu::StepLayer& l : p.layers)
        for (const cpu::StepParam* w : {&l.w, &l.b, &l.slope})
            if (w->value && !(w->m1 && (w->m2 || !is_adam)))
                fail(op, is_adam ? ": Adam needs both moments" : ": momentum needs the first one");
}

// Orders are checked before they are read again, so what is written may not lie in them.
class Orders {
  public:
    Orders(const char* op, const Tensors& orders) : op_(op) {
        for (const Tensor& order : orders)
            spans_.push_back(span_of(View(order), sizeof(int64_t)));
    }
    void are_apart_from(const char* name, const Tensor& t) const {
        const View v(t);
        const Span written = span_of(v, v.dtype == aoti_torch_dtype_float64() ? 8 : 4);
        for (const Span& order : spans_)
            if (order.begin < written.end && written.begin < order.end)
                fail(op_, ": order must not share memory with ", name);
    }

  private:
    struct Span {
        const char* begin;
        const char* end;
    };
    static Span span_of(const View& v, int64_t size) {
        const char* const at = v.numel ? static_cast<const char*>(v.data()) : nullptr;
        return {at, at + v.numel * size};
    }
    const char* op_;
    std::vector<Span> spans_;
};

inline const double*
scale_of(const char* op, const Tensor& lr_scale, const cpu::StepParams& p, int64_t epochs) {
    const View v = checked(op, "lr_scale", lr_scale, aoti_torch_dtype_float64());
    const int64_t steps = (p.rows + p.batch - 1) / p.batch * epochs;
    if (v.numel != steps)
        fail(op, ": lr_scale must have one number a step, ", steps, ", got ", v.shape());
    return steps ? static_cast<const double*>(v.data()) : nullptr;
}

inline double* totals_of(const char* op, const Tensor& totals, int64_t size) {
    const View v = checked(op, "totals", totals, aoti_torch_dtype_float64());
    if (v.numel != size)
        fail(op, ": totals must have ", size, " elements, got ", v.shape());
    return static_cast<double*>(v.data());
}

}  // namespace fusedmlp
