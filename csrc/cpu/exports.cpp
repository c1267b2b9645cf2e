// What Python reads through ctypes: the ids of the activations, the choice of the instruction set,
// and the scalar functions of common/, which GPUs run and tests compare with PyTorch here.
#include <cstring>
#include <string>

#include "common/philox.h"
#include "cpu/isa.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fusedmlp {
namespace {

enum What : int { kForward = 0, kGradZ = 1, kGradY = 2 };

template <int ACT = 0>
bool scalar_act(int act, int what, const float* in, float slope, float* out, int64_t n) {
    if constexpr (ACT == kActCount) {
        return false;
    } else {
        if (act != ACT)
            return scalar_act<ACT + 1>(act, what, in, slope, out, n);
        for (int64_t i = 0; i < n; ++i) {
            if (what == kForward) {
                out[i] = act_fwd<ACT>(in[i], slope);
            } else if (what == kGradZ) {
                out[i] = act_grad_z<ACT>(in[i], slope);
            } else {
                if constexpr (act_has_grad_y(ACT))
                    out[i] = act_grad_y<ACT>(in[i], slope);
                else
                    return false;
            }
        }
        return true;
    }
}

}  // namespace
}  // namespace fusedmlp

// "none=0 relu=1 ..."
EXPORT const char* fusedmlp_activations() {
    static const std::string table = [] {
        std::string text;
        for (int i = 0; i < fusedmlp::kActCount; ++i)
            text.append(i ? " " : "")
                .append(fusedmlp::kActNames[i])
                .append("=")
                .append(std::to_string(i));
        return text;
    }();
    return table.c_str();
}

// The instruction set in use, and that of the products in bf16, "" where there are none.
EXPORT const char* fusedmlp_cpu_isa() { return fusedmlp::cpu::isa().name; }

EXPORT const char* fusedmlp_bf16_isa() { return fusedmlp::cpu::bf16_isa(); }

// 1 if the processor has it; otherwise the next lower one is taken. Null: as at the start.
EXPORT int fusedmlp_set_cpu_isa(const char* name) { return fusedmlp::cpu::set_isa(name); }

// act(z), act'(z) from z, or from y, for n values; 0 where there is no such function.
EXPORT int
fusedmlp_scalar_act(int act, int what, const float* in, float slope, float* out, int64_t n) {
    return fusedmlp::scalar_act(act, what, in, slope, out, n);
}

// The windows of columns [0, n) of one row.
EXPORT void
fusedmlp_scalar_windows(int64_t seed, int64_t stream, uint32_t row, uint32_t* out, int64_t n) {
    for (int64_t c = 0; c < n; ++c) {
        const auto words = fusedmlp::philox_group(
            uint64_t(seed), uint64_t(stream), row, uint32_t(c / fusedmlp::kPhiloxColumns)
        );
        out[c] = fusedmlp::philox_window(words, int(c % fusedmlp::kPhiloxColumns));
    }
}
