// Products and packing of gemm.h in fp32; included once for each instruction set.
#include "cpu/gemm_micro.h"

namespace fusedmlp::FUSEDMLP_ISA {

#define FN static inline __attribute__((always_inline))

// k of one pass: a panel of B of that depth stays in the L1 cache, and a sum of so few products is
// as accurate as the library's.
constexpr int64_t kDepth = 128;
// Rows so far apart share one set of the L1 cache, which holds 8 lines or a few more.
constexpr int64_t kAlias = 1024;

struct Fp32 {
    static constexpr bool kCopies = true;
    FN VF sum(VF a, VF b, VF c) { return fma(a, b, c); }
};

static void pack_along(float* out, const float* in, int64_t ld, int64_t cols, int64_t k) {
    const int first = int(cols < VL ? cols : VL), second = int(cols) - first;
    for (int64_t at = 0; at < k; ++at, out += kNR, in += ld) {
        store(out, first == VL ? load(in) : load_part(in, first));
        store(
            out + VL, second == VL  ? load(in + VL)
                      : second == 0 ? set1(0.0f)
                                    : load_part(in + VL, second)
        );
    }
}

static void gemm_block(const cpu::GemmBlock& g) {
    static constexpr Micros<Fp32> micros;
    alignas(64) float panel[kDepth * kNR];
    const int64_t most = g.a_row % kAlias == 0 && kMR > 8 ? 8 : kMR;
    const int64_t tiles = (g.i1 - g.i0 + most - 1) / most;
    // Two at least: one sum of 20 products has 1.2 times the error of the library's.
    const int64_t least = g.k > 8 ? 2 : 1, by_depth = (g.k + kDepth - 1) / kDepth;
    const int64_t passes = by_depth < least ? least : by_depth;
    const int64_t depth = (g.k + passes - 1) / passes;
    for (int64_t jp = g.jp0; jp < g.jp1; ++jp) {
        for (int64_t k0 = 0; k0 < g.k; k0 += depth) {
            const int64_t k = g.k - k0 < depth ? g.k - k0 : depth;
            const int64_t j = jp * kNR;
            const int cols = int(g.n - j < kNR ? g.n - j : kNR);
            const float* b = g.b + jp * g.b_panel + k0 * g.b_step;
            int64_t step = g.b_step;
            // Rows far apart are read once for all tiles: the first one copies them, unless they
            // end within a vector.
            const bool copies = g.b_is_apart && tiles > 1 && cols == kNR;
            if (g.b_is_apart && cols < kNR) {
                pack_along(panel, b, step, cols, k);
                b = panel, step = kNR;
            }
            // Tiles of about the same height: the last few rows would not fill the registers.
            for (int64_t tile = 0, i = g.i0, rows; tile < tiles; ++tile, i += rows) {
                rows = (g.i1 - i + tiles - tile - 1) / (tiles - tile);
                micros.of[rows][copies && tile == 0 ? 2 : cols > VL](
                    g.a + i * g.a_row + k0 * g.a_col, g.a_row, g.a_col, b, step, k,
                    g.c + i * g.ldc + jp * g.c_panel, g.ldc, cols, k0 > 0, panel
                );
                if (copies)
                    b = panel, step = kNR;
            }
        }
    }
}

// M rows of A times columns [j0, j1) of B, whose columns lie along k: nothing is packed.
template <int M>
static void dots_of(
    float* c,
    int64_t ldc,
    const float* a,
    int64_t lda,
    const float* b,
    int64_t k,
    int64_t j0,
    int64_t j1
) {
    constexpr int J = 4;
    const int64_t whole = k / VL * VL;
    for (int64_t j = j0; j < j1; j += J) {
        // Past the end, the last column again.
        const float* at[J];
        for (int v = 0; v < J; ++v)
            at[v] = b + (j + v < j1 ? j + v : j1 - 1) * k;
        VF acc[M][J];
        for (int i = 0; i < M; ++i)
            for (int v = 0; v < J; ++v)
                acc[i][v] = set1(0.0f);
        for (int64_t p = 0; p < whole; p += VL) {
            VF bv[J];
#pragma GCC unroll 4
            for (int v = 0; v < J; ++v)
                bv[v] = load(at[v] + p);
#pragma GCC unroll 2
            for (int i = 0; i < M; ++i) {
                const VF av = load(a + i * lda + p);
#pragma GCC unroll 4
                for (int v = 0; v < J; ++v)
                    acc[i][v] = fma(av, bv[v], acc[i][v]);
            }
        }
        if (const int rest = int(k - whole)) {
            for (int i = 0; i < M; ++i) {
                const VF av = load_part(a + i * lda + whole, rest);
                for (int v = 0; v < J; ++v)
                    acc[i][v] = fma(av, load_part(at[v] + whole, rest), acc[i][v]);
            }
        }
        for (int i = 0; i < M; ++i)
            for (int v = 0; v < J && j + v < j1; ++v)
                c[i * ldc + j + v] = sum_of(acc[i][v]);
    }
}

static void dots(
    float* c,
    int64_t ldc,
    const float* a,
    int64_t lda,
    const float* b,
    int64_t m,
    int64_t k,
    int64_t j0,
    int64_t j1
) {
    int64_t i = 0;
    for (; i + 2 <= m; i += 2)
        dots_of<2>(c + i * ldc, ldc, a + i * lda, lda, b, k, j0, j1);
    if (i < m)
        dots_of<1>(c + i * ldc, ldc, a + i * lda, lda, b, k, j0, j1);
}

// VL columns of up to VL rows; rows that are not there are 0.
FN void load_square(VF* r, const float* in, int64_t ld, int rows, int columns) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i)
        r[i] = i >= rows       ? set1(0.0f)
               : columns == VL ? load(in + i * ld)
                               : load_part(in + i * ld, columns);
}

static void pack_across(float* out, const float* in, int64_t ld, int64_t cols, int64_t k) {
    for (int64_t at = 0; at < k; at += VL) {
        const int depth = int(k - at < VL ? k - at : VL);
        // Another thread has read the panel: what comes next is asked for before it is written.
        if (at + VL < k)
            for (int i = 0; i < VL * kNR; i += 16)
                __builtin_prefetch(out + (at + VL) * kNR + i, 1);
        for (int first = 0; first < kNR; first += VL) {
            const int64_t left = cols - first;
            VF r[VL];
            load_square(r, in + first * ld + at, ld, int(left < 0 ? 0 : left), depth);
            transpose(r);
            float* to = out + at * kNR + first;
#pragma GCC unroll 16
            for (int j = 0; j < VL; ++j)
                if (j < depth)
                    store(to + j * kNR, r[j]);
        }
    }
}

static void unpack(float* out, int64_t ld, const float* panel, int64_t k) {
    for (int64_t at = 0; at < k; at += VL) {
        const int depth = int(k - at < VL ? k - at : VL);
        for (int first = 0; first < kNR; first += VL) {
            VF r[VL];
            load_square(r, panel + at * kNR + first, kNR, depth, VL);
            transpose(r);
            for (int j = 0; j < VL; ++j)
                store_part(out + (first + j) * ld + at, depth, r[j]);
        }
    }
}

static constexpr cpu::GemmKernels kGemmKernels = {
    kNR, 1, gemm_block, pack_across, pack_along, unpack, dots,
};

#undef FN

}  // namespace fusedmlp::FUSEDMLP_ISA
