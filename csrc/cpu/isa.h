// The kernels of each instruction set, and the set in use.
#pragma once

#include "cpu/gemm.h"
#include "cpu/step_kernels.h"
#include "cpu/tile.h"

namespace fusedmlp::cpu {

struct Isa {
    const char* name;
    ElementwiseKernels elementwise;
    GemmKernels gemm;
    StepKernels step;
};

// The best set of this processor, or the one that FUSEDMLP_CPU_ISA or set_isa() names.
const Isa& isa();

// False where the processor lacks it or there is none of that name; the next lower one is then
// taken.
bool set_isa(const char* name);

}  // namespace fusedmlp::cpu
