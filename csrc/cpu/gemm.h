// Matrix products for the training step, whose operands come in any orientation: in fp32, or in
// bf16 summed in fp32. The order of every sum depends on sizes only, never on the number of threads
// or on how C is cut.
#pragma once

#include "common/params.h"

namespace fusedmlp::cpu {

constexpr int64_t kGemmPad = 64;    // floats that may be touched past the end of panels
static_assert(kGemmPad % 16 == 0);  // what lies behind starts at a line of the cache too

struct GemmKernels;

enum class Layout {
    kRows,    // (K, N)
    kAcross,  // (N, K)
    kPanels,  // as pack_panels leaves it
};

// C = A B with C (M, N) row-major; memory of C overlaps no other.
struct Gemm {
    float* c;        //
    int64_t ldc;     // from row to row
    const float* a;  // element (i, k): a[i a_row + k a_col]
    int64_t a_row;   //
    int64_t a_col;   //
    const float* b;  //
    int64_t ldb;     // from row to row; panels have none
    Layout b_is;     //
    int64_t m;       //
    int64_t n;       //
    int64_t k;       //
    float* scratch;  // gemm_scratch(n, k) floats, or null where B is not kAcross
    const GemmKernels* kernels;
};

int64_t gemm_scratch(int64_t n, int64_t k);
// Of one panel of a B with k rows.
int64_t panel_floats(const GemmKernels& kernels, int64_t k);

// Whether a product with this many rows reads B (N, K) as it is, row by row: its sums then differ
// from those with panels.
bool is_of_dots(const GemmKernels& kernels, int64_t m, int64_t n, int64_t k);

int launch_gemm(const Gemm& g, ParallelFor parallel);

// Columns [j0, j1) of B (K, N), rows [k0, k1) of them, to panels of B; j0 is where a panel begins
// and j1 where one ends, or N; in bf16 k0 is a multiple of 32. panels: gemm_scratch(n, k) floats.
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
);

// One block of C: rows [i0, i1) and columns of the panels [jp0, jp1).
struct GemmBlock {
    float* c;
    int64_t ldc;
    int64_t c_panel;  // from the columns of a panel to those of the next
    const float* a;   // as in Gemm
    int64_t a_row;    //
    int64_t a_col;    //
    const float* b;   // word (k, j) of panel p: b[p b_panel + k b_step + j]
    int64_t b_panel;  //
    int64_t b_step;   //
    bool b_is_apart;  // B is kRows, not packed: its rows do not lie one after the other
    int64_t n;
    int64_t k;
    int64_t i0;
    int64_t i1;
    int64_t jp0;
    int64_t jp1;
};

constexpr int64_t kBlockRows = 128;  // at most

// The blocks of a product whose B is not kAcross, to be run in any order by any thread. Rows and
// columns of a block begin at multiples of the width of a panel.
struct GemmPlan {
    const GemmKernels* kernels;
    GemmBlock block;
    int64_t m;
    int64_t down;    // blocks below each other
    int64_t across;  // side by side
    int64_t blocks;
};

// least: blocks at least, where C has so many.
GemmPlan plan_gemm(const Gemm& g, int64_t least);
GemmBlock block_of(const GemmPlan& plan, int64_t at);

// What an instruction set offers. Panels of B have nr columns, and a word for `values` of k.
struct GemmKernels {
    int nr;
    int values;
    void (*block)(const GemmBlock& b);
    // Word k of column j to out[k * nr + j], of in[j * ld + k] for j < cols, 0 up to nr.
    void (*pack_across)(float* out, const float* in, int64_t ld, int64_t cols, int64_t k);
    // Of in[k * ld + j].
    void (*pack_along)(float* out, const float* in, int64_t ld, int64_t cols, int64_t k);
    // Column j of a whole panel of k words to out + j * ld; fp32 only.
    void (*unpack)(float* out, int64_t ld, const float* panel, int64_t k);
    // Columns [j0, j1) of c (m, n) = a (m, k) b (n, k)^T, for few rows; null where there is none.
    void (*dots)(
        float* c,
        int64_t ldc,
        const float* a,
        int64_t lda,
        const float* b,
        int64_t m,
        int64_t k,
        int64_t j0,
        int64_t j1
    );
};

}  // namespace fusedmlp::cpu
