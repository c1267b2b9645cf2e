// The products and the kernels of a training step, for AVX2: step_impl.h, gemm_impl.h with the
// vectors of vec_avx2.h.
#include "cpu/step_kernels.h"
#include "cpu/vec_avx2.h"

namespace fusedmlp::avx2 {

#define FN static inline __attribute__((always_inline))

constexpr int kMR = 6;

FN __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FN VF load_part(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
FN void store_part(float* p, int n, VF v) { _mm256_maskstore_ps(p, first(n), v); }
FN VF select_part(int n, VF a, VF b) {
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first(n)));
}
FN VF load_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
FN float sum_of(VF v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FN float max_of(VF v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

FN void transpose(VF* r) {
    VF t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
        t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
        r[j] = t[j];
}

#undef FN

}  // namespace fusedmlp::avx2

#define FUSEDMLP_ISA avx2
#define FUSEDMLP_ISA_NAME "avx2"
#include "cpu/step_impl.h"
