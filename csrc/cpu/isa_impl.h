// All kernels of one instruction set; included by isa_*.cpp, each after its vectors of cpu/vec/.
#include "cpu/isa.h"

#include "cpu/bwd_impl.h"
#include "cpu/fwd_impl.h"
#include "cpu/gemm_impl.h"
#include "cpu/step_impl.h"

#define FUSEDMLP_NAME_OF(isa) #isa
#define FUSEDMLP_NAME(isa) FUSEDMLP_NAME_OF(isa)

namespace fusedmlp::FUSEDMLP_ISA {

extern const cpu::Isa table;
const cpu::Isa table = {
    FUSEDMLP_NAME(FUSEDMLP_ISA),
    {fwd_kernel, bwd_kernel},
    kGemmKernels,
    kStepKernels,
};

}  // namespace fusedmlp::FUSEDMLP_ISA
