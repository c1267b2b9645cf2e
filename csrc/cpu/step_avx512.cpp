// The products and the kernels of a training step, for AVX-512: step_impl.h, gemm_impl.h with the
// vectors of vec_avx512.h.
#include "cpu/step_kernels.h"
#include "cpu/vec_avx512.h"

namespace fusedmlp::avx512 {

#define FN static inline __attribute__((always_inline))

constexpr int kMR = 12;

FN __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
FN VF load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
FN void store_part(float* p, int n, VF v) { _mm512_mask_storeu_ps(p, first(n), v); }
FN VF select_part(int n, VF a, VF b) { return _mm512_mask_blend_ps(first(n), b, a); }
FN VF load_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
FN float sum_of(VF v) { return _mm512_reduce_add_ps(v); }
FN float max_of(VF v) { return _mm512_reduce_max_ps(v); }

FN VF pairs(VF a, VF b, bool high) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
}

FN void transpose(VF* r) {
    VF t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    // r[4 i + j]: in its lane q column 4 q + j of rows 4 i .. 4 i + 3
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = pairs(t[i], t[i + 2], false);
        r[i + 1] = pairs(t[i], t[i + 2], true);
        r[i + 2] = pairs(t[i + 1], t[i + 3], false);
        r[i + 3] = pairs(t[i + 1], t[i + 3], true);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
        t[8 + j] = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        t[12 + j] = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        r[j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0x88);
        r[4 + j] = _mm512_shuffle_f32x4(t[4 + j], t[12 + j], 0x88);
        r[8 + j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0xdd);
        r[12 + j] = _mm512_shuffle_f32x4(t[4 + j], t[12 + j], 0xdd);
    }
}

#undef FN

}  // namespace fusedmlp::avx512

#define FUSEDMLP_ISA avx512
#define FUSEDMLP_ISA_NAME "avx512"
#include "cpu/step_impl.h"
