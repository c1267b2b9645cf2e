// Sixteen floats a vector: AVX-512 F, BW, DQ and VL. Same functions as baseline.h, which says
// what each does; for files compiled with those flags only.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 warns of its own header's undefined vectors, which is what they are for.
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#    pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

namespace fusedmlp::avx512 {

constexpr int VL = 16;
constexpr int kMR = 14;  // rows of a tile of a matrix product
using VF = __m512;
using VI = __m512i;
using VM = __mmask16;
using VQ = __m512i;  // eight 64-bit lanes

#define FN static inline __attribute__((always_inline))

FN VF set1(float v) { return _mm512_set1_ps(v); }
FN VF load(const float* p) { return _mm512_loadu_ps(p); }
FN void store(float* p, VF v) { _mm512_storeu_ps(p, v); }
FN VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
FN VF fnma(VF a, VF b, VF c) { return _mm512_fnmadd_ps(a, b, c); }
FN VF max(VF a, VF b) { return _mm512_max_ps(a, b); }
FN VF min(VF a, VF b) { return _mm512_min_ps(a, b); }
FN VF sqrt(VF a) { return _mm512_sqrt_ps(a); }
FN VF sign(VF a) { return _mm512_and_ps(a, set1(-0.0f)); }
FN VF abs(VF a) { return _mm512_andnot_ps(set1(-0.0f), a); }
FN VF flip(VF a, VF sign_bit) { return _mm512_xor_ps(a, sign_bit); }

FN VM gt(VF a, VF b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
FN VM le(VF a, VF b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
FN VF select(VM m, VF a, VF b) { return _mm512_mask_blend_ps(m, b, a); }
FN VF keep_if(VM m, VF a) { return _mm512_maskz_mov_ps(m, a); }
FN VF product_if(VM m, VF a, VF b) { return _mm512_maskz_mul_ps(m, a, b); }
FN VF drop_if(VM m, VF a) { return _mm512_maskz_mov_ps(_knot_mask16(m), a); }

FN VF round(VF a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FN VF pow2(VF n) { return _mm512_scalef_ps(set1(1.0f), n); }
FN VF scale_by_pow2(VF p, VF n) { return _mm512_scalef_ps(p, n); }

FN void add_to_double(double* p, VF v) {
    const __m256 hi = _mm512_extractf32x8_ps(v, 1);
    _mm512_storeu_pd(p, _mm512_loadu_pd(p) + _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    _mm512_storeu_pd(p + 8, _mm512_loadu_pd(p + 8) + _mm512_cvtps_pd(hi));
}

FN VI set1_bits(uint32_t v) { return _mm512_set1_epi32(int(v)); }

FN VF load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
FN void store(Half* p, VF v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// Word i of 16 values to the upper half of lane i, and back.
struct alignas(64) BFloatWords {
    uint16_t up[32], down[32];
    constexpr BFloatWords() : up(), down() {
        for (int i = 0; i < 16; ++i) {
            up[2 * i] = up[2 * i + 1] = uint16_t(i);
            down[i] = down[16 + i] = uint16_t(2 * i + 1);
        }
    }
};
constexpr BFloatWords kBFloatWords;

FN VF load(const BFloat* p) {
    const VI words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    const VI up = _mm512_load_si512(kBFloatWords.up);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, up, words));
}
FN void store(BFloat* p, VF v) {
    const VI bits = _mm512_castps_si512(v), half = _mm512_add_epi32(bits, set1_bits(0x7fff));
    const VM odd = _mm512_test_epi32_mask(bits, set1_bits(0x10000));
    const VM nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const VI up = _mm512_mask_sub_epi32(half, odd, half, set1_bits(~0u));
    const VI r = _mm512_mask_or_epi32(up, nan, bits, set1_bits(0x00400000));
    const VI words = _mm512_permutexvar_epi16(_mm512_load_si512(kBFloatWords.down), r);
    _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(words));
}

FN VI load_bits(const uint32_t* p) { return _mm512_loadu_si512(p); }
FN void store_bits(uint32_t* p, VI v) { _mm512_storeu_si512(p, v); }
FN VM not_below(VI w, VI threshold) { return _mm512_cmpge_epu32_mask(w, threshold); }

FN VQ set1_q(uint64_t v) { return _mm512_set1_epi64((long long)v); }
FN VQ lanes_q() { return _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7); }
FN VQ load_q(const uint32_t* p) {
    return _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i*)p));
}
FN VQ add_q(VQ a, VQ b) { return _mm512_add_epi64(a, b); }
FN VQ mul_q(VQ a, VQ b) { return _mm512_mul_epu32(a, b); }
FN VQ raised_q(VQ a) { return _mm512_slli_epi64(a, 32); }
FN VQ high_q(VQ a) { return _mm512_shuffle_epi32(a, _MM_PERM_DDBB); }
FN VQ xor_q(VQ a, VQ b) { return _mm512_xor_si512(a, b); }
FN VQ xor_q(VQ a, VQ b, VQ c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

// 16-bit pieces of windows 0 to 7 of groups 2i and 2i + 1; 4 lane + (0..3) is of w10, + 32 of w32.
struct alignas(64) WindowPieces {
    uint16_t of[4][32];
    constexpr WindowPieces() : of() {
        // w[0] to w[3] begin at piece 2, 0, 34 and 32.
        const int first[4] = {2, 0, 34, 32};
        for (int i = 0; i < 4; ++i)
            for (int g = 0; g < 2; ++g)
                for (int k = 0; k < 4; ++k) {
                    const int lane = 4 * (2 * i + g), w = first[k], next = first[(k + 1) % 4];
                    uint16_t* at = of[i] + 16 * g + 4 * k;
                    at[0] = uint16_t(lane + w);
                    at[1] = at[2] = uint16_t(lane + w + 1);
                    at[3] = uint16_t(lane + next);
                }
    }
};
constexpr WindowPieces kWindowPieces;

FN void in_order(VQ w10, VQ w32, VI out[4]) {
    for (int i = 0; i < 4; ++i)
        out[i] = _mm512_permutex2var_epi16(w10, _mm512_load_si512(kWindowPieces.of[i]), w32);
}
FN void store_groups(uint32_t* out, const uint32_t* offset, const VI v[4]) {
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_si256((__m256i*)(out + offset[2 * i]), _mm512_castsi512_si256(v[i]));
        _mm256_storeu_si256(
            (__m256i*)(out + offset[2 * i + 1]), _mm512_extracti64x4_epi64(v[i], 1)
        );
    }
}

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
