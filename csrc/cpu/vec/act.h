// Activations and their derivatives on vectors: the twin of common/activations.h.
#pragma once

#include <cfloat>

#include "cpu/vec/math.h"

namespace fusedmlp::FUSEDMLP_ISA {

#define FN static inline __attribute__((always_inline))

// False for the activations that take longer than the draw of a mask.
constexpr bool act_is_light(int act) {
    return act == kNone || act == kRelu || act == kLeakyRelu || act == kPrelu ||
           act == kReluSquared;
}
constexpr bool act_has_slope(int act) { return act == kLeakyRelu || act == kPrelu; }

// v in [0, top]; NaN stays.
FN VF clamp(VF v, float top) { return max(set1(0.0f), min(set1(top), v)); }

FN VF gelu_tanh_arg(VF z, VF zz) {
    const VF beta2 = set1(2.0f * kGeluTanhBeta);
    return beta2 * fma(z * zz, set1(kGeluTanhKappa), z);
}

// act(z)
template <int ACT>
FN VF act_fwd(VF z, VF slope) {
    static_assert(ACT >= 0 && ACT < kActCount, "unknown activation id");
    const VF zero = set1(0.0f), one = set1(1.0f);
    if constexpr (ACT == kNone) {
        return z;
    } else if constexpr (ACT == kRelu) {
        return max(zero, z);
    } else if constexpr (ACT == kLeakyRelu || ACT == kPrelu) {
        return select(gt(z, zero), z, z * slope);
    } else if constexpr (ACT == kElu) {
        return select(gt(z, zero), z, copysign(expm1_of_negative(min(zero, z)), z));
    } else if constexpr (ACT == kSigmoid) {
        return sigmoid(z);
    } else if constexpr (ACT == kTanh) {
        return tanh(z);
    } else if constexpr (ACT == kSoftplus) {
        return softplus(z);
    } else if constexpr (ACT == kGelu) {
        VF bell;
        return z * normal_cdf(z, bell);
    } else if constexpr (ACT == kGeluTanh) {
        return z / (one + exp(negate(gelu_tanh_arg(z, z * z))));
    } else if constexpr (ACT == kSilu) {
        return z / (one + exp(negate(z)));
    } else {  // relu_squared
        const VF r = max(zero, z);
        return r * r;
    }
}

// g act'(z), from z. Where it is exactly 0, that is chosen and not multiplied, as in PyTorch.
template <int ACT>
FN VF act_grad_z(VF g, VF z, VF slope) {
    static_assert(ACT > kNone && ACT < kActCount, "unknown activation id");
    const VF zero = set1(0.0f), one = set1(1.0f);
    if constexpr (ACT == kRelu) {
        return drop_if(le(z, zero), g);
    } else if constexpr (ACT == kLeakyRelu || ACT == kPrelu) {
        return select(gt(z, zero), g, g * slope);
    } else if constexpr (ACT == kElu) {
        return select(gt(z, zero), g, g * exp(min(zero, z)));
    } else if constexpr (ACT == kSigmoid) {
        // s (1 - s) = e / (1 + e)^2 with e = exp(-|z|): no digits are lost where s is near 1.
        const VF e = exp(negate(abs(z))), r = one / (one + e);
        return g * (e * r * r);
    } else if constexpr (ACT == kTanh) {
        // 1 - t^2 = 4 e / (1 + e)^2 with e = exp(-2 |z|) loses no digits where t is near 1, and
        // 1 - t^2 itself, with t = (1 - e) / (1 + e), none where t is small.
        const VF e = exp(set1(-2.0f) * abs(z)), r = one / (one + e), t = (one - e) * r;
        const VF large = set1(4.0f) * e * r * r, small = fma(negate(t), t, one);
        return g * select(gt(t, set1(0.5f)), large, small);
    } else if constexpr (ACT == kSoftplus) {
        return g * sigmoid(z);
    } else if constexpr (ACT == kGelu) {
        VF bell;
        const VF cdf = normal_cdf(z, bell);
        return g * fma(z, bell * set1(kInvSqrt2Pi), cdf);
    } else if constexpr (ACT == kGeluTanh) {
        // With e = exp(-|u|) and r = 1 / (1 + e), s (1 - s) = e r^2 loses no digits where s is
        // near 1.
        const VF zz = z * z, u = gelu_tanh_arg(z, zz);
        const VF e = exp(negate(abs(u))), r = one / (one + e), er = e * r;
        const VF s = select(gt(u, zero), r, er);
        const VF du =
            fma(zz, set1(6.0f * kGeluTanhBeta * kGeluTanhKappa), set1(2.0f * kGeluTanhBeta));
        return g * fma(z * (er * r), du, s);
    } else if constexpr (ACT == kSilu) {
        const VF e = exp(negate(abs(z))), r = one / (one + e), er = e * r;
        const VM positive = gt(z, zero);
        return g * select(positive, r, er) * fma(z, select(positive, er, r), one);
    } else {  // relu_squared
        return drop_if(le(z, zero), g * (z + z));
    }
}

// g act'(z), from y = act(z).
template <int ACT>
FN VF act_grad_y(VF g, VF y, VF slope) {
    static_assert(act_has_grad_y(ACT), "this derivative cannot be read off the output");
    const VF zero = set1(0.0f), one = set1(1.0f);
    if constexpr (ACT == kRelu) {
        return drop_if(le(y, zero), g);
    } else if constexpr (ACT == kLeakyRelu) {
        return select(gt(y, zero), g, g * slope);
    } else if constexpr (ACT == kElu) {
        return select(gt(y, zero), g, g * clamp(y + one, 1.0f));
    } else if constexpr (ACT == kSigmoid) {
        return g * clamp(y * (one - y), 0.25f);
    } else if constexpr (ACT == kTanh) {
        return g * clamp((one - y) * (one + y), 1.0f);
    } else if constexpr (ACT == kSoftplus) {
        return g * negate(expm1_of_negative(negate(max(zero, y))));
    } else {  // relu_squared
        // Of an infinite y, which may be a large z squared, g = 0 stays 0, as in PyTorch.
        const VF r = sqrt(y), finite = min(set1(FLT_MAX), r);
        return drop_if(le(y, zero), g * set1(2.0f) * select(le(abs(g), zero), finite, r));
    }
}

#undef FN

}  // namespace fusedmlp::FUSEDMLP_ISA
