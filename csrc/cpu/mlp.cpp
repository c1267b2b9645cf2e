// Every layer is a product and one elementwise pass; an input gradient becomes dz where it lies.
#include "cpu/mlp.h"

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/plan.h"

namespace fusedmlp::cpu {

namespace {

int64_t rows_of(const MlpParams& p) { return p.layers[0].e.rows; }

// Two outputs in turn, where nobody keeps them.
int64_t turn_size(const MlpParams& p) {
    int64_t widest = 0;
    for (const MlpLayer& l : p.layers)
        widest = std::max(widest, l.e.cols);
    return round_up(rows_of(p) * widest, 16);
}

bool keeps_none(const MlpParams& p) { return p.layers.size() > 1 && !p.layers[0].y; }

}  // namespace

int64_t mlp_fwd_work(const MlpParams& p) {
    int64_t product = 0;
    for (const MlpLayer& l : p.layers)
        product = std::max(product, gemm_scratch(l.e.cols, l.k));
    return product + (keeps_none(p) ? 2 * turn_size(p) : 0);
}

int launch_mlp_fwd(MlpParams& p, ParallelFor parallel) {
    int failed = 0;
    const int64_t turn = keeps_none(p) ? turn_size(p) : 0;
    const float* x = p.x;
    for (size_t i = 0; i < p.layers.size(); ++i) {
        MlpLayer& l = p.layers[i];
        if (!l.y)
            l.y = p.work + int64_t(i % 2) * turn;
        Gemm g{};
        g.c = l.h ? l.h : l.y, g.ldc = l.e.cols;
        g.a = x, g.a_row = l.k, g.a_col = 1;
        g.b = l.w, g.ldb = l.k, g.b_is = Layout::kAcross;
        g.m = l.e.rows, g.n = l.e.cols, g.k = l.k;
        g.scratch = p.work + 2 * turn;
        failed |= launch_gemm(g, parallel);
        const bool bare = l.e.act == kNone && l.e.drop.threshold == 0 && !l.e.bias;
        if ((!bare || l.h) && l.e.cols > 0)
            failed |= launch_bias_act_dropout_fwd({l.y, g.c, l.e}, parallel);
        x = l.y;
    }
    return failed;
}

int64_t mlp_bwd_work(const MlpParams& p) {
    int64_t product = 0;
    for (size_t i = p.first; i < p.layers.size(); ++i) {
        const MlpLayer& l = p.layers[i];
        product = std::max({product, gemm_scratch(l.k, l.e.cols), gemm_scratch(l.k, l.e.rows)});
    }
    return product + 2 * turn_size(p);
}

int launch_mlp_bwd(const MlpParams& p, ParallelFor parallel) {
    int failed = 0;
    const int64_t turn = turn_size(p);
    const float* dy = p.dy;
    for (size_t i = p.layers.size(); i-- > p.first;) {
        const MlpLayer& l = p.layers[i];
        float* dz = p.work + int64_t(i % 2) * turn;
        BiasActDropoutBwdParams b{};
        b.dz = dz;
        b.dy = dy;
        b.saved = l.saves == kSavesZ ? l.h : l.saves == kSavesY ? l.y : nullptr;
        b.saves = l.saves;
        b.db = l.db;
        b.dslope = l.dslope;
        b.e = l.e;
        if (l.e.cols > 0)
            failed |= launch_bias_act_dropout_bwd(b, parallel);
        Gemm g{};
        g.scratch = p.work + 2 * turn;
        if (l.dw) {
            g.c = l.dw, g.ldc = l.k;
            g.a = dz, g.a_row = 1, g.a_col = l.e.cols;
            g.b = i ? p.layers[i - 1].y : p.x, g.ldb = l.k, g.b_is = Layout::kRows;
            g.m = l.e.cols, g.n = l.k, g.k = l.e.rows;
            failed |= launch_gemm(g, parallel);
        }
        float* dx = i > p.first ? p.work + int64_t((i - 1) % 2) * turn : p.dx;
        if (dx) {
            g.c = dx, g.ldc = l.k;
            g.a = dz, g.a_row = l.e.cols, g.a_col = 1;
            g.b = l.w, g.ldb = l.k, g.b_is = Layout::kRows;
            g.m = l.e.rows, g.n = l.k, g.k = l.e.cols;
            failed |= launch_gemm(g, parallel);
        }
        dy = dx;
    }
    return failed;
}

}  // namespace fusedmlp::cpu
