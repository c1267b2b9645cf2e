// The dtypes of tensors, and eight neighbouring elements of a row at a time: what shares one Philox
// call. Vector form: 16-byte accesses. Other form: element by element, for any address and count.
#pragma once

#include <type_traits>

#include "cuda/simt.h"

#ifdef FUSEDMLP_EMULATE
#    include "emulation/numeric.h"
#else
#    include <cuda_bf16.h>
#    include <cuda_fp16.h>
#endif

namespace fusedmlp::cuda {

struct Half {
    uint16_t bits;
    static constexpr Dtype kDtype = Dtype::kFloat16;
};
struct BFloat {
    uint16_t bits;
    static constexpr Dtype kDtype = Dtype::kBFloat16;
};

template <class T>
constexpr Dtype kDtypeOf = T::kDtype;
template <>
inline constexpr Dtype kDtypeOf<float> = Dtype::kFloat32;

constexpr size_t size_of(Dtype d) { return d == Dtype::kFloat32 ? 4 : 2; }

#ifdef FUSEDMLP_EMULATE
inline float to_float(Half v) { return emulation::from_half(v.bits); }
inline float to_float(BFloat v) { return emulation::from_bfloat(v.bits); }
inline void round_to(Half& v, float f) { v.bits = emulation::to_half(f); }
inline void round_to(BFloat& v, float f) { v.bits = emulation::to_bfloat(f); }
template <class T>
uint32_t round_two(float low, float high) {
    T a, b;
    round_to(a, low);
    round_to(b, high);
    return a.bits | uint32_t(b.bits) << 16;
}
#else
FUSEDMLP_DEVICE float to_float(Half v) { return __half2float(__ushort_as_half(v.bits)); }
FUSEDMLP_DEVICE float to_float(BFloat v) { return __uint_as_float(uint32_t(v.bits) << 16); }
FUSEDMLP_DEVICE void round_to(Half& v, float f) { v.bits = __half_as_ushort(__float2half_rn(f)); }
FUSEDMLP_DEVICE void round_to(BFloat& v, float f) {
    v.bits = __bfloat16_as_ushort(__float2bfloat16_rn(f));
}
// One instruction for both.
template <class T>
FUSEDMLP_DEVICE uint32_t round_two(float low, float high) {
    uint32_t bits;
    if constexpr (std::is_same_v<T, Half>) {
        const __half2 h = __floats2half2_rn(low, high);
        memcpy(&bits, &h, sizeof(bits));
    } else {
        const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
        memcpy(&bits, &h, sizeof(bits));
    }
    return bits;
}
#endif

FUSEDMLP_DEVICE float to_float(float v) { return v; }
FUSEDMLP_DEVICE void round_to(float& v, float f) { v = f; }

constexpr int kEight = kPhiloxColumns;

// Eight elements between their load and their first use; what is beyond `count` is 0.
template <class T, bool VECTOR>
struct Octet {
    static constexpr int kPerWords = VECTOR ? 16 / sizeof(T) : 1;

    // VECTOR: `at` is a multiple of 16 bytes, `count` of kPerWords.
    FUSEDMLP_DEVICE void read(const T* at, int count) {
        if constexpr (VECTOR) {
            FUSEDMLP_UNROLL
            for (int i = 0; i < kWords; ++i)
                words[i] =
                    i * kPerWords < count ? load(reinterpret_cast<const Words*>(at) + i) : Words{};
        } else {
            FUSEDMLP_UNROLL
            for (int j = 0; j < kEight; ++j)
                each[j] = j < count ? to_float(load(at + j)) : 0.0f;
        }
    }

    FUSEDMLP_DEVICE void get(float (&v)[kEight]) const {
        if constexpr (!VECTOR) {
            FUSEDMLP_UNROLL
            for (int j = 0; j < kEight; ++j)
                v[j] = each[j];
        } else {
            T element[kEight];
            memcpy(element, words, sizeof(words));
            FUSEDMLP_UNROLL
            for (int j = 0; j < kEight; ++j)
                v[j] = to_float(element[j]);
        }
    }

    // Rounds and stores the first `count`.
    FUSEDMLP_DEVICE static void write(T* at, const float (&v)[kEight], int count) {
        if constexpr (!VECTOR) {
            FUSEDMLP_UNROLL
            for (int j = 0; j < kEight; ++j) {
                T element;
                round_to(element, v[j]);
                if (j < count)
                    store(at + j, element);
            }
        } else if constexpr (sizeof(T) == 2) {
            const Words w{
                round_two<T>(v[0], v[1]), round_two<T>(v[2], v[3]), round_two<T>(v[4], v[5]),
                round_two<T>(v[6], v[7])
            };
            store(reinterpret_cast<Words*>(at), w);
        } else {
            FUSEDMLP_UNROLL
            for (int i = 0; i < kWords; ++i) {
                Words w;
                memcpy(&w, v + i * kPerWords, sizeof(w));
                if (i * kPerWords < count)
                    store(reinterpret_cast<Words*>(at) + i, w);
            }
        }
    }

    static constexpr int kWords = VECTOR ? kEight / kPerWords : 1;
    std::conditional_t<VECTOR, Words, float> words[kWords];
    float each[VECTOR ? 1 : kEight];
};

inline bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// Whether rows of `cols` elements can be read with Octet<T, true>.
inline bool takes_vectors(Dtype dtype, int64_t cols, std::initializer_list<const void*> rows) {
    for (const void* at : rows)
        if (!aligned(at))
            return false;
    return cols % int64_t(16 / size_of(dtype)) == 0;
}

// Calls f(T{}) with the type of dtype.
template <class F>
int with_dtype(Dtype dtype, F&& f) {
    if (dtype == Dtype::kFloat32)
        return f(float{});
    if (dtype == Dtype::kFloat16)
        return f(Half{});
    return f(BFloat{});
}

}  // namespace fusedmlp::cuda
