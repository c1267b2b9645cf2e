// The micro-kernel of gemm_impl.h and gemm_bf16_impl.h; included once for each instruction set. A
// tile of C stays in registers: M rows of NV vectors, one broadcast of A against NV vectors of B
// for each k. Op::sum(a, b, c) is c + a b, lane by lane, of whatever a word holds.

namespace fusedmlp::FUSEDMLP_ISA {

constexpr int kNR = 2 * VL;

// COPIES: leaves the columns of B one after the other in `copy`, for the tiles that follow.
template <class Op, int M, int NV, bool COPIES = false>
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
    bool add,
    float* copy
) {
    // Three pointers and the distances of 1, 2, 3, 4 and 8 rows reach all rows. A compiler that
    // knows how they depend on each other takes a register for each row instead, and has too few.
    const float *a5 = a + 5 * a_row, *a10 = a + 10 * a_row;
    int64_t three = 3 * a_row;
    asm("" : "+r"(a5), "+r"(a10), "+r"(three));
    const auto of_row = [&](int i) {
        if (i == 3)
            return a[three];
        const int first = i >= 10 && i <= 12 ? 10 : i >= 5 && i != 8 ? 5 : 0;
        return (first == 10 ? a10 : first == 5 ? a5 : a)[(i - first) * a_row];
    };
    VF acc[M][NV];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
            acc[i][v] = set1(0.0f);
    for (int64_t at = 0; at < k; ++at, a += a_col, a5 += a_col, a10 += a_col, b += b_step) {
        VF bv[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
            bv[v] = load(b + v * VL);
        if constexpr (COPIES) {
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v)
                store(copy + v * VL, bv[v]);
            copy += NV * VL;
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const VF av = set1(of_row(i));
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
    bool,
    float*
);

template <class Op, int M>
static constexpr void fill_micros(Micro (*table)[3]) {
    if constexpr (M > 0) {
        table[M][0] = &micro<Op, M, 1>;
        table[M][1] = &micro<Op, M, 2>;
        if constexpr (Op::kCopies)
            table[M][2] = &micro<Op, M, 2, true>;
        fill_micros<Op, M - 1>(table);
    }
}

template <class Op>
struct Micros {
    // By rows; one vector, two, two that are copied where Op asks for it.
    Micro of[kMR + 1][3] = {};
    constexpr Micros() { fill_micros<Op, kMR>(of); }
};

}  // namespace fusedmlp::FUSEDMLP_ISA
