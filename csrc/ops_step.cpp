// The ops behind the `native` engine of fusedmlp/train: steps of one network, steps of several at
// once, and the loss over rows that are not trained on. Checks and pointers, for cpu/step.cpp.
#include "step_args.h"

namespace fusedmlp {
namespace {

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
    const char* op = "train_steps";
    const DataArgs data(op, x, y, mean, std, divisor, loss);
    const LayerArgs args{op, params, m1, m2, ints, numbers};
    args.check();
    cpu::StepParams p{};
    p.layers = args.layers(0, args.count(), data.width);
    data.fill(p, order, batch);
    p.smoothing = float(smoothing);
    p.seed = seed;
    p.first_step = first_step;
    p.mask_layers = mask_layers;
    p.rule = int(rule);
    check_rule(op, p);
    p.momentum = momentum;
    p.beta1 = beta1;
    p.beta2 = beta2;
    p.eps = eps;
    p.updates = updates;
    p.max_norm = max_norm;
    if (lr_scale)
        p.lr_scale = scale_of(op, *lr_scale, p);
    p.totals = totals_of(op, totals, 3);
    const View wv = checked(op, "work", work, aoti_torch_dtype_float32());
    const int64_t needed = cpu::step_work(p);
    if (wv.numel < needed || p.rows == 0)
        return needed;
    p.work = static_cast<float*>(wv.data());
    data.check_order(p);
    if (cpu::launch_steps(p, parallel_for))
        throw std::runtime_error("train_steps: the CPU kernel failed");
    return needed;
}

// Of a member, beside its layers.
constexpr size_t kMemberInts = 8;    // rule, updates, seed, first_step, mask_layers, layers, batch,
                                     // epochs
constexpr size_t kMemberFloats = 6;  // smoothing, momentum, beta1, beta2, eps, max_norm

// order: (epochs * rows,); leaves in p the rows of one epoch.
void take_order(
    const DataArgs& data,
    cpu::Member& member,
    const Tensor& order,
    int64_t batch,
    int64_t epochs
) {
    cpu::StepParams& p = member.steps;
    data.fill(p, order, batch);
    if (epochs < 1 || p.rows % epochs)
        fail(
            data.op, ": an order must hold equally many rows for each of its epochs, got ", p.rows,
            " for ", epochs
        );
    p.rows /= epochs;
    member.epochs = epochs;
}

void check_orders(const DataArgs& data, const std::vector<cpu::Member>& members) {
    for (const cpu::Member& m : members) {
        cpu::StepParams all;
        all.order = m.steps.order;
        all.rows = m.steps.rows * m.epochs;
        data.check_order(all);
    }
}

View slots_of(const char* op, const Tensor& work) {
    const View v = checked(op, "work", work, aoti_torch_dtype_float32());
    if (v.dim != 2 || v.sizes[0] < 1)
        fail(op, ": work must be (threads, floats), got ", v.shape());
    return v;
}

int64_t train_many(
    Tensor x,
    Tensor y,
    Tensors orders,
    OptionalTensor mean,
    OptionalTensor std,
    Tensors lr_scales,
    Tensors params,
    Tensors m1,
    Tensors m2,
    Tensor totals,
    Tensor work,
    std::vector<int64_t> ints,
    std::vector<double> numbers,
    std::vector<int64_t> member_ints,
    std::vector<double> member_numbers,
    double divisor,
    int64_t loss
) {
    const char* op = "train_many";
    const DataArgs data(op, x, y, mean, std, divisor, loss);
    const LayerArgs args{op, params, m1, m2, ints, numbers};
    args.check();
    const size_t count = orders.size();
    if (count == 0 || lr_scales.size() != count || member_ints.size() != count * kMemberInts ||
        member_numbers.size() != count * kMemberFloats)
        fail(
            op, ": an order, an lr_scale, ", kMemberInts, " ints and ", kMemberFloats,
            " floats must be given for each of ", count, " members"
        );
    std::vector<cpu::Member> all(count);
    size_t layer = 0;
    int64_t epochs = 0;
    for (size_t m = 0; m < count; ++m) {
        cpu::StepParams& p = all[m].steps;
        const int64_t* i = member_ints.data() + m * kMemberInts;
        p.layers = args.layers(layer, args.checked_layers(layer, i[5]), data.width);
        layer += p.layers.size();
        take_order(data, all[m], orders[m], i[6], i[7]);
        p.rule = int(i[0]);
        p.updates = i[1];
        p.seed = i[2];
        p.first_step = i[3];
        p.mask_layers = i[4];
        check_rule(op, p);
        const double* f = member_numbers.data() + m * kMemberFloats;
        p.smoothing = float(f[0]);
        p.momentum = f[1];
        p.beta1 = f[2];
        p.beta2 = f[3];
        p.eps = f[4];
        p.max_norm = f[5];
        if (View(lr_scales[m]).numel)
            p.lr_scale = scale_of(op, lr_scales[m], p, all[m].epochs);
        epochs += all[m].epochs;
    }
    if (layer != args.count())
        fail(op, ": the layers of all members must be ", args.count(), ", got ", layer);
    double* sums = totals_of(op, totals, 3 * epochs);
    for (cpu::Member& m : all) {
        m.steps.totals = sums;
        sums += 3 * m.epochs;
    }
    const View wv = slots_of(op, work);
    const int64_t needed = cpu::many_work(all, cpu::step_work);
    if (wv.sizes[1] < needed || needed == 0)
        return needed;
    check_orders(data, all);
    auto* memory = static_cast<float*>(wv.data());
    if (cpu::launch_many(all, memory, wv.sizes[0], wv.sizes[1], parallel_for))
        throw std::runtime_error("train_many: the CPU kernel failed");
    return needed;
}

// What the judging ops need of a network.
std::vector<cpu::StepLayer> judged(std::vector<cpu::StepLayer> layers) {
    for (cpu::StepLayer& l : layers) {
        l.saves = kSavesNothing;
        l.threshold = 0;
    }
    return layers;
}

int64_t judge_many(
    Tensor x,
    Tensor y,
    Tensors orders,
    OptionalTensor mean,
    OptionalTensor std,
    Tensors params,
    Tensor totals,
    Tensor work,
    std::vector<int64_t> ints,
    std::vector<double> numbers,
    std::vector<int64_t> layers,
    double divisor,
    int64_t batch,
    int64_t loss
) {
    const char* op = "judge_many";
    const DataArgs data(op, x, y, mean, std, divisor, loss);
    const Tensors none;
    const LayerArgs args{op, params, none, none, ints, numbers};
    args.check();
    const size_t count = orders.size();
    if (count == 0 || layers.size() != count)
        fail(op, ": an order and a number of layers must be given for each member");
    double* sums = totals_of(op, totals, int64_t(3 * count));
    std::vector<cpu::Member> all(count);
    size_t layer = 0;
    for (size_t m = 0; m < count; ++m) {
        cpu::StepParams& p = all[m].steps;
        p.layers = judged(args.layers(layer, args.checked_layers(layer, layers[m]), data.width));
        layer += p.layers.size();
        take_order(data, all[m], orders[m], batch, 1);
        p.totals = sums + 3 * m;
    }
    if (layer != args.count())
        fail(op, ": the layers of all members must be ", args.count(), ", got ", layer);
    const View wv = slots_of(op, work);
    const int64_t needed = cpu::many_work(all, cpu::judge_work);
    if (wv.sizes[1] < needed || needed == 0)
        return needed;
    check_orders(data, all);
    auto* memory = static_cast<float*>(wv.data());
    if (cpu::launch_judge_many(all, memory, wv.sizes[0], wv.sizes[1], parallel_for))
        throw std::runtime_error("judge_many: the CPU kernel failed");
    return needed;
}

int64_t judge_rows(
    Tensor x,
    Tensor y,
    Tensor order,
    OptionalTensor mean,
    OptionalTensor std,
    Tensors params,
    Tensor totals,
    Tensor work,
    std::vector<int64_t> ints,
    std::vector<double> numbers,
    double divisor,
    int64_t batch,
    int64_t loss
) {
    const char* op = "judge_rows";
    const DataArgs data(op, x, y, mean, std, divisor, loss);
    const Tensors none;
    const LayerArgs args{op, params, none, none, ints, numbers};
    args.check();
    cpu::StepParams p{};
    p.layers = judged(args.layers(0, args.count(), data.width));
    data.fill(p, order, batch);
    p.totals = totals_of(op, totals, 3);
    const View wv = checked(op, "work", work, aoti_torch_dtype_float32());
    const int64_t needed = cpu::judge_work(p);
    if (wv.numel < needed || p.rows == 0)
        return needed;
    p.work = static_cast<float*>(wv.data());
    data.check_order(p);
    if (cpu::launch_judge(p, parallel_for))
        throw std::runtime_error("judge_rows: the CPU kernel failed");
    return needed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedmlp, CPU, m) {
    m.impl("train_steps.native", TORCH_BOX(&train_steps));
    m.impl("train_many.native", TORCH_BOX(&train_many));
    m.impl("judge_rows.native", TORCH_BOX(&judge_rows));
    m.impl("judge_many.native", TORCH_BOX(&judge_many));
}

}  // namespace fusedmlp
