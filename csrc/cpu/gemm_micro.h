// The micro-kernel of gemm_impl.h and gemm_bf16_impl.h; included once for each instruction set. A
// tile of C stays in registers: M rows of NV vectors, one broadcast of A against NV vectors of B
// for each k. Op::sum(a, b, c) is c + a b, lane by lane, of whatever a word holds.

namespace fusedmlp::FUSEDMLP_ISA {

constexpr int kNR = 2 * VL;

template <class Op, int M, int NV>
static void micro(
    const float* a,
    int64_t a_row,
    int64_t a_col,
    const float* b,
    int64_t b_step,
    int64_t k,
    float* c,
    int64_t ldc,
    int cols,
    bool add
) {
    VF acc[M][NV];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
            acc[i][v] = set1(0.0f);
    for (int64_t at = 0; at < k; ++at, a += a_col, b += b_step) {
        VF bv[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
            bv[v] = load(b + v * VL);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const VF av = set1(a[i * a_row]);
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v)
                acc[i][v] = Op::sum(av, bv[v], acc[i][v]);
        }
    }
    if (cols == NV * VL) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) {
                float* at = c + i * ldc + v * VL;
                store(at, add ? load(at) + acc[i][v] : acc[i][v]);
            }
        return;
    }
    const int last = cols - (NV - 1) * VL;
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
            float* at = c + i * ldc + v * VL;
            const int count = v == NV - 1 ? last : VL;
            store_part(at, count, add ? load_part(at, count) + acc[i][v] : acc[i][v]);
        }
    }
}

using Micro = void (*)(
    const float*,
    int64_t,
    int64_t,
    const float*,
    int64_t,
    int64_t,
    float*,
    int64_t,
    int,
    bool
);

template <class Op, int M>
static constexpr void fill_micros(Micro (*table)[2]) {
    if constexpr (M > 0) {
        table[M][0] = &micro<Op, M, 1>;
        table[M][1] = &micro<Op, M, 2>;
        fill_micros<Op, M - 1>(table);
    }
}

template <class Op>
struct Micros {
    Micro of[kMR + 1][2] = {};  // rows, vectors - 1
    constexpr Micros() { fill_micros<Op, kMR>(of); }
};

}  // namespace fusedmlp::FUSEDMLP_ISA
