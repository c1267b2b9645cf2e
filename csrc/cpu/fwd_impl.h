// y = drop(act(x + bias)) for one tile; included once for each instruction set.
#include "cpu/sweep.h"
#include "cpu/vec/act.h"

namespace fusedmlp::FUSEDMLP_ISA {

#define INLINE inline __attribute__((always_inline))

template <class T, int ACT, bool DROP>
struct Fwd {
    T* out;
    const T* in;
    T* y;
    const T* x;
    const float* bias;
    const float* slope;
    VF scale;

    INLINE explicit Fwd(const cpu::Tile& t)
        : out(static_cast<T*>(t.out)), in(static_cast<const T*>(t.in)), y(out), x(in), bias(t.bias),
          slope(t.slope), scale(set1(t.scale)) {}

    INLINE void row(int64_t start) {
        y = out + start;
        x = in + start;
    }
    INLINE void done() {}

    INLINE VF value(VF z, const float* s, VM keep) const {
        const VF v = act_fwd<ACT>(z, act_has_slope(ACT) ? load(s) : scale);
        if constexpr (DROP)
            return product_if(keep, v, scale);
        else
            return v;
    }

    INLINE void full(int64_t i, VM keep) const {
        const VF v = value(load(x + i) + load(bias + i), slope + i, keep);
        store(y + i, v);
    }

    INLINE void part(int64_t i, int n, VM keep) const {
        T copy[VL] = {};
        float b[VL] = {}, s[VL] = {};
        __builtin_memcpy(copy, x + i, size_t(n) * sizeof(T));
        __builtin_memcpy(b, bias + i, size_t(n) * sizeof(float));
        if constexpr (act_has_slope(ACT))
            __builtin_memcpy(s, slope + i, size_t(n) * sizeof(float));
        store(copy, value(load(copy) + load(b), s, keep));
        __builtin_memcpy(y + i, copy, size_t(n) * sizeof(T));
    }
};

template <class T, int ACT, bool DROP>
static void fwd_tile(const cpu::Tile& t) {
    Fwd<T, ACT, DROP> op(t);
    sweep<DROP, act_is_light(ACT)>(t, op);
}

template <class T, int ACT>
static cpu::Kernel fwd_of(bool dropout) {
    return dropout ? &fwd_tile<T, ACT, true> : &fwd_tile<T, ACT, false>;
}

template <class T, int ACT = 0>
static cpu::Kernel fwd_of(int act, bool dropout) {
    if constexpr (ACT == kActCount)
        return nullptr;
    else
        return act == ACT ? fwd_of<T, ACT>(dropout) : fwd_of<T, ACT + 1>(act, dropout);
}

cpu::Kernel fwd_kernel(int act, Dtype dtype, bool dropout) {
    switch (dtype) {
    case Dtype::kFloat32:
        return fwd_of<float>(act, dropout);
    case Dtype::kFloat16:
        return fwd_of<Half>(act, dropout);
    case Dtype::kBFloat16:
        return fwd_of<BFloat>(act, dropout);
    }
    return nullptr;
}

#undef INLINE

}  // namespace fusedmlp::FUSEDMLP_ISA
