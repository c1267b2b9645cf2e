// The work memory of training steps, and how a step is cut into blocks of rows.
#pragma once

#include <vector>

#include "cpu/step.h"

namespace fusedmlp::cpu {

constexpr int64_t kMaxBlocks = 64;

// Rows in a block of a step of so many rows. Sums go by blocks, so the sizes of this step decide
// and nothing else: neither threads nor the other steps of a call.
int64_t block_rows(const StepParams& p, int64_t rows);

struct Buffers {
    bool keeps_panels;           // of weights, beside the parameters; not for few rows
    int64_t x_ld;                //
    float* x;                    // (batch, K) inputs, x_ld apart
    std::vector<int64_t> ld;     // of the rows of y, h and dz of each layer
    std::vector<int64_t> room;   // for a row of y: those of layers that share memory have the same
    std::vector<float*> y;       // (batch, N)
    std::vector<float*> h;       // (batch, N) where z is saved, else null
    std::vector<float*> dz;      // (batch, N); y of the last layer where that is free
    std::vector<float*> dw;      // (N, K) where the norm of all must be known first, else null
    std::vector<float*> db;      // (N,)
    std::vector<float*> slope;   // (N,)
    std::vector<double*> db_of;  // (blocks, N) sums over the rows of a block
    std::vector<double*> slope_of;  // (blocks, slope_size)
    std::vector<float*> forward;    // panels of w^T, or null
    std::vector<float*> backward;   // panels of w, of all layers but the first, or null
    float* scratch;                 // of the matrix products
    int64_t floats;
};

// With a null base only `floats` and what needs no memory is filled in.
Buffers lay_out(const StepParams& p, float* base);
// Of an evaluation.
Buffers lay_out_forward(const StepParams& p, float* base);

}  // namespace fusedmlp::cpu
