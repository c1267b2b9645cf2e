// Four floats a vector in the compilers' own vector types: any processor that gcc or clang know.
// avx2.h and avx512.h have the same functions with their own VL; what they mean is said here.
// Everything lives in the namespace of its instruction set, so that the linker can never merge code
// of two of them.
#pragma once

#ifdef __SSE2__
#    include <emmintrin.h>
#endif

namespace fusedmlp::baseline {

constexpr int VL = 4;
constexpr int kMR = 4;  // rows of a tile of a matrix product
typedef float VF __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));
typedef uint32_t VU __attribute__((vector_size(16)));
typedef uint64_t VQ __attribute__((vector_size(16)));
typedef uint16_t VH __attribute__((vector_size(8)));
typedef VI VM;  // all bits of a lane

#define FN static inline __attribute__((always_inline))

template <class V>
FN V load_any(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
FN void store_any(void* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

// Arithmetic is written with operators.
FN VF set1(float v) { return VF{v, v, v, v}; }
FN VI set1_int(int32_t v) { return VI{v, v, v, v}; }
FN VF load(const float* p) { return load_any<VF>(p); }
FN void store(float* p, VF v) { store_any(p, v); }
FN VF fma(VF a, VF b, VF c) { return a * b + c; }
FN VF fnma(VF a, VF b, VF c) { return c - a * b; }
// Of a NaN or two zeros the second argument.
FN VF max(VF a, VF b) { return a > b ? a : b; }
FN VF min(VF a, VF b) { return a < b ? a : b; }
FN VF sqrt(VF a) {
    VF r;
    for (int i = 0; i < VL; ++i)
        r[i] = __builtin_sqrtf(a[i]);
    return r;
}
FN VF sign(VF a) { return VF(VI(a) & set1_int(INT32_MIN)); }
FN VF abs(VF a) { return VF(VI(a) & set1_int(INT32_MAX)); }
FN VF flip(VF a, VF sign_bit) { return VF(VI(a) ^ VI(sign_bit)); }

FN VM gt(VF a, VF b) { return a > b; }
FN VM le(VF a, VF b) { return a <= b; }
FN VF select(VM m, VF a, VF b) { return VF((m & VI(a)) | (~m & VI(b))); }
FN VF keep_if(VM m, VF a) { return VF(m & VI(a)); }  // else +0
FN VF product_if(VM m, VF a, VF b) { return VF(m & VI(a * b)); }
FN VF drop_if(VM m, VF a) { return VF(~m & VI(a)); }  // then +0

// To the nearest integer, for |a| < 2^22.
FN VF round(VF a) {
    const VF magic = set1(12582912.0f);
    return (a + magic) - magic;
}
// Of an integral a; a NaN gives some number.
FN VI to_int(VF a) {
#ifdef __SSE2__
    return VI(_mm_cvtps_epi32(__m128(a)));
#else
    return VI(a + set1(12582912.0f)) - set1_int(0x4B400000);
#endif
}
// 2^n for an integral n in [-126, 127].
FN VF pow2(VF n) { return VF((to_int(n) + set1_int(127)) << 23); }
// p * 2^n for an integral n in [-252, 254], with gradual under- and overflow.
FN VF scale_by_pow2(VF p, VF n) {
    const VI i = to_int(n), half = i >> 1;
    return p * VF((half + set1_int(127)) << 23) * VF((i - half + set1_int(127)) << 23);
}

// p[i] += v[i]
FN void add_to_double(double* p, VF v) {
    for (int i = 0; i < VL; ++i)
        p[i] += double(v[i]);
}

// IEEE half and bfloat16; stores round to nearest even and keep NaN.
FN VF load(const Half* p) {
    const VU h = __builtin_convertvector(load_any<VH>(p), VU);
    const VU magnitude = (h & 0x7fffu) << 13;
    // Exponent moved by a multiplication, which also normalises the subnormal ones.
    const VF value = VF(magnitude) * set1(0x1p112f);
    const VU special = VU(VI(magnitude >= 0x0f800000u)) & 0x7f800000u;
    return VF(VU(value) | special | ((h & 0x8000u) << 16));
}
FN void store(Half* p, VF v) {
    const VU sign_bit = VU(sign(v)), a = VU(abs(v));
    // Normal result: round the lower 13 bits away. Subnormal: let an addition do the rounding.
    const VU normal = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
    const VU tiny = VU(VF(a) + set1(0.5f)) - 0x3f000000u;
    VU r = VU(select(VI(a < 0x38800000u), VF(tiny), VF(normal)));
    r = VU(select(VI(a >= 0x477ff000u), VF(VU(set1_int(0x7c00))), VF(r)));
    r = VU(select(VI(a > 0x7f800000u), VF(0x7e00u | ((a >> 13) & 0x3ffu)), VF(r)));
    store_any(p, __builtin_convertvector(r | (sign_bit >> 16), VH));
}
FN VF load(const BFloat* p) { return VF(__builtin_convertvector(load_any<VH>(p), VU) << 16); }
FN void store(BFloat* p, VF v) {
    const VU bits = VU(v), up = bits + 0x7fffu + ((bits >> 16) & 1u);
    const VU r = VU(select(VI(v != v), VF(bits | 0x00400000u), VF(up)));
    store_any(p, __builtin_convertvector(r >> 16, VH));
}

FN VI load_bits(const uint32_t* p) { return load_any<VI>(p); }
FN void store_bits(uint32_t* p, VI v) { store_any(p, v); }
FN VI set1_bits(uint32_t v) { return set1_int(int32_t(v)); }
FN VM not_below(VI w, VI threshold) { return VM(VU(w) >= VU(threshold)); }  // unsigned

// 64-bit lanes that hold 32-bit words; what is above the low 32 bits is not looked at unless said.
FN VQ set1_q(uint64_t v) { return VQ{v, v}; }
// The group that each lane works on, of VL / 2 groups of 8 elements.
FN VQ lanes_q() { return VQ{0, 1}; }
// VL / 2 numbers, number i to the lane of group i.
FN VQ load_q(const uint32_t* p) { return VQ{p[0], p[1]}; }
FN VQ add_q(VQ a, VQ b) { return a + b; }
// Product of the low words, all 64 bits.
FN VQ mul_q(VQ a, VQ b) {
#ifdef __SSE2__
    return VQ(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}
FN VQ raised_q(VQ a) { return a << 32; }  // low word above, 0 below
FN VQ high_q(VQ a) { return a >> 32; }
FN VQ xor_q(VQ a, VQ b) { return a ^ b; }
FN VQ xor_q(VQ a, VQ b, VQ c) { return a ^ (b ^ c); }

// w10, w32: w[1] below and w[0] above, w[3] below and w[2] above. out: 4 VL windows in column
// order.
FN void in_order(VQ w10, VQ w32, VI out[4]) {
    const VU a = VU(w10), b = VU(w32);
    for (int lane = 0; lane < 2; ++lane) {
        const VU w = lane ? __builtin_shufflevector(a, b, 3, 2, 7, 6)
                          : __builtin_shufflevector(a, b, 1, 0, 5, 4);
        const VU odd = (w >> 16) | (__builtin_shufflevector(w, w, 1, 2, 3, 0) << 16);
        out[2 * lane] = VI(__builtin_shufflevector(w, odd, 0, 4, 1, 5));
        out[2 * lane + 1] = VI(__builtin_shufflevector(w, odd, 2, 6, 3, 7));
    }
}
// Group i of v, 8 windows, to out + offset[i]; in ascending order, as they may overlap.
FN void store_groups(uint32_t* out, const uint32_t* offset, const VI v[4]) {
    for (int i = 0; i < 4; ++i)
        store_bits(out + offset[i / 2] + 4 * (i % 2), v[i]);
}

FN VF load_part(const float* p, int n) {
    VF v = set1(0.0f);
    __builtin_memcpy(&v, p, size_t(n) * sizeof(float));
    return v;
}
FN void store_part(float* p, int n, VF v) { __builtin_memcpy(p, &v, size_t(n) * sizeof(float)); }
FN VF select_part(int n, VF a, VF b) { return select(VI{0, 1, 2, 3} < set1_int(n), a, b); }
FN VF load_bytes(const uint8_t* p) {
    return VF{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
}
FN float sum_of(VF v) { return (v[0] + v[2]) + (v[1] + v[3]); }
FN float max_of(VF v) {
    const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
}
FN void transpose(VF* r) {
    const VF a = r[0], b = r[1], c = r[2], d = r[3];
    r[0] = VF{a[0], b[0], c[0], d[0]};
    r[1] = VF{a[1], b[1], c[1], d[1]};
    r[2] = VF{a[2], b[2], c[2], d[2]};
    r[3] = VF{a[3], b[3], c[3], d[3]};
}

#undef FN

}  // namespace fusedmlp::baseline
