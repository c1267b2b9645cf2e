// Forward and backward passes of a network over the rows of a batch: of the op mlp, of training and
// of evaluation. Plain pointers, no torch.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace fusedmlp::cpu {

constexpr int64_t kMaxBlocks = 64;  // of the rows of a batch

// y = drop(act(x w^T + b)). The rows of e are those of the batch.
struct Layer {
    const float* w;    // (N, K)
    int64_t k;         //
    int saves;         // a Saves
    EpilogueParams e;  // with N

    int64_t n() const { return e.cols; }
};

// Hands out work memory; with a null base it only counts.
struct Arena {
    float* base;
    int64_t used = 0;
    float* take(int64_t floats) {
        float* at = base ? base + used : nullptr;
        used += round_up(floats, 16) + kGemmPad;
        return at;
    }
    double* take_doubles(int64_t n) { return reinterpret_cast<double*>(take(2 * n)); }
};

// Where the passes find and leave what belongs to a layer; what is not wanted is null.
struct LayerBuffers {
    int64_t ld;       // floats from row to row of y, h and dz
    int64_t room;     // floats of a row of y: the same for layers that share memory
    float* y;         // (M, N)
    float* h;         // (M, N) x w^T where z is saved
    float* dz;        // (M, N)
    double* db;       // (blocks, N) sums over the rows of a block
    double* dslope;   // (blocks, slope_size)
    float* forward;   // panels of w^T
    float* kept;      // panels of w^T in fp32 that stand for w, which is out of date, or null
    float* backward;  // panels of w, where an input gradient is wanted
};

struct Buffers {
    std::vector<LayerBuffers> at;  // of each layer
    bool keeps_panels = false;     // of the weights, beside them; not for few rows
    const float* x = nullptr;      // (M, K) inputs
    int64_t x_ld = 0;
    const float* dy = nullptr;  // (M, N) of the last layer; null where it lies in dz
    float* dx = nullptr;        // (M, K) of the first layer that goes backward, or null
    float* scratch = nullptr;   // of the matrix products
    float* rest = nullptr;      // (M, N) second part of the first product, or null
    const GemmKernels* gemm = &isa().gemm;
};

// Rows between two that lie in different sets of the L1 cache.
int64_t apart(int64_t n);

// Whether a batch of so many rows goes through in blocks of rows, a thread each, with the weights
// in panels; fewer rows go through whole, each product on all threads.
bool goes_in_blocks(int64_t rows);

// Takes the panels of the passes, or scratch memory for products without them. first_dx: the first
// layer whose input gradient is wanted, or the number of layers.
enum class Passes { kForward, kBackward, kBoth };
void take_panels(
    Buffers& b,
    const std::vector<Layer>& layers,
    Arena& arena,
    Passes passes,
    size_t first_dx
);

// Takes the sums of the layers that have biases and slopes, for a batch of so many rows.
void take_sums(Buffers& b, const std::vector<Layer>& layers, Arena& arena, int64_t rows);

// sums: (blocks, n), added up into the first row and rounded to out.
void add_blocks(float* out, double* sums, int64_t n, int64_t blocks);

struct Rows {
    int64_t begin;
    int64_t end;
};

class Network {
  public:
    Network(const std::vector<Layer>& layers, const Buffers& buffers, ParallelFor parallel)
        : layers_(layers), b_(buffers), parallel_(parallel) {}

    // The panels of all weights, or of rows [n0, n1) and columns [k0, k1) of one, that are not
    // kept.
    void pack();
    void pack(size_t i, int64_t n0, int64_t n1, int64_t k0, int64_t k1);

    // Starts a batch. Sums go by blocks, so its size decides how it is cut and nothing else does:
    // neither threads nor other batches.
    void set_batch(int64_t rows);
    int64_t blocks() const { return ceil_div(rows_, block_); }

    // The first product may go in two parts of its inputs: a thread then has the same half of the
    // inputs and of the weights in its cache from step to step, and only sums move between threads.
    // body(rows, k0, k1) leaves these inputs in x.
    bool is_in_parts() const { return b_.rest && goes_in_blocks(rows_); }
    template <class Body>
    void each_part(const Body& body) {
        const int64_t k = layers_[0].k, middle = middle_of(k), count = blocks();
        failed |= run(parallel_, 2 * count, piece_, [&](int64_t begin, int64_t end) {
            while (begin < end) {
                const int64_t first = begin / count * count, stop = std::min(end, first + count);
                const Rows r{(begin - first) * block_, std::min(rows_, (stop - first) * block_)};
                const int64_t k0 = first ? middle : 0, k1 = first ? k : middle;
                body(r, k0, k1);
                multiply_part(r, k0, k1);
                begin = stop;
            }
        });
    }

    // body(rows, parallel) for all rows of the batch: whole blocks of them, on a thread each.
    template <class Body>
    void each_block(const Body& body) {
        const int64_t block = block_;
        if (!b_.keeps_panels) {
            body(Rows{0, rows_}, parallel_);
            return;
        }
        failed |= run(parallel_, blocks(), piece_, [&](int64_t begin, int64_t end) {
            body(Rows{begin * block, std::min(rows_, end * block)}, alone);
        });
    }

    // body(rows, number of the block)
    template <class Body>
    void blocks_in(Rows r, const Body& body) const {
        for (int64_t begin = r.begin; begin < r.end; begin += block_)
            body(Rows{begin, std::min(r.end, begin + block_)}, begin / block_);
    }

    void forward(Rows r, ParallelFor parallel);
    // From dy, or dz of the last layer, down to dz of layer `first`, and dx.
    void backward(Rows r, ParallelFor parallel, size_t first = 0);

    // Row 0 of y, were the rows before r as far apart as those of r: r has the memory of its own
    // rows alone, whatever other layers keep in the same buffer.
    float* y(size_t i, Rows r) const {
        const LayerBuffers& b = b_.at[i];
        return b.y + r.begin * (b.room - b.ld);
    }
    const float* input(size_t i, Rows r) const { return i == 0 ? b_.x : y(i - 1, r); }
    int64_t input_ld(size_t i) const { return i == 0 ? b_.x_ld : b_.at[i - 1].ld; }
    // The gradient of w over all rows, to c: dz^T x, or x^T dz where the panels of w^T are kept.
    Gemm weight_gradient(size_t i, float* c) const;

    std::atomic<int> failed{0};

  private:
    // Where blocks of the gradient end as well.
    static int64_t middle_of(int64_t k) { return ceil_div(k, 32) / 2 * 32; }
    void multiply_part(Rows r, int64_t k0, int64_t k1);
    void repack(size_t i, int64_t n0, int64_t n1, int64_t k0, int64_t k1);
    EpilogueParams epilogue(const Layer& l, Rows r) const;

    const std::vector<Layer>& layers_;
    const Buffers& b_;
    ParallelFor parallel_;
    int64_t rows_ = 0;
    int64_t block_ = 1;  // rows of it
    int64_t piece_ = 1;  // blocks that a thread takes at least
};

}  // namespace fusedmlp::cpu
