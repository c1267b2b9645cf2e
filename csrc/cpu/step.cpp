// The sequence of one training step: gather, forward, loss, backward, update. Gradients of weights
// are applied block by block as the matrix product finishes them, unless their norm comes first.
#include "cpu/step.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/plan.h"

namespace fusedmlp::cpu {

const StepKernels& step_kernels() {
    const char* name = kernels().name;
#ifdef FUSEDMLP_X86
    if (!std::strcmp(name, avx512::step_table.name))
        return avx512::step_table;
    if (!std::strcmp(name, avx2::step_table.name))
        return avx2::step_table;
#endif
    (void)name;
    return baseline::step_table;
}

namespace {

constexpr int64_t kGrain = 16384;  // elements for which another thread is worth its start
constexpr int64_t kParts = 64;  // most partial sums of a loss; their number depends on sizes only

template <class Body>
int run(ParallelFor parallel, int64_t n, int64_t grain, const Body& body) {
    if (n <= grain) {
        body(0, n);
        return 0;
    }
    const auto call = [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
    };
    return parallel(0, n, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

// Hands out the work memory; with a null base it only counts.
struct Arena {
    float* base;
    int64_t used = 0;
    float* take(int64_t floats) {
        float* at = base ? base + used : nullptr;
        used += round_up(floats, 16) + kGemmPad;
        return at;
    }
};

struct Buffers {
    float* x;                   // (batch, K) inputs
    std::vector<float*> y;      // (batch, N) of each layer
    std::vector<float*> h;      // (batch, N) where z is saved, else null
    std::vector<float*> dw;     // (N, K)
    std::vector<float*> db;     // (N,)
    std::vector<float*> slope;  // (N,)
    float* dy[2];               // (batch, widest)
    float* scratch;             // of the matrix products
    int64_t floats;
};

Buffers lay_out(const StepParams& p, float* base) {
    Arena arena{base};
    Buffers b{};
    const int64_t m = std::min(p.batch, p.rows);
    int64_t widest = 0, scratch = 0, largest = 0;
    for (const StepLayer& l : p.layers) {
        widest = std::max(widest, l.n);
        largest = std::max(largest, l.n * l.k);
        scratch = std::max(
            {scratch, gemm_scratch(m, l.n, l.k), gemm_scratch(l.n, l.k, m),
             gemm_scratch(m, l.k, l.n)}
        );
    }
    b.x = arena.take(m * p.layers[0].k);
    // Without a norm to wait for, all layers share one gradient.
    float* shared = p.max_norm > 0.0 ? nullptr : arena.take(largest);
    for (const StepLayer& l : p.layers) {
        b.y.push_back(arena.take(m * l.n));
        b.h.push_back(l.saves == kSavesZ ? arena.take(m * l.n) : nullptr);
        b.dw.push_back(p.max_norm > 0.0 ? arena.take(l.n * l.k) : shared);
        b.db.push_back(arena.take(l.n));
        b.slope.push_back(arena.take(l.n));
    }
    for (float*& dy : b.dy)
        dy = arena.take(m * widest);
    b.scratch = arena.take(scratch);
    b.floats = arena.used;
    return b;
}

// Of rows that are only judged: two activations are alive at a time.
Buffers lay_out_forward(const StepParams& p, float* base) {
    Arena arena{base};
    Buffers b{};
    const int64_t m = std::min(p.batch, p.rows);
    int64_t widest = 0, scratch = 0;
    for (const StepLayer& l : p.layers) {
        widest = std::max(widest, l.n);
        scratch = std::max(scratch, gemm_scratch(m, l.n, l.k));
    }
    b.x = arena.take(m * p.layers[0].k);
    for (float*& dy : b.dy)
        dy = arena.take(m * widest);
    for (size_t i = 0; i < p.layers.size(); ++i) {
        b.y.push_back(b.dy[i % 2]);
        b.h.push_back(nullptr);
    }
    b.scratch = arena.take(scratch);
    b.floats = arena.used;
    return b;
}

class Step {
  public:
    Step(const StepParams& p, const Buffers& buffers, ParallelFor parallel)
        : p_(p), b_(buffers), kernels_(step_kernels()), parallel_(parallel) {}

    // order: (rows,) of step number `step` of this call
    void operator()(int64_t step, const int64_t* order, int64_t rows) {
        order_ = order;
        rows_ = rows;
        state_[0] = p_.seed;
        state_[1] = int64_t(uint64_t(p_.first_step + step) * uint64_t(p_.mask_layers));
        lr_scale_ = p_.lr_scale ? p_.lr_scale[step] : 1.0;
        updates_ = p_.updates + step + 1;
        gather();
        for (size_t i = 0; i < p_.layers.size(); ++i)
            forward(i);
        loss();
        for (size_t i = p_.layers.size(); i-- > 0;)
            backward(i);
        if (p_.max_norm > 0.0)
            clip_and_update();
    }

    void judge(const int64_t* order, int64_t rows) {
        order_ = order;
        rows_ = rows;
        gather();
        for (size_t i = 0; i < p_.layers.size(); ++i)
            forward(i);
        loss();
    }

    int failed = 0;

  private:
    const float* input(size_t i) const { return i == 0 ? b_.x : b_.y[i - 1]; }

    EpilogueParams epilogue(const StepLayer& l) const {
        EpilogueParams e{};
        e.bias = l.b.value;
        e.slope = l.slope.value;
        e.slope_size = l.slope.size;
        e.bias_dtype = e.slope_dtype = e.dtype = Dtype::kFloat32;
        e.act = l.act;
        e.alpha = l.alpha;
        e.drop = {state_, l.threshold, l.scale, l.layer, 0};
        e.rows = rows_;
        e.cols = l.n;
        return e;
    }

    void gather() {
        const int64_t width = p_.scaling.width;
        failed |=
            run(parallel_, rows_, std::max<int64_t>(1, kGrain / width),
                [&](int64_t i, int64_t end) { kernels_.gather(b_.x, p_.scaling, order_, i, end); });
    }

    void forward(size_t i) {
        const StepLayer& l = p_.layers[i];
        float* out = b_.h[i] ? b_.h[i] : b_.y[i];
        Gemm g{};
        g.c = out, g.a = input(i), g.b = l.w.value;
        g.b_across = true;
        g.m = rows_, g.n = l.n, g.k = l.k;
        g.scratch = b_.scratch;
        failed |= launch_gemm(g, parallel_);
        failed |= launch_bias_act_dropout_fwd({b_.y[i], out, epilogue(l)}, parallel_);
    }

    // Turns the outputs into their gradient.
    void loss() {
        float* out = b_.y.back();
        const StepLayer& last = p_.layers.back();
        // An activation that is read off its output must find it again.
        if (last.saves == kSavesY) {
            float* copy = b_.dy[(p_.layers.size() - 1) % 2];
            std::memcpy(copy, out, size_t(rows_ * last.n) * sizeof(float));
            out = copy;
        }
        top_ = out;
        const LossParams l{out, order_, p_.targets, rows_, last.n, p_.smoothing};
        const auto kernel = p_.loss == kCrossEntropy ? kernels_.cross_entropy
                            : p_.loss == kLogistic   ? kernels_.logistic
                                                     : kernels_.squared_error;
        double losses[kParts] = {};
        int64_t rights[kParts] = {};
        const int64_t part = ceil_div(rows_, kParts), parts = ceil_div(rows_, part);
        // An exponential takes about as long as eight other elements.
        failed |=
            run(parallel_, parts, std::max<int64_t>(1, kGrain / (8 * part * last.n)),
                [&](int64_t at, int64_t end) {
                    for (; at < end; ++at)
                        kernel(
                            l, at * part, std::min(rows_, (at + 1) * part), &losses[at], &rights[at]
                        );
                });
        for (int64_t at = 0; at < parts; ++at) {
            p_.totals[0] += losses[at];
            p_.totals[1] += double(rights[at]);
        }
        p_.totals[2] += double(rows_);
    }

    void backward(size_t i) {
        const StepLayer& l = p_.layers[i];
        const bool top = i + 1 == p_.layers.size();
        float* dz = top ? top_ : b_.dy[i % 2];
        BiasActDropoutBwdParams e{};
        e.dz = dz;
        e.dy = dz;
        e.saved = l.saves == kSavesZ ? b_.h[i] : l.saves == kSavesY ? b_.y[i] : nullptr;
        e.saves = l.saves;
        e.db = l.b.value ? b_.db[i] : nullptr;
        e.dslope = l.slope.value ? b_.slope[i] : nullptr;
        e.e = epilogue(l);
        failed |= launch_bias_act_dropout_bwd(e, parallel_);
        if (i > 0) {
            float* dx = b_.dy[(i - 1) % 2];
            Gemm g{};
            g.c = dx, g.a = dz, g.b = l.w.value;
            g.m = rows_, g.n = l.k, g.k = l.n;
            g.scratch = b_.scratch;
            failed |= launch_gemm(g, parallel_);
        }
        Gemm g{};
        g.c = b_.dw[i], g.a = dz, g.b = input(i);
        g.a_across = true;
        g.m = l.n, g.n = l.k, g.k = rows_;
        g.scratch = b_.scratch;
        if (p_.max_norm > 0.0) {
            failed |= launch_gemm(g, parallel_);
            return;
        }
        Apply apply{this, &l, numbers(l.w), g.c};
        g.done = &Apply::block;
        g.context = &apply;
        failed |= launch_gemm(g, parallel_);
        update(l.b, b_.db[i]);
        update(l.slope, b_.slope[i]);
    }

    struct Apply {
        const Step* step;
        const StepLayer* layer;
        UpdateParams numbers;
        const float* dw;
        static void block(void* context, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
            const Apply& a = *static_cast<const Apply*>(context);
            const StepParam& w = a.layer->w;
            const int64_t k = a.layer->k;
            // Whole rows lie one after the other.
            const bool whole = j0 == 0 && j1 == k;
            const int64_t runs = whole ? 1 : i1 - i0, length = whole ? (i1 - i0) * k : j1 - j0;
            for (int64_t r = 0; r < runs; ++r) {
                const int64_t at = (i0 + r) * k + j0;
                a.step->kernels_.update(
                    a.numbers, w.value + at, a.dw + at, w.m1 ? w.m1 + at : nullptr,
                    w.m2 ? w.m2 + at : nullptr, length
                );
            }
        }
    };

    // torch.optim.SGD, Adam and AdamW: these numbers in double, each rounded once. Epsilon hat:
    // section 2 of Kingma and Ba, w -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps).
    UpdateParams numbers(const StepParam& w) const {
        UpdateParams u{};
        const double lr = w.lr * lr_scale_;
        u.rule = p_.rule;
        if (!has_moments(p_.rule)) {
            u.lr = float(lr);
            u.weight_decay = float(w.weight_decay);
            u.momentum = float(p_.momentum);
            return u;
        }
        const double t = double(updates_);
        const double root = std::sqrt(1.0 - std::pow(p_.beta2, t));
        const bool is_hat = p_.rule == kAdamEpsilonHat;
        u.lr = float((is_hat ? lr * root : lr) / (1.0 - std::pow(p_.beta1, t)));
        u.weight_decay = float(p_.rule == kAdamW ? 1.0 - lr * w.weight_decay : w.weight_decay);
        u.momentum = float(1.0 - p_.beta1);
        u.beta2 = float(p_.beta2);
        u.rest2 = float(1.0 - p_.beta2);
        u.root = is_hat ? 1.0f : float(root);
        u.eps = float(p_.eps);
        return u;
    }

    void update(const StepParam& w, const float* grad) {
        if (!w.value)
            return;
        const UpdateParams u = numbers(w);
        failed |=
            run(parallel_, ceil_div(w.size, 256), kGrain / 256, [&](int64_t begin, int64_t end) {
                const int64_t at = begin * 256, n = std::min(w.size, end * 256) - at;
                kernels_.update(
                    u, w.value + at, grad + at, w.m1 ? w.m1 + at : nullptr,
                    w.m2 ? w.m2 + at : nullptr, n
                );
            });
    }

    template <class Body>
    void for_each_gradient(const Body& body) {
        for (size_t i = 0; i < p_.layers.size(); ++i) {
            const StepLayer& l = p_.layers[i];
            body(l.w, b_.dw[i]);
            if (l.b.value)
                body(l.b, b_.db[i]);
            if (l.slope.value)
                body(l.slope, b_.slope[i]);
        }
    }

    // torch.nn.utils.clip_grad_norm_
    void clip_and_update() {
        double squares = 0.0;
        for_each_gradient([&](const StepParam& w, const float* g) {
            squares += kernels_.square_sum(g, w.size);
        });
        const double factor = p_.max_norm / (std::sqrt(squares) + 1e-6);
        for_each_gradient([&](const StepParam& w, float* g) {
            if (!(factor >= 1.0))
                kernels_.scale(g, float(factor), w.size);
            update(w, g);
        });
    }

    const StepParams& p_;
    const Buffers& b_;
    const StepKernels& kernels_;
    ParallelFor parallel_;
    const int64_t* order_ = nullptr;
    int64_t rows_ = 0;
    int64_t state_[2] = {};
    double lr_scale_ = 1.0;
    int64_t updates_ = 0;
    float* top_ = nullptr;
};

}  // namespace

int64_t step_work(const StepParams& p) { return lay_out(p, nullptr).floats; }

int64_t judge_work(const StepParams& p) { return lay_out_forward(p, nullptr).floats; }

int launch_judge(StepParams& p, ParallelFor parallel) {
    const Buffers buffers = lay_out_forward(p, p.work);
    Step step(p, buffers, parallel);
    for (int64_t done = 0; done < p.rows; done += p.batch)
        step.judge(p.order + done, std::min(p.batch, p.rows - done));
    return step.failed;
}

int launch_steps(StepParams& p, ParallelFor parallel) {
    const Buffers buffers = lay_out(p, p.work);
    Step step(p, buffers, parallel);
    for (int64_t done = 0, number = 0; done < p.rows; done += p.batch, ++number)
        step(number, p.order + done, std::min(p.batch, p.rows - done));
    return step.failed;
}

}  // namespace fusedmlp::cpu
