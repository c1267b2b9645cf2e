// Every activation and its derivative, one element at a time, in fp32. Host and device, no torch.
// Same ids and order as fusedmlp/spec/activations.py; loading the extension compares the two.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/philox.h"  // FUSEDMLP_HD

namespace fusedmlp {

enum Act : int {
    kNone = 0,
    kRelu = 1,
    kLeakyRelu = 2,
    kPrelu = 3,
    kElu = 4,
    kSigmoid = 5,
    kTanh = 6,
    kSoftplus = 7,
    kGelu = 8,
    kGeluTanh = 9,
    kSilu = 10,
    kReluSquared = 11,
    kActCount = 12,
};

// What backward reads besides dy.
enum Saves : int { kSavesNothing = 0, kSavesY = 1, kSavesZ = 2 };

constexpr const char* kActNames[kActCount] = {
    "none", "relu",     "leaky_relu", "prelu",     "elu",  "sigmoid",
    "tanh", "softplus", "gelu",       "gelu_tanh", "silu", "relu_squared",
};

// True where y = act(z) determines act'(z).
FUSEDMLP_HD constexpr bool act_has_grad_y(int act) {
    return act == kRelu || act == kLeakyRelu || act == kElu || act == kSigmoid || act == kTanh ||
           act == kSoftplus || act == kReluSquared;
}

// activations.saves: which tensor backward needs.
constexpr Saves act_saves(int act, double alpha, bool drops, bool is_fp16) {
    if (act == kNone)
        return kSavesNothing;
    const bool reads_y = act == kLeakyRelu                 ? alpha >= 0.0
                         : act == kReluSquared             ? !is_fp16
                         : act == kSigmoid || act == kTanh ? !drops
                                                           : act_has_grad_y(act);
    return reads_y ? kSavesY : kSavesZ;
}

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInvSqrt2Pi = 0.39894228040143268f;
constexpr float kGeluTanhBeta = 0.79788456080286536f;  // sqrt(2 / pi)
constexpr float kGeluTanhKappa = 0.044715f;

FUSEDMLP_HD float scalar_sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

// 2 beta (z + kappa z^3), so that 1 + tanh(u / 2) = 2 sigmoid(u).
FUSEDMLP_HD float gelu_tanh_arg(float z) {
    return 2.0f * kGeluTanhBeta * (z + kGeluTanhKappa * z * z * z);
}

FUSEDMLP_HD float gelu_cdf(float z) { return 0.5f * erfcf(-z * kSqrtHalf); }

// act(z). slope: of leaky_relu and prelu, ignored by the others.
template <int ACT>
FUSEDMLP_HD float act_fwd(float z, float slope) {
    static_assert(ACT >= 0 && ACT < kActCount, "unknown activation id");
    if constexpr (ACT == kNone)
        return z;
    else if constexpr (ACT == kRelu)
        return z < 0.0f ? 0.0f : z;  // this way round NaN and -0 stay
    else if constexpr (ACT == kLeakyRelu || ACT == kPrelu)
        return z > 0.0f ? z : z * slope;
    else if constexpr (ACT == kElu)
        return z > 0.0f ? z : expm1f(z);
    else if constexpr (ACT == kSigmoid)
        return scalar_sigmoid(z);
    else if constexpr (ACT == kTanh)
        return tanhf(z);
    else if constexpr (ACT == kSoftplus)
        return z > 20.0f ? z : log1pf(expf(z));
    else if constexpr (ACT == kGelu)
        return z * gelu_cdf(z);
    else if constexpr (ACT == kGeluTanh)
        return z * scalar_sigmoid(gelu_tanh_arg(z));
    else if constexpr (ACT == kSilu)
        return z / (1.0f + expf(-z));
    else  // relu_squared
        return z < 0.0f ? 0.0f : z * z;
}

// act'(z), from z.
template <int ACT>
FUSEDMLP_HD float act_grad_z(float z, float slope) {
    static_assert(ACT >= 0 && ACT < kActCount, "unknown activation id");
    if constexpr (ACT == kNone) {
        return 1.0f;
    } else if constexpr (ACT == kRelu) {
        return z <= 0.0f ? 0.0f : 1.0f;
    } else if constexpr (ACT == kLeakyRelu || ACT == kPrelu) {
        return z > 0.0f ? 1.0f : slope;
    } else if constexpr (ACT == kElu) {
        return z > 0.0f ? 1.0f : expf(z);
    } else if constexpr (ACT == kSigmoid) {
        return scalar_sigmoid(z) * scalar_sigmoid(-z);
    } else if constexpr (ACT == kTanh) {
        const float t = tanhf(z);
        return (1.0f - t) * (1.0f + t);
    } else if constexpr (ACT == kSoftplus) {
        return scalar_sigmoid(z);
    } else if constexpr (ACT == kGelu) {
        return gelu_cdf(z) + z * (kInvSqrt2Pi * expf(-0.5f * z * z));
    } else if constexpr (ACT == kGeluTanh) {
        // sigmoid(-u), not 1 - s: the difference alone takes twice the error of PyTorch.
        const float u = gelu_tanh_arg(z), s = scalar_sigmoid(u);
        const float du = 2.0f * kGeluTanhBeta * (1.0f + 3.0f * kGeluTanhKappa * z * z);
        return s + z * s * scalar_sigmoid(-u) * du;
    } else if constexpr (ACT == kSilu) {
        const float s = scalar_sigmoid(z);
        return s * (1.0f + z * (1.0f - s));
    } else {  // relu_squared
        return z <= 0.0f ? 0.0f : 2.0f * z;
    }
}

// The value clamped to [0, top]; NaN stays.
FUSEDMLP_HD float clamp_to(float v, float top) { return v < 0.0f ? 0.0f : v > top ? top : v; }

// act'(z), from y = act(z). Rounding of y must not take it out of its range.
template <int ACT>
FUSEDMLP_HD float act_grad_y(float y, float slope) {
    static_assert(act_has_grad_y(ACT), "this derivative cannot be read off the output");
    if constexpr (ACT == kRelu)
        return y <= 0.0f ? 0.0f : 1.0f;
    else if constexpr (ACT == kLeakyRelu)
        return y > 0.0f ? 1.0f : slope;
    else if constexpr (ACT == kElu)
        return y > 0.0f ? 1.0f : clamp_to(y + 1.0f, 1.0f);
    else if constexpr (ACT == kSigmoid)
        return clamp_to(y * (1.0f - y), 0.25f);
    else if constexpr (ACT == kTanh)
        return clamp_to((1.0f - y) * (1.0f + y), 1.0f);
    else if constexpr (ACT == kSoftplus)
        return clamp_to(-expm1f(-y), 1.0f);
    else  // relu_squared
        return y <= 0.0f ? 0.0f : 2.0f * sqrtf(y);
}

}  // namespace fusedmlp
