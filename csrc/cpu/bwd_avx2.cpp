#include "cpu/tile.h"
#include "cpu/vec_avx2.h"

#define FUSEDMLP_ISA avx2
#include "cpu/bwd_impl.h"
