#include "cpu/tile.h"
#include "cpu/vec_avx512.h"

#define FUSEDMLP_ISA avx512
#include "cpu/fwd_impl.h"
