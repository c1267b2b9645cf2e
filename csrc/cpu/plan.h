// How a matrix is cut into tiles, and the fp32 rows that kernels read beside it. Depends on sizes
// only, never on the number of threads, so that sums come out the same for any of them.
#pragma once

#include <cstddef>
#include <memory>

#include "cpu/tile.h"

namespace fusedmlp::cpu {

// Memory of this thread that is kept between calls; one array a slot.
enum Slot { kBiasSlot, kSlopeSlot, kFoldSlot, kSumSlot, kBlockSlot, kSlots };
void* scratch(Slot slot, size_t bytes);

struct Plan {
    int64_t size;       // M N
    int64_t rows;       // of the flat matrix
    int64_t cols;       //
    int64_t fold;       // true rows in a flat row
    int64_t width;      // columns of a tile
    int64_t col_tiles;  //
    int64_t tile_rows;  //
    int64_t row_tiles;  //
    bool folded;        // narrow: masks are drawn for a whole flat row

    int64_t tiles() const { return row_tiles * col_tiles; }
};

// sums: rows of a tile are a multiple of kSumRows and tiles are few.
Plan make_plan(const EpilogueParams& e, bool sums);

// Fills the parts of a tile that are the same for all tiles of a call.
struct Inputs {
    Inputs(const EpilogueParams& e, const Plan& plan);
    void apply(Tile& tile) const;

    Philox philox;
    Fold fold;
    const float* bias;
    const float* slope;
    bool bias_moves;   // with the column of the tile
    bool slope_moves;  //
    bool folded;
};

// launch_bias_act_dropout_* for fp32 rows that lie ld apart; ld is N where N is under 256. Backward
// leaves its column sums in double: db (N,) and dslope (slope_size,), each where it is not null;
// what the parameters say of them is not read.
int forward_rows(const BiasActDropoutFwdParams& p, int64_t ld, ParallelFor parallel);
int backward_rows(
    const BiasActDropoutBwdParams& p,
    int64_t ld,
    double* db,
    double* dslope,
    ParallelFor parallel
);

// n values of `dtype` to fp32, and back.
void to_float(float* out, const void* in, Dtype dtype, int64_t n);
void from_float(void* out, const float* in, Dtype dtype, int64_t n);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace fusedmlp::cpu
