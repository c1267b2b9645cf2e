#include "cpu/tile.h"
#include "cpu/vec_baseline.h"

#define FUSEDMLP_ISA baseline
#include "cpu/bwd_impl.h"
