// The ops behind the `native` engine of fusedmlp/train: training and evaluation of one network or
// of several at once. Checks and pointers, for cpu/step.h.
#include "bind/train_args.h"

namespace fusedmlp {
namespace {

// Of a network, beside its layers.
constexpr size_t kMemberInts = 8;    // rule, updates, seed, first_step, mask_layers, layers, batch,
                                     // epochs
constexpr size_t kMemberFloats = 6;  // smoothing, momentum, beta1, beta2, eps, max_norm

// Gives each network its layers, as many as counts says.
std::vector<cpu::Member>
members_of(const LayerArgs& args, const DataArgs& data, const std::vector<int64_t>& counts) {
    std::vector<cpu::Member> all(counts.size());
    size_t layer = 0;
    for (size_t m = 0; m < counts.size(); ++m) {
        if (counts[m] < 1 || counts[m] > int64_t(args.count() - layer))
            fail(
                args.op, ": a network must have at least 1 of the ", args.count(), " layers, got ",
                counts[m]
            );
        all[m].steps.layers = args.layers(layer, size_t(counts[m]), data.width);
        layer += size_t(counts[m]);
    }
    if (layer != args.count())
        fail(args.op, ": the layers of all networks must be ", args.count(), ", got ", layer);
    return all;
}

cpu::Slots slots_of(const char* op, const Tensor& work) {
    const View v = checked(op, "work", work, aoti_torch_dtype_float32());
    if (v.dim != 2 || v.sizes[0] < 1)
        fail(op, ": work must be (threads, floats), got ", v.shape());
    return {static_cast<float*>(v.data()), v.sizes[0], v.sizes[1]};
}

int64_t train(
    Tensor x,
    Tensor y,
    Tensors orders,
    OptionalTensor mean,
    OptionalTensor std,
    OptionalTensor weights,
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
    int64_t loss,
    bool is_bf16
) {
    const char* op = "train";
    check_precision(op, is_bf16);
    const DataArgs data(op, x, y, mean, std, divisor, loss);
    const float* row_weights = weights ? floats(op, "weights", *weights, data.rows) : nullptr;
    const LayerArgs args{op, params, m1, m2, ints, numbers};
    args.check();
    const size_t count = orders.size();
    if (count == 0 || lr_scales.size() != count || member_ints.size() != count * kMemberInts ||
        member_numbers.size() != count * kMemberFloats)
        fail(
            op, ": an order, an lr_scale, ", kMemberInts, " ints and ", kMemberFloats,
            " floats must be given for each of ", count, " networks"
        );
    std::vector<int64_t> counts;
    for (size_t m = 0; m < count; ++m)
        counts.push_back(member_ints[m * kMemberInts + 5]);
    std::vector<cpu::Member> all = members_of(args, data, counts);
    int64_t epochs = 0;
    for (size_t m = 0; m < count; ++m) {
        cpu::StepParams& p = all[m].steps;
        const int64_t* i = member_ints.data() + m * kMemberInts;
        data.fill(all[m], orders[m], i[6], i[7]);
        p.weights = row_weights;
        p.rule = rule_of(op, i[0]);
        p.updates = i[1];
        p.seed = i[2];
        p.first_step = i[3];
        p.mask_layers = i[4];
        const double* f = member_numbers.data() + m * kMemberFloats;
        p.is_bf16 = is_bf16;
        p.smoothing = float(f[0]);
        p.momentum = f[1];
        p.beta1 = f[2];
        p.beta2 = f[3];
        p.eps = f[4];
        p.max_norm = f[5];
        check_moments(op, p);
        if (View(lr_scales[m]).numel)
            p.lr_scale = scale_of(op, lr_scales[m], p, all[m].epochs);
        epochs += all[m].epochs;
    }
    double* sums = totals_of(op, totals, 3 * epochs);
    for (cpu::Member& m : all) {
        m.steps.totals = sums;
        sums += 3 * m.epochs;
    }
    const cpu::Slots slots = slots_of(op, work);
    const int64_t needed = cpu::train_work(all);
    if (slots.floats < needed || needed == 0)
        return needed;
    const Orders read(op, orders);
    for (const Tensors* all_of : {&params, &m1, &m2})
        for (const Tensor& t : *all_of)
            read.are_apart_from("params and their moments", t);
    read.are_apart_from("totals", totals);
    read.are_apart_from("work", work);
    data.check_orders(all);
    if (cpu::launch_train(all, slots, pool_parallel_for))
        throw std::runtime_error("train: the CPU kernel failed");
    return needed;
}

int64_t evaluate(
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
    int64_t loss,
    bool is_bf16
) {
    const char* op = "evaluate";
    check_precision(op, is_bf16);
    const DataArgs data(op, x, y, mean, std, divisor, loss);
    const Tensors none;
    const LayerArgs args{op, params, none, none, ints, numbers};
    args.check();
    const size_t count = orders.size();
    if (count == 0 || layers.size() != count)
        fail(op, ": an order and a number of layers must be given for each network");
    double* sums = totals_of(op, totals, int64_t(3 * count));
    std::vector<cpu::Member> all = members_of(args, data, layers);
    for (size_t m = 0; m < count; ++m) {
        data.fill(all[m], orders[m], batch, 1);
        all[m].steps.totals = sums + 3 * m;
        all[m].steps.is_bf16 = is_bf16;
        for (cpu::StepLayer& l : all[m].steps.layers) {
            l.layer.saves = kSavesNothing;
            l.layer.e.drop.threshold = 0;
        }
    }
    const cpu::Slots slots = slots_of(op, work);
    const int64_t needed = cpu::evaluate_work(all);
    if (slots.floats < needed || needed == 0)
        return needed;
    const Orders read(op, orders);
    read.are_apart_from("totals", totals);
    read.are_apart_from("work", work);
    data.check_orders(all);
    if (cpu::launch_evaluate(all, slots, pool_parallel_for))
        throw std::runtime_error("evaluate: the CPU kernel failed");
    return needed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedmlp, CPU, m) {
    m.impl("train.native", TORCH_BOX(&train));
    m.impl("evaluate.native", TORCH_BOX(&evaluate));
}

}  // namespace fusedmlp
