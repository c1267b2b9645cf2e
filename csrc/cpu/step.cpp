// One training step: blocks of rows go forward and backward through the network on a thread each,
// then blocks of the weights' gradients are applied as the matrix product finishes them, unless
// their norm comes first. Weights are kept in the form that the products read: in their stead where
// all panels are full, beside them otherwise.
#include "cpu/step.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>

#include "cpu/step_buffers.h"

namespace fusedmlp::cpu {

namespace {

constexpr int64_t kGrain = 16384;            // elements for which another thread is worth its start
constexpr int64_t kWork = int64_t(1) << 20;  // products for the same
constexpr int64_t kParts = 32;               // blocks of a gradient, where it has so many

class Step {
  public:
    Step(const StepParams& p, bool trains, ParallelFor parallel)
        : p_(p), layers_(layers_of(p, state_)),
          b_(trains ? lay_out(p, layers_, p.work) : lay_out_forward(p, layers_, p.work)),
          parallel_(parallel), network_(layers_, b_, parallel) {
        if (trains)
            each_kept([this](float* kept, float* rows, int64_t k, int64_t n0, int64_t n1) {
                pack_panels(isa_.gemm, kept, rows, Layout::kAcross, k, k, 0, k, n0, n1);
            });
        network_.pack();
    }

    // Weights and moments that were kept in panels, back to where they belong.
    void finish() {
        each_kept([this](float* kept, float* rows, int64_t k, int64_t n0, int64_t n1) {
            for (int64_t n = n0; n < n1; n += isa_.gemm.nr)
                isa_.gemm.unpack(rows + n * k, k, kept + n * k, k);
        });
    }

    // order: (rows,) of step number `step` of this call
    void train(int64_t step, const int64_t* order, int64_t rows) {
        state_[0] = p_.seed;
        state_[1] = int64_t(uint64_t(p_.first_step + step) * uint64_t(p_.mask_layers));
        lr_scale_ = p_.lr_scale ? p_.lr_scale[step] : 1.0;
        updates_ = p_.updates + step + 1;
        if (!goes_in_blocks(rows))
            finish();  // some products of few rows read w itself
        each_block(order, rows, [this](Rows r, ParallelFor parallel) {
            forward_pass(r, parallel);
            network_.backward(r, parallel);
        });
        gradients();
        if (p_.max_norm > 0.0) {
            clip_and_update();
            network_.pack();
        }
    }

    void evaluate(const int64_t* order, int64_t rows) {
        each_block(order, rows, [this](Rows r, ParallelFor parallel) {
            forward_pass(r, parallel);
        });
    }

    int failed() const { return failed_ | network_.failed; }

  private:
    // body(kept, rows, k, n0, n1) for rows [n0, n1) of what is kept in panels
    template <class Body>
    void each_kept(const Body& body) {
        for (size_t i = 0; i < layers_.size(); ++i) {
            if (!b_.at[i].kept)
                continue;
            const StepParam &from = p_.layers[i].w, &to = b_.w[i];
            const int64_t k = layers_[i].k, nr = isa_.gemm.nr;
            const int64_t grain = std::max<int64_t>(1, kGrain / (nr * std::max<int64_t>(1, k)));
            failed_ |= run(parallel_, layers_[i].n() / nr, grain, [&](int64_t begin, int64_t end) {
                body(to.value, from.value, k, begin * nr, end * nr);
                if (to.m1)
                    body(to.m1, from.m1, k, begin * nr, end * nr);
                if (to.m2)
                    body(to.m2, from.m2, k, begin * nr, end * nr);
            });
        }
    }

    template <class Body>
    void each_block(const int64_t* order, int64_t rows, const Body& body) {
        order_ = order;
        weight_ = weight_of(order, rows);
        network_.set_batch(rows);
        if (network_.is_in_parts())
            network_.each_part([this](Rows r, int64_t k0, int64_t k1) { gather(r, k0, k1); });
        network_.each_block(body);
        for (int64_t at = 0; at < network_.blocks(); ++at) {
            p_.totals[0] += losses_[at] * (double(rows) / weight_);
            p_.totals[1] += double(rights_[at]);
        }
        p_.totals[2] += double(rows);
    }

    // Of a batch, above 0: rows that all weigh nothing have no gradient.
    double weight_of(const int64_t* order, int64_t rows) const {
        if (!p_.weights)
            return double(rows);
        double sum = 0.0;
        for (int64_t i = 0; i < rows; ++i)
            sum += double(p_.weights[order[i]]);
        return std::max(sum, double(FLT_MIN));
    }

    void forward_pass(Rows r, ParallelFor parallel) {
        const int64_t grain = std::max<int64_t>(1, kGrain / p_.scaling.width);
        if (!network_.is_in_parts())
            failed_ |= run(parallel, r.end - r.begin, grain, [&](int64_t begin, int64_t end) {
                gather({r.begin + begin, r.begin + end}, 0, p_.scaling.width);
            });
        network_.forward(r, parallel);
        loss(r);
    }

    void gather(Rows r, int64_t k0, int64_t k1) {
        isa_.step.gather(b_.gathered, b_.x_ld, p_.scaling, order_, r.begin, r.end, k0, k1);
    }

    // Turns the outputs into their gradient.
    void loss(Rows r) {
        const Layer& last = layers_.back();
        float* out = network_.y(layers_.size() - 1, r);
        // An activation that is read off its output must find it again.
        if (last.saves == kSavesY) {
            const int64_t at = r.begin * last.n(), count = (r.end - r.begin) * last.n();
            std::copy_n(out + at, count, b_.at.back().dz + at);
            out = b_.at.back().dz;
        }
        const LossParams l{out, order_, p_.targets, p_.weights, weight_, last.n(), p_.smoothing};
        const auto kernel = p_.loss == kCrossEntropy ? isa_.step.cross_entropy
                            : p_.loss == kLogistic   ? isa_.step.logistic
                                                     : isa_.step.squared_error;
        network_.blocks_in(r, [&](Rows block, int64_t at) {
            losses_[at] = 0.0;
            rights_[at] = 0;
            kernel(l, block.begin, block.end, &losses_[at], &rights_[at]);
        });
    }

    // Of all weights, and with no norm to wait for their update; then of what is summed by blocks.
    void gradients() {
        parts_.clear();
        int64_t work = 0;
        for (size_t i = 0; i < layers_.size(); ++i) {
            const Gemm g = network_.weight_gradient(i, b_.dw[i]);
            GemmPlan plan = plan_gemm(g, kParts);
            if (b_.at[i].kept) {
                plan.block.ldc = plan.kernels->nr;
                plan.block.c_panel = plan.kernels->nr * g.m;
            }
            const int64_t each = std::max<int64_t>(1, g.m * g.n * g.k / plan.blocks);
            parts_.push_back({i, plan, work, each});
            work += each * plan.blocks;
        }
        // A thread takes the blocks that begin within its share of the work.
        failed_ |= run(parallel_, work, kWork, [&](int64_t begin, int64_t end) {
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
        for (size_t i = 0; i < layers_.size(); ++i) {
            sum_up(p_.layers[i].b, b_.db[i], b_.at[i].db);
            sum_up(p_.layers[i].slope, b_.slope[i], b_.at[i].dslope);
        }
    }

    struct Part {
        size_t layer;
        GemmPlan plan;
        int64_t start;  // in products
        int64_t each;   // block
    };

    void gradient(const Part& part, int64_t at) {
        const StepParam& w = b_.w[part.layer];
        const bool is_kept = b_.at[part.layer].kept != nullptr;
        const int64_t nr = b_.gemm->nr, k = layers_[part.layer].k;
        GemmBlock block = block_of(part.plan, at);
        if (p_.max_norm > 0.0)
            return b_.gemm->block(block);
        const int64_t j0 = block.jp0 * nr, j1 = std::min(block.n, block.jp1 * nr);
        const int64_t rows = block.i1 - block.i0, cols = j1 - j0;
        // `runs` of `length` of the weight, from `first` on; of the gradient one after the other.
        const bool is_whole = !is_kept && cols == k;
        const int64_t runs = is_kept ? block.jp1 - block.jp0 : is_whole ? 1 : rows;
        const int64_t length = is_kept ? rows * nr : is_whole ? rows * k : cols;
        const int64_t first = is_kept ? j0 * k + block.i0 * nr : block.i0 * k + j0;
        const int64_t stride = is_kept ? k * nr : k;
        auto* dw = static_cast<float*>(scratch(kBlockSlot, size_t(rows * cols) * sizeof(float)));
        if (is_kept)
            block.c_panel = length;
        else
            block.ldc = cols;
        block.c = dw - block.i0 * block.ldc - block.jp0 * block.c_panel;
        b_.gemm->block(block);
        const UpdateParams u = numbers_of(p_, w, lr_scale_, updates_);
        for (int64_t r = 0; r < runs; ++r) {
            const int64_t to = first + r * stride;
            isa_.step.update(
                u, w.value + to, dw + r * length, w.m1 ? w.m1 + to : nullptr,
                w.m2 ? w.m2 + to : nullptr, length
            );
        }
        if (is_kept)
            network_.pack(part.layer, j0, j1, block.i0, block.i1);
        else
            network_.pack(part.layer, block.i0, block.i1, j0, j1);
    }

    void sum_up(const StepParam& w, float* grad, double* sums) {
        if (!w.value)
            return;
        add_blocks(grad, sums, w.size, network_.blocks());
        if (!(p_.max_norm > 0.0))
            update(w, grad);
    }

    void update(const StepParam& w, const float* grad) {
        if (!w.value)
            return;
        const UpdateParams u = numbers_of(p_, w, lr_scale_, updates_);
        failed_ |=
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
            body(b_.w[i], b_.dw[i]);
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
    int64_t state_[2] = {};
    const std::vector<Layer> layers_;
    const StepBuffers b_;
    const Isa& isa_ = isa();
    ParallelFor parallel_;
    Network network_;
    const int64_t* order_ = nullptr;
    double weight_ = 1.0;
    double lr_scale_ = 1.0;
    int64_t updates_ = 0;
    double losses_[kMaxBlocks] = {};
    int64_t rights_[kMaxBlocks] = {};
    std::vector<Part> parts_;
    std::atomic<int> failed_{0};
};

}  // namespace

int64_t epoch_work(const StepParams& p) {
    return lay_out(p, layers_of(p, nullptr), nullptr).floats;
}

int64_t evaluation_work(const StepParams& p) {
    return lay_out_forward(p, layers_of(p, nullptr), nullptr).floats;
}

int train_epoch(StepParams& p, ParallelFor parallel) {
    Step step(p, true, parallel);
    for (int64_t done = 0, number = 0; done < p.rows; done += p.batch, ++number)
        step.train(number, p.order + done, std::min(p.batch, p.rows - done));
    step.finish();
    return step.failed();
}

int evaluate_rows(StepParams& p, ParallelFor parallel) {
    Step step(p, false, parallel);
    for (int64_t done = 0; done < p.rows; done += p.batch)
        step.evaluate(p.order + done, std::min(p.batch, p.rows - done));
    return step.failed();
}

}  // namespace fusedmlp::cpu
