// Bias, activation and dropout of eight neighbouring elements of a row, in fp32. Shared by all
// kernels. The mask implements fusedmlp/spec/philox.py, the activations are those of
// common/activations.h.
#pragma once

#include "cuda/numeric.cuh"

namespace fusedmlp::cuda {

// Activations that share a kernel: one that holds a slope in registers, or calls erf, does not take
// them from the others.
enum Family : int { kPlain, kSloped, kSmooth };

constexpr Family family_of(int act) {
    if (act == kPrelu)
        return kSloped;
    const bool plain = act == kNone || act == kRelu || act == kLeakyRelu || act == kReluSquared;
    return plain ? kPlain : kSmooth;
}

template <int VALUE>
struct Tag {
    static constexpr int value = VALUE;
};

// Calls f(Tag<act>) for an id of the family.
template <int FAMILY, int ACT = 0, class F>
__device__ __forceinline__ void with_act(int act, F&& f) {
    if constexpr (ACT < kActCount) {
        if constexpr (family_of(ACT) == FAMILY) {
            if (act == ACT)
                return f(Tag<ACT>{});
        }
        with_act<FAMILY, ACT + 1>(act, f);
    }
}

// The numbers of all draws of a call.
struct Draws {
    uint64_t seed, stream;
    uint32_t threshold;
    bool on;
};

__device__ __forceinline__ Draws load_draws(const DropoutParams& d) {
    Draws draws{0, 0, uint32_t(d.threshold), d.threshold != 0};
    if (draws.on) {
        draws.seed = uint64_t(d.state[0]);
        draws.stream = uint64_t(d.state[1]) + uint64_t(d.stream_offset);
    }
    return draws;
}

// Dropped elements become +0, by selection. row: with the offset added, mod 2^32.
__device__ __forceinline__ void
drop(float (&v)[kEight], const Draws& draws, uint32_t row, uint32_t group) {
    const PhiloxWords words = philox_group(draws.seed, draws.stream, row, group);
#pragma unroll
    for (int j = 0; j < kEight; ++j)
        v[j] = philox_window(words, j) < draws.threshold ? 0.0f : v[j];
}

// Elements `col` to `col + count - 1` of a vector over columns (bias, slope); beyond it, 0.
template <class T>
__device__ __forceinline__ void load_columns(
    float (&v)[kEight],
    const void* at,
    Dtype dtype,
    bool is_aligned,
    int64_t col,
    int count
) {
    const auto get = [&](auto octet, auto* first) {
        octet.read(first + col, count);
        octet.get(v);
    };
    if (dtype == Dtype::kFloat32) {
        const auto* first = static_cast<const float*>(at);
        if (is_aligned && count == kEight)
            get(Octet<float, true>{}, first);
        else
            get(Octet<float, false>{}, first);
    } else if constexpr (sizeof(T) == 2) {
        const auto* first = static_cast<const T*>(at);
        if (is_aligned && count == kEight)
            get(Octet<T, true>{}, first);
        else
            get(Octet<T, false>{}, first);
    }
}

// What an epilogue reads that is not an element of x, as kernels take it.
struct Columns {
    EpilogueParams e;
    bool bias_aligned, slope_aligned;

    Columns() = default;
    explicit Columns(const EpilogueParams& p)
        : e(p), bias_aligned(aligned(p.bias)), slope_aligned(aligned(p.slope)) {}

    // Minus zero where there is none: it changes nothing that it is added to.
    template <class T>
    __device__ __forceinline__ void load_bias(float (&v)[kEight], int64_t col, int count) const {
        if (e.bias)
            return load_columns<T>(v, e.bias, e.bias_dtype, bias_aligned, col, count);
#pragma unroll
        for (int j = 0; j < kEight; ++j)
            v[j] = -0.0f;
    }

    // Slope of leaky_relu or prelu.
    template <class T, int ACT>
    __device__ __forceinline__ void load_slope(float (&v)[kEight], int64_t col, int count) const {
        if constexpr (ACT == kPrelu) {
            if (e.slope_size != 1)
                return load_columns<T>(v, e.slope, e.slope_dtype, slope_aligned, col, count);
            float one[kEight];
            load_columns<T>(one, e.slope, e.slope_dtype, false, 0, 1);
#pragma unroll
            for (int j = 0; j < kEight; ++j)
                v[j] = one[0];
        } else {
#pragma unroll
            for (int j = 0; j < kEight; ++j)
                v[j] = e.alpha;
        }
    }

    __device__ __forceinline__ uint32_t mask_row(int64_t row) const {
        return uint32_t(uint64_t(row) + uint64_t(e.drop.row_offset));
    }
};

// v = act(v) * scale, for an activation of the family.
template <class T, int FAMILY>
__device__ __forceinline__ void
activate(float (&v)[kEight], const Columns& c, float scale, int64_t col, int count) {
    with_act<FAMILY>(c.e.act, [&](auto tag) {
        constexpr int kAct = decltype(tag)::value;
        float slope[kEight];
        c.template load_slope<T, kAct>(slope, col, count);
#pragma unroll
        for (int j = 0; j < kEight; ++j)
            v[j] = act_fwd<kAct>(v[j], slope[j]) * scale;
    });
}

// The scale of kept elements; 1 where nothing is dropped.
FUSEDMLP_HD float kept_scale(const DropoutParams& d) { return d.threshold ? d.scale : 1.0f; }

inline bool all_dropped(const EpilogueParams& e) { return (e.drop.threshold >> 32) != 0; }

// Calls f(T{}, Tag<VECTOR>, Tag<FAMILY>) for a kernel's template arguments.
template <class F>
int with_kernel(const EpilogueParams& e, bool vectors, F&& f) {
    return with_dtype(e.dtype, [&](auto element) {
        const auto with_family = [&](auto vector) {
            const Family family = family_of(e.act);
            if (family == kPlain)
                return f(element, vector, Tag<kPlain>{});
            if (family == kSloped)
                return f(element, vector, Tag<kSloped>{});
            return f(element, vector, Tag<kSmooth>{});
        };
        return vectors ? with_family(Tag<true>{}) : with_family(Tag<false>{});
    });
}

}  // namespace fusedmlp::cuda
