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

// Products in bf16 of the best set that is not above the one that was named, or null where the
// processor or the set has none. bf16_isa: the name of that set, or "".
const GemmKernels* gemm_bf16();
const char* bf16_isa();

// baseline, avx2, avx512, avx512_bf16 or amx; null for what FUSEDMLP_CPU_ISA says. False where the
// processor lacks it or there is none of that name; the next lower one is then taken.
bool set_isa(const char* name);

}  // namespace fusedmlp::cpu
