// Eight floats a vector: AVX2, FMA and F16C. Same functions as baseline.h, which says what
// each does; for files compiled with -mavx2 -mfma -mf16c only.
#pragma once

#include <immintrin.h>

namespace fusedmlp::avx2 {

constexpr int VL = 8;
constexpr int kMR = 6;  // rows of a tile of a matrix product
using VF = __m256;
using VI = __m256i;
using VM = __m256;   // all bits of a lane
using VQ = __m256i;  // four 64-bit lanes

#define FN static inline __attribute__((always_inline))

FN VF set1(float v) { return _mm256_set1_ps(v); }
FN VF load(const float* p) { return _mm256_loadu_ps(p); }
FN void store(float* p, VF v) { _mm256_storeu_ps(p, v); }
FN VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
FN VF fnma(VF a, VF b, VF c) { return _mm256_fnmadd_ps(a, b, c); }
FN VF max(VF a, VF b) { return _mm256_max_ps(a, b); }
FN VF min(VF a, VF b) { return _mm256_min_ps(a, b); }
FN VF sqrt(VF a) { return _mm256_sqrt_ps(a); }
FN VF sign(VF a) { return _mm256_and_ps(a, set1(-0.0f)); }
FN VF abs(VF a) { return _mm256_andnot_ps(set1(-0.0f), a); }
FN VF flip(VF a, VF sign_bit) { return _mm256_xor_ps(a, sign_bit); }

FN VM gt(VF a, VF b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
FN VM le(VF a, VF b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
FN VF select(VM m, VF a, VF b) { return _mm256_blendv_ps(b, a, m); }
FN VF keep_if(VM m, VF a) { return _mm256_and_ps(m, a); }
FN VF product_if(VM m, VF a, VF b) { return _mm256_and_ps(m, a * b); }
FN VF drop_if(VM m, VF a) { return _mm256_andnot_ps(m, a); }

FN VF round(VF a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FN VF pow2(VF n) {
    const VI bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
FN VF scale_by_pow2(VF p, VF n) {
    const VI i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1);
    const VI bias = _mm256_set1_epi32(127);
    const VI a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const VI b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), bias), 23);
    return p * _mm256_castsi256_ps(a) * _mm256_castsi256_ps(b);
}

FN void add_to_double(double* p, VF v) {
    _mm256_storeu_pd(p, _mm256_loadu_pd(p) + _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
    _mm256_storeu_pd(p + 4, _mm256_loadu_pd(p + 4) + _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
}

FN VF load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
FN void store(Half* p, VF v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
FN VF load(const BFloat* p) {
    const VI v = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
}
FN void store(BFloat* p, VF v) {
    const VI bits = _mm256_castps_si256(v);
    const VI lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const VI up = _mm256_add_epi32(bits, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
    const VI nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const VI quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const VI r = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    const __m128i lo = _mm256_castsi256_si128(r), hi = _mm256_extracti128_si256(r, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(lo, hi));
}

FN VI load_bits(const uint32_t* p) { return _mm256_loadu_si256((const VI*)p); }
FN void store_bits(uint32_t* p, VI v) { _mm256_storeu_si256((VI*)p, v); }
FN VI set1_bits(uint32_t v) { return _mm256_set1_epi32(int(v)); }
FN VM not_below(VI w, VI threshold) {
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(w, threshold), w));
}

FN VQ set1_q(uint64_t v) { return _mm256_set1_epi64x((long long)v); }
FN VQ lanes_q() { return _mm256_setr_epi64x(0, 1, 2, 3); }
FN VQ load_q(const uint32_t* p) {
    return _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i*)p));
}
FN VQ add_q(VQ a, VQ b) { return _mm256_add_epi64(a, b); }
FN VQ mul_q(VQ a, VQ b) { return _mm256_mul_epu32(a, b); }
FN VQ raised_q(VQ a) { return _mm256_slli_epi64(a, 32); }
FN VQ high_q(VQ a) { return _mm256_shuffle_epi32(a, 0xf5); }
FN VQ xor_q(VQ a, VQ b) { return _mm256_xor_si256(a, b); }
FN VQ xor_q(VQ a, VQ b, VQ c) {
    VQ known = _mm256_xor_si256(b, c);
    // a comes last and is waited for; gcc would put a key after it.
    asm("" : "+x"(known));
    return _mm256_xor_si256(a, known);
}

FN void in_order(VQ w10, VQ w32, VI out[4]) {
    // A 128-bit half holds w[1], w[0], w[3], w[2]; windows 0 to 3 below, 4 to 7 above.
    const VI bytes = _mm256_setr_epi8(
        4, 5, 6, 7, 6, 7, 0, 1, 0, 1, 2, 3, 2, 3, 12, 13, 12, 13, 14, 15, 14, 15, 8, 9, 8, 9, 10,
        11, 10, 11, 4, 5
    );
    const VI even = _mm256_unpacklo_epi64(w10, w32), odd = _mm256_unpackhi_epi64(w10, w32);
    out[0] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(even, 0x44), bytes);
    out[1] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(odd, 0x44), bytes);
    out[2] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(even, 0xee), bytes);
    out[3] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(odd, 0xee), bytes);
}
FN void store_groups(uint32_t* out, const uint32_t* offset, const VI v[4]) {
    for (int i = 0; i < 4; ++i)
        store_bits(out + offset[i], v[i]);
}

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
