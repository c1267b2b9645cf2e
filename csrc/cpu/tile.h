// What one call of an elementwise kernel works on.
#pragma once

#include "common/params.h"

namespace fusedmlp {

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

namespace cpu {

constexpr int64_t kMaxWidth = 2048;   // columns of a tile; its scratch rows stay in the L1 cache
constexpr int64_t kFlatWidth = 1024;  // of a flat row of a folded matrix, at most
constexpr int64_t kPad = 64;      // elements that kernels may touch past the end of scratch rows
constexpr int64_t kSumRows = 16;  // rows summed in fp32 before they go to double

// Narrow matrices are treated as flat rows of `fold` true rows each. Group q of such a row is
// 8 windows of true row `row[q]` and group `group[q]` of it, and goes to flat column `offset[q]`.
struct Fold {
    int64_t fold;    // true rows in a flat row
    int64_t groups;  // Philox calls in a flat row
    const uint32_t* row;
    const uint32_t* group;
    const uint32_t* offset;
};

// Key and stream, expanded once a call.
struct Philox {
    uint32_t k0[kPhiloxRounds];
    uint32_t k1[kPhiloxRounds];
    uint64_t stream;
    uint64_t row_offset;
    uint32_t threshold;  // in [1, 2^32)
};

// Rows [row0, row1) and columns [col0, col0 + width) of a matrix with `cols` columns; a flat
// matrix has `size` elements, which may end within its last row.
struct Tile {
    void* out;           // y or dz
    const void* in;      // x or dy
    const void* saved;   // y or z
    const float* bias;   // `width` values, never null: adding -0 changes nothing
    const float* slope;  // `width` values, or null
    double* db;          // `width` sums, or null
    double* dslope;      // `width` sums, or null
    float* scratch;      // 2 (width + kPad) floats when db or dslope is there
    const Philox* philox;
    const Fold* fold;  // null for a wide matrix
    float scale;
    int64_t size;
    int64_t cols;
    int64_t row0;
    int64_t row1;
    int64_t col0;
    int64_t width;
};

using Kernel = void (*)(const Tile& tile);

// What an instruction set offers; null where there is no such kernel. dropout: 0 or 1.
struct ElementwiseKernels {
    Kernel (*fwd)(int act, Dtype dtype, bool dropout);
    Kernel (*bwd)(int act, int saves, Dtype dtype, bool dropout);
};

}  // namespace cpu
}  // namespace fusedmlp
