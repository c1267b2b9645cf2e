// The kernels for AVX-512 F, BW, DQ and VL.
#include "cpu/tile.h"
#include "cpu/vec/avx512.h"

#define FUSEDMLP_ISA avx512
#include "cpu/isa_impl.h"
