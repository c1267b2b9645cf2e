// The blocking of gemm.h: packs B where it lies across, cuts C into blocks. What else is packed, a
// block packs itself.
#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace fusedmlp::cpu {
namespace {

constexpr int64_t kWork = int64_t(1) << 20;  // products for which another thread is worth its start
constexpr int64_t kBlockCols = 256;
constexpr int64_t kBlocks = 16;  // at least, so that all threads have some
constexpr int64_t kFewRows = 8;  // of A, for which B is not worth packing
// Operands up to this size are read where they lie: they stay in the L1 cache.
constexpr int64_t kDirect = 6 * 1024;

int64_t panels_of(int64_t n, int64_t width) { return (n + width - 1) / width; }

// Of a column of a panel.
int64_t words_of(const GemmKernels& kernels, int64_t k) {
    return kernels.values == 1 ? k : panels_of(k, 32) * 16;
}

}  // namespace

int64_t gemm_scratch(int64_t n, int64_t k) {
    // Enough for every instruction set: none has panels above 32 columns or pads k beyond that.
    return panels_of(n, 32) * 32 * std::max<int64_t>(k, 16) + kGemmPad;
}

int64_t panel_floats(const GemmKernels& kernels, int64_t k) {
    return kernels.nr * words_of(kernels, k);
}

bool is_of_dots(const GemmKernels& kernels, int64_t m, int64_t n, int64_t k) {
    return kernels.dots && m <= kFewRows && n * k > kDirect;
}

void pack_panels(
    const GemmKernels& kernels,
    float* panels,
    const float* b,
    Layout b_is,
    int64_t ldb,
    int64_t k,
    int64_t k0,
    int64_t k1,
    int64_t j0,
    int64_t j1
) {
    const int64_t length = words_of(kernels, k), first = k0 / kernels.values;
    for (int64_t j = j0; j < j1; j += kernels.nr) {
        const int64_t cols = std::min<int64_t>(kernels.nr, j1 - j);
        float* out = panels + j * length + first * kernels.nr;
        if (b_is == Layout::kAcross)
            kernels.pack_across(out, b + j * ldb + k0, ldb, cols, k1 - k0);
        else
            kernels.pack_along(out, b + k0 * ldb + j, ldb, cols, k1 - k0);
    }
}

GemmPlan plan_gemm(const Gemm& g, int64_t least) {
    const int64_t nr = g.kernels->nr, panels = panels_of(g.n, nr);
    GemmPlan plan{};
    plan.kernels = g.kernels;
    GemmBlock& block = plan.block;
    block.c = g.c;
    block.ldc = g.ldc;
    block.c_panel = nr;
    block.n = g.n, block.k = g.k;
    block.a = g.a;
    block.a_row = g.a_row;
    block.a_col = g.a_col;
    block.b_is_apart = g.b_is == Layout::kRows;
    block.b = g.b_is == Layout::kAcross ? g.scratch : g.b;
    block.b_panel = block.b_is_apart ? nr : panel_floats(*g.kernels, g.k);
    block.b_step = block.b_is_apart ? g.ldb : nr;
    plan.m = g.m;
    int64_t rows = kBlockRows, cols = kBlockCols / nr;
    const auto count = [&] { return panels_of(g.m, rows) * panels_of(panels, cols); };
    // Each block packs for all of its rows what lies apart, and in bf16 for all of its columns A.
    const int64_t few = g.kernels->values == 1 ? 1 : 4;
    while (block.b_is_apart && cols > few && count() < least)
        cols /= 2;
    while (rows > 32 && count() < least)
        rows /= 2;
    while (cols > 1 && count() < least)
        cols /= 2;
    // Even, so that two threads can have half each.
    plan.down = panels_of(g.m, rows);
    if (plan.down > 1 && plan.down < panels_of(g.m, nr))
        plan.down += plan.down % 2;
    plan.across = panels_of(panels, cols);
    plan.blocks = plan.down * plan.across;
    return plan;
}

GemmBlock block_of(const GemmPlan& plan, int64_t at) {
    GemmBlock block = plan.block;
    // Where B lies apart, blocks that read the same of the larger operand follow each other: a
    // thread then has half of it to get from another's cache, and not all.
    const bool is_down = block.b_is_apart && block.n >= plan.m;
    const int64_t row = is_down ? at % plan.down : at / plan.across;
    const int64_t column = is_down ? at / plan.down : at % plan.across;
    // Of about the same size: a thread should not wait for one that has the large ones.
    const int64_t nr = plan.kernels->nr;
    const int64_t rows = panels_of(plan.m, nr), panels = panels_of(block.n, nr);
    block.i0 = row * rows / plan.down * nr;
    block.i1 = std::min(plan.m, (row + 1) * rows / plan.down * nr);
    block.jp0 = column * panels / plan.across;
    block.jp1 = (column + 1) * panels / plan.across;
    return block;
}

int launch_gemm(const Gemm& g, ParallelFor parallel) {
    if (g.m == 0 || g.n == 0)
        return 0;
    if (g.k == 0) {
        for (int64_t i = 0; i < g.m; ++i)
            std::fill_n(g.c + i * g.ldc, g.n, 0.0f);
        return 0;
    }
    const GemmKernels& kernels = *g.kernels;
    const auto grain = [](int64_t work) {
        return std::max<int64_t>(1, kWork / std::max<int64_t>(1, work));
    };
    const bool is_plain = g.b_is == Layout::kAcross && g.a_col == 1 && g.ldb == g.k;
    if (is_plain && is_of_dots(kernels, g.m, g.n, g.k)) {
        return run(
            parallel, panels_of(g.n, 16), grain(16 * g.m * g.k), [&](int64_t begin, int64_t end) {
                kernels.dots(
                    g.c, g.ldc, g.a, g.a_row, g.b, g.m, g.k, begin * 16, std::min(g.n, end * 16)
                );
            }
        );
    }
    int failed = 0;
    if (g.b_is == Layout::kAcross) {
        // A panel takes about as long to pack as 16 rows to multiply with it.
        const int64_t nr = kernels.nr;
        failed |=
            run(parallel, panels_of(g.n, nr), grain(16 * nr * g.k),
                [&](int64_t begin, int64_t end) {
                    pack_panels(
                        kernels, g.scratch, g.b, g.b_is, g.ldb, g.k, 0, g.k, begin * nr,
                        std::min(g.n, end * nr)
                    );
                });
    }
    const GemmPlan plan = plan_gemm(g, parallel == alone ? 1 : kBlocks);
    failed |=
        run(parallel, plan.blocks, grain(g.m * g.n * g.k / plan.blocks),
            [&](int64_t begin, int64_t end) {
                for (int64_t at = begin; at < end; ++at)
                    kernels.block(block_of(plan, at));
            });
    return failed;
}

}  // namespace fusedmlp::cpu
