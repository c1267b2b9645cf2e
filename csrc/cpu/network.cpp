// A layer forward is a product and an elementwise pass over its rows; backward turns the gradient
// of its output into that of the preactivation where it lies, and multiplies that with the weight.
#include "cpu/network.h"

#include <algorithm>

namespace fusedmlp::cpu {
namespace {

constexpr int64_t kGrain = 16384;  // elements for which another thread is worth its start
constexpr int64_t kBlockWork = int64_t(1) << 20;  // products for which a block is worth its start
constexpr int64_t kFewRows = 32;  // for which a thread of its own costs a pass over all weights
// Weights beyond this are not in the L2 cache from one piece of the rows to the next, and a piece
// of fewer rows waits for them longer than it multiplies.
constexpr int64_t kCachedWeights = int64_t(1) << 17;
constexpr int64_t kPieceRows = 64;

}  // namespace

// An odd number of cache lines: rows whose distance is a power of two share a few sets.
int64_t apart(int64_t n) { return n < 256 ? n : (ceil_div(n, 16) | 1) * 16; }

bool goes_in_blocks(int64_t rows) { return rows >= kFewRows; }

void take_panels(
    Buffers& b,
    const std::vector<Layer>& layers,
    Arena& arena,
    Passes passes,
    size_t first_dx
) {
    int64_t scratch = 0;
    const auto take = [&](float*& panels, bool wanted, int64_t floats) {
        panels = wanted && b.keeps_panels ? arena.take(floats) : nullptr;
        if (wanted && !b.keeps_panels)
            scratch = std::max(scratch, floats);
    };
    for (size_t i = 0; i < layers.size(); ++i) {
        const Layer& l = layers[i];
        take(b.at[i].forward, passes != Passes::kBackward, gemm_scratch(l.n(), l.k));
        take(
            b.at[i].backward, passes != Passes::kForward && i >= first_dx, gemm_scratch(l.k, l.n())
        );
    }
    b.scratch = arena.take(scratch);
}

void take_sums(Buffers& b, const std::vector<Layer>& layers, Arena& arena, int64_t rows) {
    const int64_t blocks = std::min(kMaxBlocks, ceil_div(rows, 16));
    for (size_t i = 0; i < layers.size(); ++i) {
        const EpilogueParams& e = layers[i].e;
        b.at[i].db = e.bias ? arena.take_doubles(blocks * e.cols) : nullptr;
        b.at[i].dslope = e.slope ? arena.take_doubles(blocks * e.slope_size) : nullptr;
    }
}

void add_blocks(float* out, double* sums, int64_t n, int64_t blocks) {
    for (int64_t block = 1; block < blocks; ++block)
        for (int64_t i = 0; i < n; ++i)
            sums[i] += sums[block * n + i];
    for (int64_t i = 0; i < n; ++i)
        out[i] = float(sums[i]);
}

void Network::pack() {
    if (!b_.keeps_panels)
        return;
    const int64_t nr = b_.gemm->nr;
    for (size_t i = 0; i < layers_.size(); ++i) {
        const Layer& l = layers_[i];
        const int64_t grain = std::max<int64_t>(1, kGrain / (nr * std::max<int64_t>(1, l.k)));
        failed |= run(parallel_, ceil_div(l.n(), nr), grain, [&](int64_t begin, int64_t end) {
            pack(i, begin * nr, std::min(l.n(), end * nr), 0, l.k);
        });
    }
}

void Network::pack(size_t i, int64_t n0, int64_t n1, int64_t k0, int64_t k1) {
    const Layer& l = layers_[i];
    const LayerBuffers& at = b_.at[i];
    if (at.kept)
        return repack(i, n0, n1, k0, k1);
    if (at.forward)
        pack_panels(*b_.gemm, at.forward, l.w, Layout::kAcross, l.k, l.k, k0, k1, n0, n1);
    if (at.backward)
        pack_panels(*b_.gemm, at.backward, l.w, Layout::kRows, l.k, l.n(), n0, n1, k0, k1);
}

// A panel of w^T holds rows of w, so for the panels of w it lies across.
void Network::repack(size_t i, int64_t n0, int64_t n1, int64_t k0, int64_t k1) {
    const LayerBuffers& at = b_.at[i];
    const int64_t nr = b_.gemm->nr, k = layers_[i].k, n = layers_[i].n();
    for (int64_t j = n0; j < n1; j += nr) {
        const float* panel = at.kept + j * k;
        if (at.forward != at.kept)
            pack_panels(*b_.gemm, at.forward, panel - j, Layout::kRows, nr, k, k0, k1, j, j + nr);
        if (at.backward)
            pack_panels(
                *b_.gemm, at.backward, panel - j, Layout::kAcross, nr, n, j, j + nr, k0, k1
            );
    }
}

void Network::set_batch(int64_t rows) {
    rows_ = rows;
    if (!goes_in_blocks(rows)) {
        block_ = kFewRows;
        return;
    }
    int64_t work = 1;
    for (const Layer& l : layers_)
        work += l.n() * l.k;
    const int64_t least = std::max(ceil_div(rows, kMaxBlocks), kBlockWork / work);
    // Blocks of about the same size: two of 176 and 41 rows would keep one thread waiting.
    const int64_t blocks = ceil_div(rows, round_up(std::clamp<int64_t>(least, 1, rows), 16));
    block_ = round_up(ceil_div(rows, blocks), 16);
    piece_ = work > kCachedWeights ? ceil_div(kPieceRows, block_) : 1;
}

EpilogueParams Network::epilogue(const Layer& l, Rows r) const {
    EpilogueParams e = l.e;
    e.drop.row_offset += r.begin;
    e.rows = r.end - r.begin;
    return e;
}

void Network::multiply_part(Rows r, int64_t k0, int64_t k1) {
    const LayerBuffers& at = b_.at[0];
    float* const out = at.h ? at.h : y(0, r);
    Gemm g{};
    g.c = (k0 ? b_.rest : out) + r.begin * at.ld, g.ldc = at.ld;
    g.a = b_.x + r.begin * b_.x_ld + k0, g.a_row = b_.x_ld, g.a_col = 1;
    g.b = at.forward, g.b_is = Layout::kPanels;
    g.m = r.end - r.begin, g.n = layers_[0].n(), g.k = k1 - k0;
    g.kernels = b_.gemm;
    GemmPlan plan = plan_gemm(g, 1);
    plan.block.b_panel = panel_floats(*b_.gemm, layers_[0].k);
    plan.block.b += k0 / b_.gemm->values * b_.gemm->nr;
    for (int64_t number = 0; number < plan.blocks; ++number)
        b_.gemm->block(block_of(plan, number));
}

void Network::forward(Rows r, ParallelFor parallel) {
    for (size_t i = 0; i < layers_.size(); ++i) {
        const Layer& l = layers_[i];
        const int64_t ld = b_.at[i].ld, from = input_ld(i);
        float* const to = y(i, r);
        float* const out = b_.at[i].h ? b_.at[i].h : to;
        const bool is_there = i == 0 && is_in_parts();
        if (is_there)
            isa().step.add(out + r.begin * ld, b_.rest + r.begin * ld, (r.end - r.begin) * ld);
        Gemm g{};
        g.c = out + r.begin * ld, g.ldc = ld;
        g.a = input(i, r) + r.begin * from, g.a_row = from, g.a_col = 1;
        const bool in_panels = b_.at[i].forward && !is_of_dots(*b_.gemm, rows_, l.n(), l.k);
        g.b = in_panels ? b_.at[i].forward : l.w, g.ldb = l.k;
        g.b_is = in_panels ? Layout::kPanels : Layout::kAcross;
        g.m = r.end - r.begin, g.n = l.n(), g.k = l.k;
        g.scratch = b_.scratch;
        g.kernels = b_.gemm;
        if (!is_there)
            failed |= launch_gemm(g, parallel);
        const bool is_bare = l.e.act == kNone && l.e.drop.threshold == 0 && !l.e.bias;
        if (is_bare && out == to)
            continue;
        blocks_in(r, [&](Rows block, int64_t) {
            const int64_t at = block.begin * ld;
            failed |= forward_rows({to + at, out + at, epilogue(l, block)}, ld, parallel);
        });
    }
}

void Network::backward(Rows r, ParallelFor parallel, size_t first) {
    for (size_t i = layers_.size(); i-- > first;) {
        const Layer& l = layers_[i];
        const int64_t ld = b_.at[i].ld;
        float* const dz = b_.at[i].dz;
        const float* const dy = i + 1 == layers_.size() && b_.dy ? b_.dy : dz;
        const float* const saved = l.saves == kSavesZ   ? b_.at[i].h
                                   : l.saves == kSavesY ? b_.at[i].y
                                                        : nullptr;
        blocks_in(r, [&](Rows block, int64_t number) {
            const int64_t at = block.begin * ld;
            BiasActDropoutBwdParams p{};
            p.dz = dz + at;
            p.dy = dy + at;
            p.saved = saved ? saved + at : nullptr;
            p.saves = l.saves;
            p.e = epilogue(l, block);
            failed |= backward_rows(
                p, ld, b_.at[i].db ? b_.at[i].db + number * l.n() : nullptr,
                b_.at[i].dslope ? b_.at[i].dslope + number * l.e.slope_size : nullptr, parallel
            );
        });
        float* const dx = i > first ? b_.at[i - 1].dz : b_.dx;
        if (!dx)
            continue;
        const int64_t to = i > first ? b_.at[i - 1].ld : l.k;
        Gemm g{};
        g.c = dx + r.begin * to, g.ldc = to;
        g.a = dz + r.begin * ld, g.a_row = ld, g.a_col = 1;
        g.b = b_.at[i].backward ? b_.at[i].backward : l.w, g.ldb = l.k;
        g.b_is = b_.at[i].backward ? Layout::kPanels : Layout::kRows;
        g.m = r.end - r.begin, g.n = l.k, g.k = l.n();
        g.scratch = b_.scratch;
        g.kernels = b_.gemm;
        failed |= launch_gemm(g, parallel);
    }
}

Gemm Network::weight_gradient(size_t i, float* c) const {
    const Layer& l = layers_[i];
    Gemm g{};
    const float *const x = input(i, {0, rows_}), *const dz = b_.at[i].dz;
    const int64_t x_ld = input_ld(i), ld = b_.at[i].ld;
    const bool is_across = b_.at[i].kept != nullptr;
    g.c = c, g.ldc = is_across ? l.n() : l.k;
    g.a = is_across ? x : dz, g.a_row = 1, g.a_col = is_across ? x_ld : ld;
    g.b = is_across ? dz : x, g.ldb = is_across ? ld : x_ld;
    g.b_is = Layout::kRows;
    g.m = is_across ? l.k : l.n(), g.n = is_across ? l.n() : l.k, g.k = rows_;
    g.kernels = b_.gemm;
    return g;
}

}  // namespace fusedmlp::cpu
