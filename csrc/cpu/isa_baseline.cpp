// The kernels for any processor.
#include "cpu/tile.h"
#include "cpu/vec/baseline.h"

#define FUSEDMLP_ISA baseline
#include "cpu/isa_impl.h"
