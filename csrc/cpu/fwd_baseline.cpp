// The elementwise kernels, forward, for any processor: fwd_impl.h with the vectors of
// vec_baseline.h.
#include "cpu/tile.h"
#include "cpu/vec_baseline.h"

#define FUSEDMLP_ISA baseline
#include "cpu/fwd_impl.h"
