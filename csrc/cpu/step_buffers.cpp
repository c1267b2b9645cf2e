// Hands out the memory that training works in, once for a call.
#include "cpu/step_buffers.h"

#include <algorithm>

namespace fusedmlp::cpu {
namespace {

void take_inputs(StepBuffers& b, const StepParams& p, int64_t rows, Arena& arena) {
    b.keeps_panels = goes_in_blocks(rows);
    b.x_ld = apart(p.layers[0].layer.k);
    b.x = b.gathered = arena.take(rows * b.x_ld);
    for (const StepLayer& l : p.layers)
        b.ld.push_back(&l != &p.layers.back() ? apart(l.layer.n()) : l.layer.n());
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
        b.room.push_back(b.ld[i]);
        b.y.push_back(arena.take(m * b.ld[i]));
        b.h.push_back(l.saves == kSavesZ ? arena.take(m * b.ld[i]) : nullptr);
        const bool is_free = i + 1 == layers.size() && l.saves != kSavesY;
        b.dz.push_back(is_free ? b.y.back() : arena.take(m * b.ld[i]));
        b.dw.push_back(p.max_norm > 0.0 ? arena.take(l.n() * l.k) : nullptr);
        b.db.push_back(arena.take(l.n()));
        b.slope.push_back(arena.take(l.e.slope_size));
    }
    take_sums(b, layers, arena, m);
    take_panels(b, layers, arena, Passes::kBoth, 1);
    b.floats = arena.used;
    return b;
}

StepBuffers lay_out_forward(const StepParams& p, const std::vector<Layer>& layers, float* base) {
    Arena arena{base};
    StepBuffers b{};
    const int64_t m = std::min(p.batch, p.rows);
    take_inputs(b, p, m, arena);
    const int64_t widest = *std::max_element(b.ld.begin(), b.ld.end());
    // Two activations of a row are alive at a time. Blocks of rows run through the layers each at
    // its own pace, so a row has the same room in all of them.
    float* const turns[2] = {arena.take(m * widest), arena.take(m * widest)};
    for (size_t i = 0; i < layers.size(); ++i) {
        b.room.push_back(widest);
        b.y.push_back(turns[i % 2]);
        b.h.push_back(nullptr);
    }
    take_panels(b, layers, arena, Passes::kForward, layers.size());
    b.floats = arena.used;
    return b;
}

}  // namespace fusedmlp::cpu
