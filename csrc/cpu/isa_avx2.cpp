// The kernels for AVX2, FMA and F16C.
#include "cpu/tile.h"
#include "cpu/vec/avx2.h"

#define FUSEDMLP_ISA avx2
#include "cpu/isa_impl.h"
