// Allocates the memory that a training step works in, once for a call.
#include "cpu/step_buffers.h"

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/plan.h"

namespace fusedmlp::cpu {
namespace {

constexpr int64_t kBlockWork = int64_t(1) << 20;  // products for which a block is worth its start
constexpr int64_t kFewRows = 32;  // for which a thread of its own costs a pass over all weights
// Floats from row to row at which all rows share one set of the L1 cache.
constexpr int64_t kAlias = 1024;

// Hands out the work memory; with a null base it only counts.
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

int64_t apart(int64_t n) { return n % kAlias == 0 ? n + 16 : n; }

void take_panels(Buffers& b, const StepParams& p, Arena& arena, bool trains) {
    for (size_t i = 0; i < p.layers.size(); ++i) {
        const StepLayer& l = p.layers[i];
        const bool keeps = b.keeps_panels;
        b.forward.push_back(keeps ? arena.take(gemm_scratch(l.n, l.k)) : nullptr);
        const bool returns = keeps && trains && i > 0;
        b.backward.push_back(returns ? arena.take(gemm_scratch(l.k, l.n)) : nullptr);
    }
}

}  // namespace

int64_t block_rows(const StepParams& p, int64_t rows) {
    if (rows < kFewRows)
        return kFewRows;
    int64_t work = 1;
    for (const StepLayer& l : p.layers)
        work += l.n * l.k;
    const int64_t least = std::max(ceil_div(rows, kMaxBlocks), kBlockWork / work);
    return round_up(std::clamp<int64_t>(least, 1, rows), 16);
}

Buffers lay_out(const StepParams& p, float* base) {
    Arena arena{base};
    Buffers b{};
    const int64_t m = std::min(p.batch, p.rows);
    b.keeps_panels = m >= kFewRows;
    const int64_t blocks = std::min(kMaxBlocks, ceil_div(m, 16));
    int64_t scratch = 0;
    for (const StepLayer& l : p.layers) {
        b.ld.push_back(&l != &p.layers.back() ? apart(l.n) : l.n);
        if (!b.keeps_panels)
            scratch = std::max({scratch, gemm_scratch(l.n, l.k), gemm_scratch(l.k, l.n)});
    }
    b.x_ld = apart(p.layers[0].k);
    b.x = arena.take(m * b.x_ld);
    for (size_t i = 0; i < p.layers.size(); ++i) {
        const StepLayer& l = p.layers[i];
        b.room.push_back(b.ld[i]);
        b.y.push_back(arena.take(m * b.room[i]));
        b.h.push_back(l.saves == kSavesZ ? arena.take(m * b.ld[i]) : nullptr);
        const bool is_free = &l == &p.layers.back() && l.saves != kSavesY;
        b.dz.push_back(is_free ? b.y.back() : arena.take(m * b.ld[i]));
        b.dw.push_back(p.max_norm > 0.0 ? arena.take(l.n * l.k) : nullptr);
        b.db.push_back(arena.take(l.n));
        b.slope.push_back(arena.take(l.n));
        const int64_t slopes = l.slope.value ? l.slope.size : 0;
        b.db_of.push_back(arena.take_doubles(l.b.value ? blocks * l.n : 0));
        b.slope_of.push_back(arena.take_doubles(blocks * slopes));
    }
    take_panels(b, p, arena, true);
    b.scratch = arena.take(scratch);
    b.floats = arena.used;
    return b;
}

Buffers lay_out_forward(const StepParams& p, float* base) {
    Arena arena{base};
    Buffers b{};
    const int64_t m = std::min(p.batch, p.rows);
    b.keeps_panels = m >= kFewRows;
    int64_t widest = 0, scratch = 0;
    for (const StepLayer& l : p.layers) {
        b.ld.push_back(&l != &p.layers.back() ? apart(l.n) : l.n);
        widest = std::max(widest, b.ld.back());
        if (!b.keeps_panels)
            scratch = std::max(scratch, gemm_scratch(l.n, l.k));
    }
    b.x_ld = apart(p.layers[0].k);
    b.x = arena.take(m * b.x_ld);
    // Two activations of a row are alive at a time. Blocks of rows run through the layers each at
    // its own pace, so a row has the same room in all of them.
    float* const turns[2] = {arena.take(m * widest), arena.take(m * widest)};
    for (size_t i = 0; i < p.layers.size(); ++i) {
        b.room.push_back(widest);
        b.y.push_back(turns[i % 2]);
        b.h.push_back(nullptr);
    }
    take_panels(b, p, arena, false);
    b.scratch = arena.take(scratch);
    b.floats = arena.used;
    return b;
}

}  // namespace fusedmlp::cpu
