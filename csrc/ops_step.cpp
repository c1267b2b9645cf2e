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
    if (cpu::launch_steps(p, step_parallel_for))
        throw std::runtime_error("train_steps: the CPU kernel failed");
    return needed;
}

// Of a member, beside its layers.
constexpr size_t kMemberInts = 5;    // rule, updates, seed, first_step, mask_layers
constexpr size_t kMemberFloats = 6;  // smoothing, momentum, beta1, beta2, eps, max_norm

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
    int64_t batch,
    int64_t loss
) {
    const char* op = "train_many";
    const DataArgs data(op, x, y, mean, std, divisor, loss);
    const LayerArgs args{op, params, m1, m2, ints, numbers};
    args.check();
    const size_t members = orders.size(), each = members ? args.count() / members : 0;
    if (each == 0 || each * members != args.count() || lr_scales.size() != members ||
        member_ints.size() != members * kMemberInts ||
        member_numbers.size() != members * kMemberFloats)
        fail(
            op, ": an order, an lr_scale, ", kMemberInts, " ints, ", kMemberFloats,
            " floats and equally many layers must be given for each of ", members, " members"
        );
    double* sums = totals_of(op, totals, int64_t(3 * members));
    std::vector<cpu::StepParams> all(members);
    for (size_t m = 0; m < members; ++m) {
        cpu::StepParams& p = all[m];
        p.layers = args.layers(m * each, each, data.width);
        data.fill(p, orders[m], batch);
        const int64_t* i = member_ints.data() + m * kMemberInts;
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
            p.lr_scale = scale_of(op, lr_scales[m], p);
        p.totals = sums + 3 * m;
    }
    const View wv = checked(op, "work", work, aoti_torch_dtype_float32());
    if (wv.dim != 2 || wv.sizes[0] < 1)
        fail(op, ": work must be (threads, floats), got ", wv.shape());
    const int64_t needed = cpu::many_work(all);
    if (wv.sizes[1] < needed || needed == 0)
        return needed;
    for (const cpu::StepParams& p : all)
        data.check_order(p);
    auto* memory = static_cast<float*>(wv.data());
    if (cpu::launch_many(all, memory, wv.sizes[0], wv.sizes[1], step_parallel_for))
        throw std::runtime_error("train_many: the CPU kernel failed");
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
    p.layers = args.layers(0, args.count(), data.width);
    for (cpu::StepLayer& l : p.layers) {
        l.saves = kSavesNothing;
        l.threshold = 0;
    }
    data.fill(p, order, batch);
    p.totals = totals_of(op, totals, 3);
    const View wv = checked(op, "work", work, aoti_torch_dtype_float32());
    const int64_t needed = cpu::judge_work(p);
    if (wv.numel < needed || p.rows == 0)
        return needed;
    p.work = static_cast<float*>(wv.data());
    data.check_order(p);
    if (cpu::launch_judge(p, step_parallel_for))
        throw std::runtime_error("judge_rows: the CPU kernel failed");
    return needed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedmlp, CPU, m) {
    m.impl("train_steps.native", TORCH_BOX(&train_steps));
    m.impl("train_many.native", TORCH_BOX(&train_many));
    m.impl("judge_rows.native", TORCH_BOX(&judge_rows));
}

}  // namespace fusedmlp
