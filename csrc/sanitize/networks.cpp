// Whole networks: the op mlp, training, evaluation, and several networks at once.
#include "sanitize/harness.h"

#include "cpu/mlp.h"
#include "cpu/plan.h"
#include "cpu/step.h"

namespace fusedmlp::cpu {
namespace {

// --- networks

struct Shape {
    std::vector<int64_t> sizes;  // inputs, hidden layers, outputs
    int64_t rows;
};

// What a network is made of; kinds counts through activations and whatever else there is.
struct Net {
    Net(const std::vector<int64_t>& sizes, size_t kind, bool drops) {
        for (size_t i = 0; i + 1 < sizes.size(); ++i) {
            const int64_t k = sizes[i], n = sizes[i + 1];
            const bool is_last = i + 2 == sizes.size();
            const int act = is_last ? (kind % 4 == 3 ? kTanh : kNone) : int((kind + i) % kActCount);
            acts.push_back(act);
            thresholds.push_back(drops && !is_last ? kSomeDrop : kNoneDrops);
            w.push_back(randoms(n * k, 1.0f / std::sqrt(float(k))));
            b.push_back(randoms((kind + i) % 5 == 4 ? 0 : n, 0.1f));
            slope.push_back(randoms(act == kPrelu ? (kind % 2 ? 1 : n) : 0, 0.1f));
        }
    }
    size_t count() const { return w.size(); }
    bool drops(size_t i) const { return thresholds[i] != kNoneDrops; }
    int saves(size_t i) const { return act_saves(acts[i], 0.01, drops(i), false); }

    std::vector<int> acts;
    std::vector<uint64_t> thresholds;
    std::vector<Floats> w, b, slope;
};

float* or_null(Floats& v) { return v.empty() ? nullptr : v.data(); }

// --- the op mlp

Result mlp(Net& net, const Shape& s, const Floats& x, const Floats& dy, bool keeps, ParallelFor f) {
    const int64_t state[2] = {11, 2}, m = s.rows;
    const size_t count = net.count();
    std::vector<Floats> y(count), h(count), dw(count), db(count), dslope(count);
    MlpParams p{};
    p.x = x.data(), p.rows = m;
    for (size_t i = 0; i < count; ++i) {
        const int64_t k = s.sizes[i], n = s.sizes[i + 1];
        EpilogueParams e{};
        e.bias = or_null(net.b[i]), e.slope = or_null(net.slope[i]);
        e.slope_size = int64_t(net.slope[i].size());
        e.act = net.acts[i], e.alpha = 0.01f, e.cols = n;
        e.drop = {state, net.thresholds[i], 1.0f / 0.7f, int64_t(i), 0};
        p.layers.push_back({net.w[i].data(), k, net.saves(i), e});
        MlpOutputs out{};
        if (keeps || i + 1 == count)
            out.y = (y[i] = unwritten(m * n)).data();
        if (keeps && net.saves(i) == kSavesZ)
            out.h = (h[i] = unwritten(m * n)).data();
        p.out.push_back(out);
    }
    Floats work = unwritten(mlp_fwd_work(p));
    p.work = work.data();
    launch_mlp_fwd(p, f);
    Result r;
    for (const Floats& one : y)
        r.add(one);
    if (!keeps)
        return r;
    for (size_t i = 0; i < count; ++i) {
        MlpOutputs& out = p.out[i];
        out.dw = (dw[i] = unwritten(int64_t(net.w[i].size()))).data();
        db[i] = unwritten(int64_t(net.b[i].size())), out.db = or_null(db[i]);
        dslope[i] = unwritten(int64_t(net.slope[i].size())), out.dslope = or_null(dslope[i]);
    }
    Floats dx = unwritten(m * s.sizes[0]);
    p.dx = dx.data(), p.dy = dy.data(), p.first = 0;
    work = unwritten(mlp_bwd_work(p)), p.work = work.data();
    launch_mlp_bwd(p, f);
    r.add(dx);
    for (const auto* all : {&dw, &db, &dslope})
        for (const Floats& one : *all)
            r.add(one);
    return r;
}

// --- training and evaluation

// Rows of data with targets of every loss.
struct Data {
    explicit Data(int64_t width, int64_t outputs) : floats(randoms(kRows * width)) {
        for (int64_t i = 0; i < kRows * width; ++i)
            bytes.push_back(uint8_t(dice() % 4));
        for (int64_t i = 0; i < kRows; ++i)
            labels.push_back(any(0, outputs - 1));
        for (int64_t i = 0; i < kRows * outputs; ++i)
            values.push_back(float(dice() % 2));
        for (int64_t i = 0; i < kRows; ++i)
            weights.push_back(float(dice() % 3));
        mean = randoms(width), std = Floats(size_t(width), 1.5f);
    }
    static constexpr int64_t kRows = 1000;
    Floats floats, mean, std, values, weights;
    std::vector<uint8_t> bytes;
    std::vector<int64_t> labels;
};

// One network in training: a copy of its weights, and what the optimiser keeps.
struct Trained {
    Trained(const Net& of, const Data& data, const Shape& s, size_t kind, int64_t epochs)
        : net(of) {
        p.rule = int(kind % 5), p.loss = int(kind % 3);
        const int64_t width = s.sizes[0];
        p.scaling = {data.floats.data(), false, 1.0f, nullptr, nullptr, 0, width};
        if (kind % 2)
            p.scaling = {
                data.bytes.data(), true, kind % 4 == 1 ? 255.0f : 1.0f, nullptr, nullptr, 0, width
            };
        if (kind % 3 == 0)
            p.scaling.mean = data.mean.data(), p.scaling.std = data.std.data(),
            p.scaling.mean_size = kind % 2 ? 1 : width;
        p.targets = p.loss == kCrossEntropy ? static_cast<const void*>(data.labels.data())
                                            : data.values.data();
        p.weights = kind % 4 < 2 ? data.weights.data() : nullptr;
        p.smoothing = kind % 4 == 2 ? 0.1f : 0.0f;
        p.is_bf16 = gemm_bf16() != nullptr;
        p.batch = s.rows, p.rows = std::min(Data::kRows, 2 * s.rows + s.rows / 3 + 1);
        p.seed = 5, p.first_step = 3, p.mask_layers = int64_t(net.count());
        p.momentum = kind % 2 ? 0.9 : 0.0, p.beta1 = 0.9, p.beta2 = 0.999, p.eps = 1e-8;
        p.max_norm = kind % 3 == 1 ? 0.5 : 0.0;
        const size_t steps = size_t(ceil_div(p.rows, p.batch) * epochs);
        for (size_t i = 0; i < steps; ++i)
            lr_scale.push_back(1.0 / double(i + 1));
        p.lr_scale = kind % 2 ? lr_scale.data() : nullptr;
        for (int64_t i = 0; i < p.rows * epochs; ++i)
            order.push_back(i * 7 % Data::kRows);
        p.order = order.data();
        totals.resize(size_t(3 * epochs)), p.totals = totals.data();
        const bool has_m1 = has_moments(p.rule) || p.momentum != 0.0;
        state.resize(6 * net.count());
        for (size_t i = 0; i < net.count(); ++i) {
            StepLayer l{};
            const auto param = [&](Floats& v, size_t at) {
                StepParam w{or_null(v), nullptr, nullptr, int64_t(v.size()), 0.01, 1e-3};
                state[at] = Floats(has_m1 ? v.size() : 0), w.m1 = or_null(state[at]);
                state[at + 1] = Floats(has_moments(p.rule) ? v.size() : 0);
                w.m2 = or_null(state[at + 1]);
                return w;
            };
            l.w = param(net.w[i], 6 * i), l.b = param(net.b[i], 6 * i + 2);
            l.slope = param(net.slope[i], 6 * i + 4);
            EpilogueParams& e = l.layer.e;
            l.layer = {l.w.value, s.sizes[i], net.saves(i), {}};
            e.bias = l.b.value, e.slope = l.slope.value, e.slope_size = l.slope.size;
            e.act = net.acts[i], e.alpha = 0.01f, e.cols = s.sizes[i + 1];
            e.drop = {nullptr, net.thresholds[i], 1.0f / 0.7f, int64_t(i), 0};
            p.layers.push_back(l);
        }
    }

    void evaluate_only() {
        p.smoothing = 0.0f, p.weights = nullptr;
        for (StepLayer& l : p.layers)
            l.layer.saves = kSavesNothing, l.layer.e.drop.threshold = 0;
    }

    void add_to(Result& r) const {
        for (const auto* all : {&net.w, &net.b, &net.slope, &state})
            for (const Floats& one : *all)
                r.add(one);
        r.add(totals);
    }

    Net net;
    StepParams p{};
    std::vector<Floats> state;
    std::vector<double> lr_scale, totals;
    std::vector<int64_t> order;
};

Result run(std::vector<Trained>& all, bool evaluates, int64_t epochs, ParallelFor parallel) {
    std::vector<Member> members;
    for (Trained& t : all) {
        if (evaluates)
            t.evaluate_only();
        members.push_back({t.p, epochs});
    }
    const int64_t floats = evaluates ? evaluate_work(members) : train_work(members);
    const int64_t count = all.size() > 1 ? 4 : 1;
    Floats work = unwritten(count * floats);
    const Slots slots{work.data(), count, floats};
    (evaluates ? launch_evaluate : launch_train)(members, slots, parallel);
    Result r;
    for (const Trained& t : all)
        t.add_to(r);
    return r;
}

Result
one(const Net& net,
    const Data& data,
    const Shape& s,
    size_t kind,
    bool evaluates,
    ParallelFor parallel) {
    std::vector<Trained> all;
    all.emplace_back(net, data, s, kind, 1);
    return run(all, evaluates, 1, parallel);
}

// Several networks at once, of the same inputs and outputs.
Result many(
    const Data& data,
    const std::vector<Shape>& shapes,
    const std::vector<Net>& nets,
    bool evaluates,
    ParallelFor parallel
) {
    const int64_t epochs = evaluates ? 1 : 2;
    std::vector<Trained> all;
    all.reserve(nets.size());
    for (size_t i = 0; i < nets.size(); ++i)
        all.emplace_back(nets[i], data, shapes[i], 3 * i, epochs);
    return run(all, evaluates, epochs, parallel);
}

}  // namespace

void all_networks(int64_t rounds) {
    const std::vector<Shape> shapes = {
        {{12, 3}, 64},
        {{64, 64, 10}, 256},
        {{64, 64, 64, 10}, 300},
        {{600, 500, 10}, 20},
        {{40, 7, 7, 7, 7, 3}, 256},
        {{64, 48, 96, 33, 80, 10}, 256},
        {{200, 1024, 10}, 48},
        {{100, 300, 130, 20, 4}, 96},
        {{300, 256, 256, 10}, 128},
        {{50, 33, 65, 1}, 240},
        {{9, 9, 9}, 1},
        {{700, 40, 5}, 35},
        {{600, 96, 64, 10}, 70},
    };
    for (size_t kind = 0; kind < 2 * shapes.size(); ++kind) {
        const Shape& s = shapes[kind % shapes.size()];
        const bool drops = kind % 2 == kind / shapes.size();
        Net net(s.sizes, kind, drops);
        const Data data(s.sizes.front(), s.sizes.back());
        const Floats x = randoms(s.rows * s.sizes.front()), dy = randoms(s.rows * s.sizes.back());
        std::string what = text("kind", kind, drops ? "drops" : "", s.rows, "x");
        for (const int64_t size : s.sizes)
            what += text(size);
        for (const bool keeps : {false, true})
            check(what + (keeps ? "mlp" : "mlp, output only"), rounds, [&](ParallelFor parallel) {
                return mlp(net, s, x, dy, keeps, parallel);
            });
        for (const bool evaluates : {false, true})
            check(what + (evaluates ? "evaluate" : "train"), rounds, [&](ParallelFor parallel) {
                return one(net, data, s, kind, evaluates, parallel);
            });
        // Two users of one network at a time.
        check(what + "evaluate twice at once", 1, [&](ParallelFor parallel) {
            Result first, second;
            const uint64_t seed = dice();
            std::thread other([&] {
                dice.seed(seed);
                first = one(net, data, s, kind, true, parallel);
            });
            second = one(net, data, s, kind, true, parallel);
            other.join();
            first.bytes += second.bytes;
            return first;
        });
    }
    const Data data(20, 4);
    const std::vector<Shape> mixed = {
        {{20, 30, 4}, 32},
        {{20, 4}, 100},
        {{20, 70, 50, 4}, 64},
        {{20, 9, 9, 9, 4}, 10},
        {{20, 64, 4}, 96}
    };
    std::vector<Net> nets;
    for (const Shape& s : mixed)
        nets.emplace_back(s.sizes, nets.size(), nets.size() % 2);
    for (const bool evaluates : {false, true})
        check(evaluates ? "evaluate many" : "train many", rounds, [&](ParallelFor parallel) {
            return many(data, mixed, nets, evaluates, parallel);
        });
}

}  // namespace fusedmlp::cpu
