// The elementwise kernels, backward, for any processor: bwd_impl.h with the vectors of
// vec_baseline.h.
#include "cpu/tile.h"
#include "cpu/vec_baseline.h"

#define FUSEDMLP_ISA baseline
#include "cpu/bwd_impl.h"
