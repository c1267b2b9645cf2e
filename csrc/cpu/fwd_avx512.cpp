// The elementwise kernels, forward, for AVX-512: fwd_impl.h with the vectors of vec_avx512.h.
#include "cpu/tile.h"
#include "cpu/vec_avx512.h"

#define FUSEDMLP_ISA avx512
#include "cpu/fwd_impl.h"
