// Matrix products in fp32 for the training step, whose operands come in any orientation. The order
// of every sum depends on sizes only, never on the number of threads.
#pragma once

#include "common/params.h"

namespace fusedmlp::cpu {

constexpr int64_t kGemmPad = 64;  // floats that may be touched past the end of a packed operand

// C = A B with C (M, N), row-major; B and C may be any memory that does not overlap.
struct Gemm {
    float* c;        // (M, N), N apart
    const float* a;  // (M, K) or, where a_across, (K, M)
    const float* b;  // (K, N) or, where b_across, (N, K)
    bool a_across;   //
    bool b_across;   //
    int64_t m;       //
    int64_t n;       //
    int64_t k;       //
    float* scratch;  // gemm_scratch(m, n, k) floats
    // Called once for each finished block of C, rows [i0, i1) and columns [j0, j1), or null.
    void (*done)(void* context, int64_t i0, int64_t i1, int64_t j0, int64_t j1);
    void* context;  //
};

int64_t gemm_scratch(int64_t m, int64_t n, int64_t k);
int launch_gemm(const Gemm& g, ParallelFor parallel);

// One block of C: rows of the panels [ip0, ip1) and columns of the panels [jp0, jp1).
struct GemmBlock {
    float* c;
    int64_t ldc;
    const float* a;       // element (i, k) of panel p: a[p a_panel + k a_step + i]
    int64_t a_panel;      //
    int64_t a_step;       //
    const float* b;       // element (k, j) of panel p: b[p b_panel + k b_step + j]
    int64_t b_panel;      //
    int64_t b_step;       //
    const float* b_last;  // the last panel of B, where it is not at its place
    int64_t b_last_step;  //
    int64_t m;
    int64_t n;
    int64_t k;
    int64_t ip0;
    int64_t ip1;
    int64_t jp0;
    int64_t jp1;
};

// What an instruction set offers. Panels of A have mr rows, panels of B nr columns.
struct GemmKernels {
    int mr;
    int nr;
    void (*block)(const GemmBlock& b);
    // out[k * width + i] = in[i * ld + k] for i < rows, 0 up to width; width is mr or nr.
    void (*pack_across)(
        float* out,
        int width,
        const float* in,
        int64_t ld,
        int64_t rows,
        int64_t k
    );
    // out[k * width + j] = in[k * ld + j] for j < cols, 0 up to width.
    void (*pack_along)(float* out, int width, const float* in, int64_t ld, int64_t cols, int64_t k);
    // Columns [j0, j1) of c (m, n) = a (m, k) b (n, k)^T, for few rows.
    void (*dots)(
        float* c,
        int64_t n,
        const float* a,
        const float* b,
        int64_t m,
        int64_t k,
        int64_t j0,
        int64_t j1
    );
};

}  // namespace fusedmlp::cpu
