// Hands out the memory that training works in, once for a call.
#include "cpu/step_buffers.h"

#include <algorithm>

namespace fusedmlp::cpu {
namespace {

constexpr int64_t kInParts = 512;  // inputs for which the first product goes in two parts

void take_inputs(StepBuffers& b, const StepParams& p, int64_t rows, Arena& arena) {
    if (p.is_bf16)
        b.gemm = gemm_bf16();
    b.keeps_panels = goes_in_blocks(rows);
    b.x_ld = apart(p.layers[0].layer.k);
    b.x = b.gathered = arena.take(rows * b.x_ld);
    b.at.resize(p.layers.size());
    for (size_t i = 0; i < p.layers.size(); ++i) {
        const int64_t n = p.layers[i].layer.n();
        b.at[i].ld = i + 1 < p.layers.size() ? apart(n) : n;
    }
}

}  // namespace

std::vector<Layer> layers_of(const StepParams& p, const int64_t* state) {
    std::vector<Layer> layers;
    for (const StepLayer& l : p.layers) {
        layers.push_back(l.layer);
        layers.back().e.drop.state = state;
    }
    return layers;
}

StepBuffers lay_out(const StepParams& p, const std::vector<Layer>& layers, float* base) {
    Arena arena{base};
    StepBuffers b{};
    const int64_t m = std::min(p.batch, p.rows);
    take_inputs(b, p, m, arena);
    for (size_t i = 0; i < layers.size(); ++i) {
        const Layer& l = layers[i];
        LayerBuffers& at = b.at[i];
        const int64_t floats = m * at.ld;
        at.room = at.ld;
        at.y = arena.take(floats);
        at.h = l.saves == kSavesZ ? arena.take(floats) : nullptr;
        const bool is_free = i + 1 == layers.size() && l.saves != kSavesY;
        at.dz = is_free ? at.y : arena.take(floats);
        b.dw.push_back(p.max_norm > 0.0 ? arena.take(l.n() * l.k) : nullptr);
        b.db.push_back(arena.take(l.n()));
        b.slope.push_back(arena.take(l.e.slope_size));
    }
    take_sums(b, layers, arena, m);
    take_panels(b, layers, arena, Passes::kBoth, 1);
    for (size_t i = 0; i < layers.size(); ++i) {
        StepParam w = p.layers[i].w;
        if (b.keeps_panels && layers[i].n() % b.gemm->nr == 0) {
            w.value = b.gemm->values == 1 ? b.at[i].forward : arena.take(w.size);
            w.m1 = w.m1 ? arena.take(w.size) : nullptr;
            w.m2 = w.m2 ? arena.take(w.size) : nullptr;
            b.at[i].kept = w.value;
        }
        b.w.push_back(w);
    }
    const Layer& first = layers[0];
    if (b.keeps_panels && first.n() % b.gemm->nr == 0 && first.k >= kInParts)
        b.rest = arena.take(m * b.at[0].ld);
    b.floats = arena.used;
    return b;
}

StepBuffers lay_out_forward(const StepParams& p, const std::vector<Layer>& layers, float* base) {
    Arena arena{base};
    StepBuffers b{};
    const int64_t m = std::min(p.batch, p.rows);
    take_inputs(b, p, m, arena);
    int64_t widest = 0;
    for (const LayerBuffers& at : b.at)
        widest = std::max(widest, at.ld);
    // Two activations of a row are alive at a time. Blocks of rows run through the layers each at
    // its own pace, so a row has the same room in all of them.
    float* const turns[2] = {arena.take(m * widest), arena.take(m * widest)};
    for (size_t i = 0; i < layers.size(); ++i) {
        b.at[i].room = widest;
        b.at[i].y = turns[i % 2];
    }
    take_panels(b, layers, arena, Passes::kForward, layers.size());
    b.floats = arena.used;
    return b;
}

}  // namespace fusedmlp::cpu
