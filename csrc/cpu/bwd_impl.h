// dz = keep ? dy * scale * act'(z) : 0 for one tile, and its column sums before it is rounded;
// included once for each instruction set.
#include "cpu/sweep.h"
#include "cpu/vec/act.h"

namespace fusedmlp::FUSEDMLP_ISA {

#define INLINE inline __attribute__((always_inline))

template <class T, int ACT, int SAVES, bool DROP>
struct Bwd {
    T* out;
    const T* in;
    const T* from;
    T* dz;
    const T* dy;
    const T* saved;
    const float* bias;
    const float* slope;
    float* db;      // sums of up to kSumRows rows, or null
    float* dslope;  // the same
    double* db_total;
    double* dslope_total;
    VF scale;
    int64_t width;
    int64_t summed = 0;

    INLINE explicit Bwd(const cpu::Tile& t)
        : out(static_cast<T*>(t.out)), in(static_cast<const T*>(t.in)),
          from(static_cast<const T*>(t.saved)), dz(out), dy(in), saved(from), bias(t.bias),
          slope(t.slope), db(t.db ? t.scratch : nullptr),
          dslope(t.dslope ? t.scratch + t.width + cpu::kPad : nullptr), db_total(t.db),
          dslope_total(t.dslope), scale(set1(t.scale)), width(t.width) {
        clear(db);
        clear(dslope);
    }

    INLINE void row(int64_t start) {
        dz = out + start;
        dy = in + start;
        saved = from + start;
    }
    // In fp32 for kSumRows rows, then in double: as exact as the terms, at the price of fp32.
    INLINE void done() {
        if (++summed == cpu::kSumRows)
            flush();
    }
    INLINE void flush() {
        flush(db, db_total);
        flush(dslope, dslope_total);
        summed = 0;
    }
    INLINE void flush(float* sums, double* total) {
        if (!sums)
            return;
        for (int64_t i = 0; i < width; i += VL)
            add_to_double(total + i, load(sums + i));
        clear(sums);
    }
    INLINE void clear(float* sums) {
        if (!sums)
            return;
        for (int64_t i = 0; i < width; i += VL)
            store(sums + i, set1(0.0f));
    }

    // s: the slope; ds: gradient of the slope
    INLINE VF value(VF g, VF v, VF b, VF s, VM keep, VF& ds) const {
        if constexpr (DROP)
            g = g * scale;
        if constexpr (SAVES == kSavesY) {
            // Divided: 1 / scale, rounded, would be off by as much in every term of a sum.
            if constexpr (DROP && ACT != kRelu && ACT != kLeakyRelu)
                v = v / scale;
            g = act_grad_y<ACT>(g, v, s);
        } else if constexpr (SAVES == kSavesZ) {
            const VF z = v + b;
            if constexpr (ACT == kPrelu) {
                ds = drop_if(gt(z, set1(0.0f)), g * z);
                if constexpr (DROP)
                    ds = keep_if(keep, ds);
            }
            g = act_grad_z<ACT>(g, z, s);
        }
        // With ReLU y = 0 where it was dropped.
        if constexpr (DROP && !(ACT == kRelu && SAVES == kSavesY))
            g = keep_if(keep, g);
        return g;
    }

    INLINE void add(int64_t i, VF g, VF ds) const {
        if (db)
            store(db + i, load(db + i) + g);
        if constexpr (ACT == kPrelu) {
            if (dslope)
                store(dslope + i, load(dslope + i) + ds);
        }
    }

    INLINE void full(int64_t i, VM keep) const {
        const VF zero = set1(0.0f);
        VF ds = zero;
        const VF v = SAVES == kSavesNothing ? zero : load(saved + i);
        const VF b = SAVES == kSavesZ ? load(bias + i) : zero;
        const VF s = act_has_slope(ACT) ? load(slope + i) : zero;
        const VF g = value(load(dy + i), v, b, s, keep, ds);
        add(i, g, ds);
        store(dz + i, g);
    }

    INLINE void part(int64_t i, int n, VM keep) const {
        T d[VL] = {}, v[VL] = {};
        float b[VL] = {}, s[VL] = {};
        const size_t bytes = size_t(n) * sizeof(T);
        __builtin_memcpy(d, dy + i, bytes);
        if constexpr (SAVES != kSavesNothing)
            __builtin_memcpy(v, saved + i, bytes);
        if constexpr (SAVES == kSavesZ)
            __builtin_memcpy(b, bias + i, size_t(n) * sizeof(float));
        if constexpr (act_has_slope(ACT))
            __builtin_memcpy(s, slope + i, size_t(n) * sizeof(float));
        VF ds = set1(0.0f);
        const VF g = value(load(d), load(v), load(b), load(s), keep, ds);
        // Past the end dy = 0, and so are g and ds, as the scale is finite.
        add(i, g, ds);
        store(d, g);
        __builtin_memcpy(dz + i, d, bytes);
    }
};

template <class T, int ACT, int SAVES, bool DROP>
static void bwd_tile(const cpu::Tile& t) {
    // ReLU's y holds the joint mask: nothing to draw.
    constexpr bool draws = DROP && !(ACT == kRelu && SAVES == kSavesY);
    Bwd<T, ACT, SAVES, DROP> op(t);
    sweep<draws, act_is_light(ACT)>(t, op);
    op.flush();
}

template <class T, int ACT, int SAVES>
static cpu::Kernel bwd_of(bool dropout) {
    constexpr bool exists = ACT == kNone       ? SAVES == kSavesNothing
                            : SAVES == kSavesY ? act_has_grad_y(ACT)
                                               : SAVES == kSavesZ;
    if constexpr (exists)
        return dropout ? &bwd_tile<T, ACT, SAVES, true> : &bwd_tile<T, ACT, SAVES, false>;
    else
        return nullptr;
}

template <class T, int ACT = 0>
static cpu::Kernel bwd_of(int act, int saves, bool dropout) {
    if constexpr (ACT == kActCount) {
        return nullptr;
    } else {
        if (act != ACT)
            return bwd_of<T, ACT + 1>(act, saves, dropout);
        return saves == kSavesNothing ? bwd_of<T, ACT, kSavesNothing>(dropout)
               : saves == kSavesY     ? bwd_of<T, ACT, kSavesY>(dropout)
                                      : bwd_of<T, ACT, kSavesZ>(dropout);
    }
}

cpu::Kernel bwd_kernel(int act, int saves, Dtype dtype, bool dropout) {
    switch (dtype) {
    case Dtype::kFloat32:
        return bwd_of<float>(act, saves, dropout);
    case Dtype::kFloat16:
        return bwd_of<Half>(act, saves, dropout);
    case Dtype::kBFloat16:
        return bwd_of<BFloat>(act, saves, dropout);
    }
    return nullptr;
}

#undef INLINE

}  // namespace fusedmlp::FUSEDMLP_ISA
