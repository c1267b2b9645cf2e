// Products of gemm.h whose operands are rounded to bf16 as they are packed, and summed in fp32;
// included once for each instruction set that has such products, after gemm_impl.h and a Products.
// A word holds two values whose k follow each other, the lower k in its lower half:
//   A, of a block   [row][word]     16 rows at a time, the last ones of them unwritten
//   B, a panel      [word][column]
// Values past the end of k are 0, up to a whole number of kWords.
namespace fusedmlp::FUSEDMLP_ISA {

#define FN static inline __attribute__((always_inline))

constexpr int64_t kWords = 16;  // 32 of k: what one instruction of a matrix unit takes
constexpr int64_t kDepthWords = 128;
constexpr int64_t kTileRows = 16;

FN __m256i rounded(VF v) { return (__m256i)_mm512_cvtneps_pbh(v); }

// 16 words of lower and upper halves.
FN VF words(VF lower, VF upper) {
    const VI low = _mm512_cvtepu16_epi32(rounded(lower));
    const VI high = _mm512_cvtepu16_epi32(rounded(upper));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

FN int64_t word_count(int64_t k) { return (k + 2 * kWords - 1) / (2 * kWords) * kWords; }

FN void clear(float* out, int64_t from, int64_t to) {
    for (; from < to; ++from) {
        store(out + from * kNR, set1(0.0f));
        store(out + from * kNR + VL, set1(0.0f));
    }
}

static void pack_across_bf16(float* out, const float* in, int64_t ld, int64_t cols, int64_t k) {
    for (int64_t at = 0; at < k; at += VL) {
        const int depth = int(k - at < VL ? k - at : VL);
        for (int first = 0; first < kNR; first += VL) {
            const int64_t left = cols - first;
            VF r[VL];
            load_square(r, in + first * ld + at, ld, int(left < 0 ? 0 : left), depth);
            transpose(r);
            float* to = out + at / 2 * kNR + first;
#pragma GCC unroll 8
            for (int j = 0; j < VL; j += 2)
                if (j < depth)
                    store(to + j / 2 * kNR, words(r[j], r[j + 1]));
        }
    }
    clear(out, (k + 1) / 2, word_count(k));
}

FN VF load_at_most(const float* p, int64_t n) {
    return n >= VL ? load(p) : n <= 0 ? set1(0.0f) : load_part(p, int(n));
}

static void pack_along_bf16(float* out, const float* in, int64_t ld, int64_t cols, int64_t k) {
    for (int64_t at = 0; at < k; at += 2) {
        float* to = out + at / 2 * kNR;
        for (int first = 0; first < kNR; first += VL) {
            const float* from = in + at * ld + first;
            const VF lower = load_at_most(from, cols - first);
            const VF upper = at + 1 < k ? load_at_most(from + ld, cols - first) : set1(0.0f);
            store(to + first, words(lower, upper));
        }
    }
    clear(out, (k + 1) / 2, word_count(k));
}

// Rows of A that follow each other in memory: values of one k.
static void pack_a_rows(float* out, const float* a, int64_t lda, int64_t rows, int64_t k) {
    const int64_t count = word_count(k);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t at = 0; at < count; at += kWords) {
            const float* from = a + i * lda + 2 * at;
            const VF first = load_at_most(from, k - 2 * at);
            const VF second = load_at_most(from + VL, k - 2 * at - VL);
            store(
                out + i * count + at,
                _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second, first))
            );
        }
}

// Values of A that follow each other in memory: rows of one k.
static void pack_a_columns(float* out, const float* a, int64_t lda, int64_t rows, int64_t k) {
    const int64_t count = word_count(k);
    for (int64_t i0 = 0; i0 < rows; i0 += VL) {
        const int here = int(rows - i0 < VL ? rows - i0 : VL);
        for (int64_t at = 0; at < 2 * count; at += VL) {
            const int64_t left = k - at;
            VF r[VL];
            load_square(r, a + i0 + at * lda, lda, int(left < 0 ? 0 : left), here);
            transpose(r);
            for (int i = 0; i < here; ++i)
                _mm256_storeu_si256((__m256i*)(out + (i0 + i) * count + at / 2), rounded(r[i]));
        }
    }
}

static void gemm_block_bf16(const cpu::GemmBlock& g) {
    alignas(64) float a[cpu::kBlockRows * kDepthWords];
    alignas(64) float panel[kDepthWords * kNR];
    const Products products;
    const int64_t rows = g.i1 - g.i0, all = word_count(g.k);
    const int64_t passes = (all + kDepthWords - 1) / kDepthWords;
    const int64_t depth = (all / kWords + passes - 1) / passes * kWords;
    for (int64_t w0 = 0; w0 < all; w0 += depth) {
        const int64_t k0 = 2 * w0, count = all - w0 < depth ? all - w0 : depth;
        const int64_t k = g.k - k0 < 2 * count ? g.k - k0 : 2 * count;
        const float* from = g.a + g.i0 * g.a_row + k0 * g.a_col;
        if (g.a_col == 1)
            pack_a_rows(a, from, g.a_row, rows, k);
        else
            pack_a_columns(a, from, g.a_col, rows, k);
        for (int64_t jp = g.jp0; jp < g.jp1; ++jp) {
            const int64_t j = jp * kNR;
            const int cols = int(g.n - j < kNR ? g.n - j : kNR);
            const float* b = g.b + jp * g.b_panel + w0 * g.b_step;
            if (g.b_is_apart) {
                pack_along_bf16(panel, g.b + jp * g.b_panel + k0 * g.b_step, g.b_step, cols, k);
                b = panel;
            }
            products(a, rows, b, count, g.c + g.i0 * g.ldc + jp * g.c_panel, g.ldc, cols, w0 > 0);
        }
    }
}

#undef FN

}  // namespace fusedmlp::FUSEDMLP_ISA
