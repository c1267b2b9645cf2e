// The elementwise kernels, forward, for AVX2: fwd_impl.h with the vectors of vec_avx2.h.
#include "cpu/tile.h"
#include "cpu/vec_avx2.h"

#define FUSEDMLP_ISA avx2
#include "cpu/fwd_impl.h"
