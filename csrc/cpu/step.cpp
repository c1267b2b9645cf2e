// One training step: blocks of rows go forward and backward through the network on a thread each,
// then blocks of the weights' gradients are applied as the matrix product finishes them, unless
// their norm comes first. Weights are kept a second time in the form that the products read.
#include "cpu/step.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/step_buffers.h"

namespace fusedmlp::cpu {

namespace {

constexpr int64_t kGrain = 16384;            // elements for which another thread is worth its start
constexpr int64_t kWork = int64_t(1) << 20;  // products for the same
constexpr int64_t kParts = 16;               // blocks of a gradient, where it has so many

class Step {
  public:
    Step(const StepParams& p, const Buffers& buffers, ParallelFor parallel)
        : p_(p), b_(buffers), isa_(isa()), parallel_(parallel) {}

    // order: (rows,) of step number `step` of this call
    void train(int64_t step, const int64_t* order, int64_t rows) {
        state_[0] = p_.seed;
        state_[1] = int64_t(uint64_t(p_.first_step + step) * uint64_t(p_.mask_layers));
        lr_scale_ = p_.lr_scale ? p_.lr_scale[step] : 1.0;
        updates_ = p_.updates + step + 1;
        each_block(order, rows, [this](Rows r, ParallelFor parallel) {
            forward_pass(r, parallel);
            backward_pass(r, parallel);
        });
        gradients();
        if (p_.max_norm > 0.0) {
            clip_and_update();
            pack();
        }
    }

    void evaluate(const int64_t* order, int64_t rows) {
        each_block(order, rows, [this](Rows r, ParallelFor parallel) {
            forward_pass(r, parallel);
        });
    }

    // The panels of all weights.
    void pack() {
        if (!b_.keeps_panels)
            return;
        const int64_t nr = isa_.gemm.nr;
        for (size_t i = 0; i < p_.layers.size(); ++i) {
            const StepLayer& l = p_.layers[i];
            failed |=
                run(parallel_, ceil_div(l.n, nr), std::max<int64_t>(1, kGrain / (nr * l.k)),
                    [&](int64_t begin, int64_t end) {
                        pack(i, begin * nr, std::min(l.n, end * nr), 0, l.k);
                    });
        }
    }

    std::atomic<int> failed{0};

  private:
    struct Rows {
        int64_t begin;
        int64_t end;
    };

    // body(rows, parallel) for rows of this step: whole blocks of them, on a thread each.
    template <class Body>
    void each_block(const int64_t* order, int64_t rows, const Body& body) {
        order_ = order;
        rows_ = rows;
        block_ = block_rows(p_, rows);
        const int64_t block = block_, count = ceil_div(rows, block);
        if (!b_.keeps_panels) {
            body({0, rows}, parallel_);
        } else {
            failed |= run(parallel_, count, 1, [&](int64_t begin, int64_t end) {
                body({begin * block, std::min(rows, end * block)}, alone);
            });
        }
        for (int64_t at = 0; at < count; ++at) {
            p_.totals[0] += losses_[at];
            p_.totals[1] += double(rights_[at]);
        }
        p_.totals[2] += double(rows);
    }

    // body(rows, number of the block)
    template <class Body>
    void blocks_in(Rows r, const Body& body) {
        const int64_t block = block_;
        for (int64_t begin = r.begin; begin < r.end; begin += block)
            body(Rows{begin, std::min(r.end, begin + block)}, begin / block);
    }

    // Row 0 of y, were the rows before r as far apart as those of r: r has the memory of its own
    // rows alone, whatever other layers keep in the same buffer.
    float* y(size_t i, Rows r) const { return b_.y[i] + r.begin * (b_.room[i] - b_.ld[i]); }
    const float* input(size_t i, Rows r) const { return i == 0 ? b_.x : y(i - 1, r); }
    int64_t input_ld(size_t i) const { return i == 0 ? b_.x_ld : b_.ld[i - 1]; }

    EpilogueParams epilogue(const StepLayer& l, Rows r) const {
        EpilogueParams e{};
        e.bias = l.b.value;
        e.slope = l.slope.value;
        e.slope_size = l.slope.size;
        e.bias_dtype = e.slope_dtype = e.dtype = Dtype::kFloat32;
        e.act = l.act;
        e.alpha = l.alpha;
        e.drop = {state_, l.threshold, l.scale, l.layer, r.begin};
        e.rows = r.end - r.begin;
        e.cols = l.n;
        return e;
    }

    void forward_pass(Rows r, ParallelFor parallel) {
        const int64_t width = p_.scaling.width;
        failed |= run(
            parallel, r.end - r.begin, std::max<int64_t>(1, kGrain / width),
            [&](int64_t begin, int64_t end) {
                isa_.step.gather(b_.x, b_.x_ld, p_.scaling, order_, r.begin + begin, r.begin + end);
            }
        );
        for (size_t i = 0; i < p_.layers.size(); ++i)
            forward(i, r, parallel);
        loss(r);
    }

    void forward(size_t i, Rows r, ParallelFor parallel) {
        const StepLayer& l = p_.layers[i];
        const int64_t ld = b_.ld[i], from = input_ld(i);
        float* const to = y(i, r);
        float* const out = b_.h[i] ? b_.h[i] : to;
        Gemm g{};
        g.c = out + r.begin * ld, g.ldc = ld;
        g.a = input(i, r) + r.begin * from, g.a_row = from, g.a_col = 1;
        const bool in_panels = b_.forward[i] && !is_of_dots(rows_, l.n, l.k);
        g.b = in_panels ? b_.forward[i] : l.w.value, g.ldb = l.k;
        g.b_is = in_panels ? Layout::kPanels : Layout::kAcross;
        g.m = r.end - r.begin, g.n = l.n, g.k = l.k;
        g.scratch = b_.scratch;
        failed |= launch_gemm(g, parallel);
        blocks_in(r, [&](Rows block, int64_t) {
            const int64_t at = block.begin * ld;
            failed |= forward_rows({to + at, out + at, epilogue(l, block)}, ld, parallel);
        });
    }

    // Turns the outputs into their gradient.
    void loss(Rows r) {
        float* out = y(p_.layers.size() - 1, r);
        const StepLayer& last = p_.layers.back();
        // An activation that is read off its output must find it again.
        if (last.saves == kSavesY) {
            const int64_t at = r.begin * last.n, count = (r.end - r.begin) * last.n;
            std::copy_n(out + at, count, b_.dz.back() + at);
            out = b_.dz.back();
        }
        const LossParams l{out, order_, p_.targets, rows_, last.n, p_.smoothing};
        const auto kernel = p_.loss == kCrossEntropy ? isa_.step.cross_entropy
                            : p_.loss == kLogistic   ? isa_.step.logistic
                                                     : isa_.step.squared_error;
        blocks_in(r, [&](Rows block, int64_t at) {
            losses_[at] = 0.0;
            rights_[at] = 0;
            kernel(l, block.begin, block.end, &losses_[at], &rights_[at]);
        });
    }

    void backward_pass(Rows r, ParallelFor parallel) {
        for (size_t i = p_.layers.size(); i-- > 0;) {
            const StepLayer& l = p_.layers[i];
            const int64_t ld = b_.ld[i];
            float* dz = b_.dz[i];
            blocks_in(r, [&](Rows block, int64_t number) {
                const int64_t at = block.begin * ld;
                const float* saved = l.saves == kSavesZ   ? b_.h[i]
                                     : l.saves == kSavesY ? b_.y[i]
                                                          : nullptr;
                BiasActDropoutBwdParams e{};
                e.dz = dz + at;
                e.dy = dz + at;
                e.saved = saved ? saved + at : nullptr;
                e.saves = l.saves;
                e.e = epilogue(l, block);
                failed |= backward_rows(
                    e, ld, l.b.value ? b_.db_of[i] + number * l.n : nullptr,
                    l.slope.value ? b_.slope_of[i] + number * l.slope.size : nullptr, parallel
                );
            });
            if (i == 0)
                continue;
            const int64_t to = b_.ld[i - 1];
            Gemm g{};
            g.c = b_.dz[i - 1] + r.begin * to, g.ldc = to;
            g.a = dz + r.begin * ld, g.a_row = ld, g.a_col = 1;
            g.b = b_.backward[i] ? b_.backward[i] : l.w.value, g.ldb = l.k;
            g.b_is = b_.backward[i] ? Layout::kPanels : Layout::kRows;
            g.m = r.end - r.begin, g.n = l.k, g.k = l.n;
            g.scratch = b_.scratch;
            failed |= launch_gemm(g, parallel);
        }
    }
    // Of all weights, and with no norm to wait for their update; then of what is summed by blocks.
    void gradients() {
        parts_.clear();
        int64_t work = 0;
        for (size_t i = 0; i < p_.layers.size(); ++i) {
            const StepLayer& l = p_.layers[i];
            Gemm g{};
            g.c = b_.dw[i], g.ldc = l.k;
            g.a = b_.dz[i], g.a_row = 1, g.a_col = b_.ld[i];
            g.b = input(i, {0, rows_}), g.ldb = input_ld(i);
            g.b_is = Layout::kRows, g.b_padded = true;
            g.m = l.n, g.n = l.k, g.k = rows_;
            const GemmPlan plan = plan_gemm(g, kParts);
            const int64_t each = std::max<int64_t>(1, l.n * l.k * rows_ / plan.blocks);
            parts_.push_back({i, plan, work, each});
            work += each * plan.blocks;
        }
        // A thread takes the blocks that begin within its share of the work.
        failed |= run(parallel_, work, kWork, [&](int64_t begin, int64_t end) {
            for (const Part& part : parts_) {
                const auto first = [&](int64_t at) {
                    return std::clamp<int64_t>(
                        ceil_div(at - part.start, part.each), 0, part.plan.blocks
                    );
                };
                for (int64_t at = first(begin); at < first(end); ++at)
                    gradient(part, at);
            }
        });
        const int64_t blocks = ceil_div(rows_, block_);
        for (size_t i = 0; i < p_.layers.size(); ++i) {
            const StepLayer& l = p_.layers[i];
            add_up(l.b, b_.db[i], b_.db_of[i], blocks);
            add_up(l.slope, b_.slope[i], b_.slope_of[i], blocks);
        }
    }

    struct Part {
        size_t layer;
        GemmPlan plan;
        int64_t start;  // in products
        int64_t each;   // block
    };

    void gradient(const Part& part, int64_t at) {
        const StepLayer& l = p_.layers[part.layer];
        const int64_t nr = isa_.gemm.nr;
        GemmBlock block = block_of(part.plan, at);
        const int64_t j0 = block.jp0 * nr, j1 = std::min(l.k, block.jp1 * nr);
        if (p_.max_norm > 0.0)
            return isa_.gemm.block(block);
        const int64_t rows = block.i1 - block.i0, cols = j1 - j0;
        auto* dw = static_cast<float*>(scratch(kBlockSlot, size_t(rows * cols) * sizeof(float)));
        block.ldc = cols;
        block.c = dw - block.i0 * cols - j0;
        isa_.gemm.block(block);
        const UpdateParams u = numbers_of(p_, l.w, lr_scale_, updates_);
        // Whole rows lie one after the other.
        const int64_t runs = cols == l.k ? 1 : rows, length = cols == l.k ? rows * cols : cols;
        for (int64_t r = 0; r < runs; ++r) {
            const int64_t to = (block.i0 + r) * l.k + j0;
            isa_.step.update(
                u, l.w.value + to, dw + r * cols, l.w.m1 ? l.w.m1 + to : nullptr,
                l.w.m2 ? l.w.m2 + to : nullptr, length
            );
        }
        if (b_.keeps_panels)
            pack(part.layer, block.i0, block.i1, j0, j1);
    }

    // The panels of rows [n0, n1) and columns [k0, k1) of a weight.
    void pack(size_t i, int64_t n0, int64_t n1, int64_t k0, int64_t k1) {
        const StepLayer& l = p_.layers[i];
        pack_panels(b_.forward[i], l.w.value, Layout::kAcross, l.k, l.k, k0, k1, n0, n1);
        if (b_.backward[i])
            pack_panels(b_.backward[i], l.w.value, Layout::kRows, l.k, l.n, n0, n1, k0, k1);
    }

    void add_up(const StepParam& w, float* grad, double* sums, int64_t blocks) {
        if (!w.value)
            return;
        for (int64_t block = 1; block < blocks; ++block)
            for (int64_t i = 0; i < w.size; ++i)
                sums[i] += sums[block * w.size + i];
        for (int64_t i = 0; i < w.size; ++i)
            grad[i] = float(sums[i]);
        if (!(p_.max_norm > 0.0))
            update(w, grad);
    }

    void update(const StepParam& w, const float* grad) {
        if (!w.value)
            return;
        const UpdateParams u = numbers_of(p_, w, lr_scale_, updates_);
        failed |=
            run(parallel_, ceil_div(w.size, 256), kGrain / 256, [&](int64_t begin, int64_t end) {
                const int64_t at = begin * 256, n = std::min(w.size, end * 256) - at;
                isa_.step.update(
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
            squares += isa_.step.square_sum(g, w.size);
        });
        const double factor = p_.max_norm / (std::sqrt(squares) + 1e-6);
        for_each_gradient([&](const StepParam& w, float* g) {
            if (!(factor >= 1.0))
                isa_.step.scale(g, float(factor), w.size);
            update(w, g);
        });
    }

    const StepParams& p_;
    const Buffers& b_;
    const Isa& isa_;
    ParallelFor parallel_;
    const int64_t* order_ = nullptr;
    int64_t rows_ = 0;
    int64_t block_ = 0;  // rows of it
    int64_t state_[2] = {};
    double lr_scale_ = 1.0;
    int64_t updates_ = 0;
    double losses_[kMaxBlocks] = {};
    int64_t rights_[kMaxBlocks] = {};
    std::vector<Part> parts_;
};

}  // namespace

int64_t epoch_work(const StepParams& p) { return lay_out(p, nullptr).floats; }

int64_t evaluation_work(const StepParams& p) { return lay_out_forward(p, nullptr).floats; }

int train_epoch(StepParams& p, ParallelFor parallel) {
    const Buffers buffers = lay_out(p, p.work);
    Step step(p, buffers, parallel);
    step.pack();
    for (int64_t done = 0, number = 0; done < p.rows; done += p.batch, ++number)
        step.train(number, p.order + done, std::min(p.batch, p.rows - done));
    return step.failed;
}

int evaluate_rows(StepParams& p, ParallelFor parallel) {
    const Buffers buffers = lay_out_forward(p, p.work);
    Step step(p, buffers, parallel);
    step.pack();
    for (int64_t done = 0; done < p.rows; done += p.batch)
        step.evaluate(p.order + done, std::min(p.batch, p.rows - done));
    return step.failed;
}

}  // namespace fusedmlp::cpu
