// The dtypes of tensors, and eight neighbouring elements of a row at a time: what shares one Philox
// call. Vector form: 16-byte accesses. Other form: element by element, for any address and count.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "cuda/launch.cuh"

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

__device__ __forceinline__ float to_float(Half v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ __forceinline__ float to_float(BFloat v) {
    return __uint_as_float(uint32_t(v.bits) << 16);
}
__device__ __forceinline__ void round_to(Half& v, float f) {
    v.bits = __half_as_ushort(__float2half_rn(f));
}
__device__ __forceinline__ void round_to(BFloat& v, float f) {
    v.bits = __bfloat16_as_ushort(__float2bfloat16_rn(f));
}
// One instruction for both.
template <class T>
__device__ __forceinline__ uint32_t round_two(float low, float high) {
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

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ void round_to(float& v, float f) { v = f; }

constexpr int kEight = kPhiloxColumns;

// Eight elements between their load and their first use; what is beyond `count` is 0.
template <class T, bool VECTOR>
struct Octet {
    static constexpr int kPerWords = VECTOR ? 16 / sizeof(T) : 1;

    // VECTOR: `at` is a multiple of 16 bytes, `count` of kPerWords.
    __device__ __forceinline__ void read(const T* at, int count) {
        if constexpr (VECTOR) {
#pragma unroll
            for (int i = 0; i < kWords; ++i)
                words[i] = i * kPerWords < count ? reinterpret_cast<const uint4*>(at)[i] : uint4{};
        } else {
#pragma unroll
            for (int j = 0; j < kEight; ++j)
                each[j] = j < count ? to_float(at[j]) : 0.0f;
        }
    }

    __device__ __forceinline__ void get(float (&v)[kEight]) const {
        if constexpr (!VECTOR) {
#pragma unroll
            for (int j = 0; j < kEight; ++j)
                v[j] = each[j];
        } else {
            T element[kEight];
            memcpy(element, words, sizeof(words));
#pragma unroll
            for (int j = 0; j < kEight; ++j)
                v[j] = to_float(element[j]);
        }
    }

    // Rounds and stores the first `count`.
    __device__ __forceinline__ static void write(T* at, const float (&v)[kEight], int count) {
        if constexpr (!VECTOR) {
#pragma unroll
            for (int j = 0; j < kEight; ++j) {
                T element;
                round_to(element, v[j]);
                if (j < count)
                    at[j] = element;
            }
        } else if constexpr (sizeof(T) == 2) {
            const uint4 w{
                round_two<T>(v[0], v[1]), round_two<T>(v[2], v[3]), round_two<T>(v[4], v[5]),
                round_two<T>(v[6], v[7])
            };
            // A plain assignment becomes four stores in places.
            __stwb(reinterpret_cast<uint4*>(at), w);
        } else {
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                uint4 w;
                memcpy(&w, v + i * kPerWords, sizeof(w));
                if (i * kPerWords < count)
                    __stwb(reinterpret_cast<uint4*>(at) + i, w);
            }
        }
    }

    static constexpr int kWords = VECTOR ? kEight / kPerWords : 1;
    std::conditional_t<VECTOR, uint4, float> words[kWords];
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
