// The elementwise kernels, backward, for AVX2: bwd_impl.h with the vectors of vec_avx2.h.
#include "cpu/tile.h"
#include "cpu/vec_avx2.h"

#define FUSEDMLP_ISA avx2
#include "cpu/bwd_impl.h"
