// The blocking of gemm.h: packs what the micro-kernel cannot read where it lies, cuts C into
// blocks.
#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/step_kernels.h"

namespace fusedmlp::cpu {
namespace {

constexpr int64_t kWork = int64_t(1) << 20;  // products for which another thread is worth its start
constexpr int64_t kBlockRows = 128;
constexpr int64_t kBlockCols = 256;
constexpr int64_t kFewRows = 8;  // of A, for which B is not worth packing
// Operands up to this size are read where they lie: they stay in the L1 cache.
constexpr int64_t kDirect = 6 * 1024;

int64_t panels_of(int64_t n, int64_t width) { return (n + width - 1) / width; }

template <class Body>
int run(ParallelFor parallel, int64_t n, int64_t work, const Body& body) {
    // work: products of one of the n parts
    const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, work));
    if (n <= grain) {
        body(0, n);
        return 0;
    }
    const auto call = [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
    };
    return parallel(0, n, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace

int64_t gemm_scratch(int64_t m, int64_t n, int64_t k) {
    // Enough for every instruction set: none has panels above 8 rows or 32 columns.
    return (panels_of(m, 8) * 8 + panels_of(n, 32) * 32) * k + 2 * kGemmPad;
}

int launch_gemm(const Gemm& g, ParallelFor parallel) {
    const GemmKernels& kernels = step_kernels().gemm;
    const int64_t mr = kernels.mr, nr = kernels.nr;
    if (g.m <= kFewRows && g.b_across && !g.a_across && !g.done && g.n * g.k > kDirect) {
        const int64_t parts = panels_of(g.n, 16);
        return run(parallel, parts, 16 * g.m * g.k, [&](int64_t begin, int64_t end) {
            kernels.dots(g.c, g.n, g.a, g.b, g.m, g.k, begin * 16, std::min(g.n, end * 16));
        });
    }
    const int64_t a_panels = panels_of(g.m, mr), b_panels = panels_of(g.n, nr);
    const bool a_direct = g.a_across && g.m % mr == 0 && g.m * g.k <= kDirect;
    // With one panel of A each element of B is read once: packing it would be all of the work.
    const bool b_direct = !g.b_across && (a_panels == 1 || g.n * g.k <= kDirect);
    float* a_pack = g.scratch;
    float* b_pack = a_pack + (a_direct ? 0 : a_panels * mr * g.k + kGemmPad);

    GemmBlock block{};
    block.c = g.c;
    block.ldc = g.n;
    block.m = g.m, block.n = g.n, block.k = g.k;
    block.a = a_direct ? g.a : a_pack;
    block.a_panel = a_direct ? mr : mr * g.k;
    block.a_step = a_direct ? g.m : mr;
    block.b = b_direct ? g.b : b_pack;
    block.b_panel = b_direct ? nr : nr * g.k;
    block.b_step = b_direct ? g.n : nr;
    if (b_direct && g.n % nr) {
        block.b_last = b_pack;
        block.b_last_step = nr;
    }

    const int64_t a_parts = a_direct ? 0 : a_panels;
    const int64_t b_first = b_direct ? (g.n % nr ? b_panels - 1 : b_panels) : 0;
    const int64_t parts = a_parts + b_panels - b_first;
    int failed = run(parallel, parts, 16 * nr * g.k, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            if (part < a_parts) {
                const int64_t i = part * mr, rows = std::min(mr, g.m - i);
                float* out = a_pack + i * g.k;
                if (g.a_across)
                    kernels.pack_along(out, int(mr), g.a + i, g.m, rows, g.k);
                else
                    kernels.pack_across(out, int(mr), g.a + i * g.k, g.k, rows, g.k);
            } else {
                const int64_t panel = part - a_parts + b_first;
                const int64_t j = panel * nr, cols = std::min(nr, g.n - j);
                float* out = b_pack + (b_direct ? 0 : j * g.k);
                if (g.b_across)
                    kernels.pack_across(out, int(nr), g.b + j * g.k, g.k, cols, g.k);
                else
                    kernels.pack_along(out, int(nr), g.b + j, g.n, cols, g.k);
            }
        }
    });

    // Where C is small, smaller blocks, so that all threads have some.
    int64_t rows = kBlockRows / mr, cols = kBlockCols / nr;
    while (rows > 2 && panels_of(a_panels, rows) * panels_of(b_panels, cols) < 16)
        rows /= 2;
    while (cols > 1 && panels_of(a_panels, rows) * panels_of(b_panels, cols) < 16)
        cols /= 2;
    const int64_t across = panels_of(b_panels, cols), blocks = panels_of(a_panels, rows) * across;
    failed |= run(parallel, blocks, g.m * g.n * g.k / blocks, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) {
            GemmBlock part = block;
            part.ip0 = at / across * rows;
            part.ip1 = std::min(a_panels, part.ip0 + rows);
            part.jp0 = at % across * cols;
            part.jp1 = std::min(b_panels, part.jp0 + cols);
            kernels.block(part);
            if (g.done)
                g.done(
                    g.context, part.ip0 * mr, std::min(g.m, part.ip1 * mr), part.jp0 * nr,
                    std::min(g.n, part.jp1 * nr)
                );
        }
    });
    return failed;
}

}  // namespace fusedmlp::cpu
