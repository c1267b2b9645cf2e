// The elementwise kernels, backward, for AVX-512: bwd_impl.h with the vectors of vec_avx512.h.
#include "cpu/tile.h"
#include "cpu/vec_avx512.h"

#define FUSEDMLP_ISA avx512
#include "cpu/bwd_impl.h"
