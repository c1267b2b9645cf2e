// The work memory of training and evaluation.
#pragma once

#include <vector>

#include "cpu/step.h"

namespace fusedmlp::cpu {

struct StepBuffers : Buffers {
    float* gathered = nullptr;  // x, written by each step
    std::vector<StepParam> w;   // as they lie in a call: in panels where the layer keeps those
    std::vector<float*> dw;     // like w where the norm of all must be known first, else null
    std::vector<float*> db;     // (N,)
    std::vector<float*> slope;  // (slope_size,)
    int64_t floats = 0;
};

// With a null base only `floats` and what needs no memory is filled in.
StepBuffers lay_out(const StepParams& p, const std::vector<Layer>& layers, float* base);
// Of an evaluation.
StepBuffers lay_out_forward(const StepParams& p, const std::vector<Layer>& layers, float* base);

std::vector<Layer> layers_of(const StepParams& p, const int64_t* state);

}  // namespace fusedmlp::cpu
