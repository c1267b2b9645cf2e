// The passes of network.h on the tensors of the op mlp.
#include "cpu/mlp.h"

#include <algorithm>

namespace fusedmlp::cpu {
namespace {

Buffers tensors_of(const MlpParams& p) {
    Buffers b{};
    b.keeps_panels = goes_in_blocks(p.rows);
    b.x = p.x;
    b.x_ld = p.layers[0].k;
    b.at.resize(p.layers.size());
    for (size_t i = 0; i < p.layers.size(); ++i) {
        b.at[i].ld = b.at[i].room = p.layers[i].n();
        b.at[i].y = p.out[i].y;
        b.at[i].h = p.out[i].h;
    }
    return b;
}

Buffers forward_buffers(const MlpParams& p, Arena& arena) {
    Buffers b = tensors_of(p);
    const size_t last = p.layers.size() - 1;
    int64_t widest = 0;
    for (size_t i = 0; i < last; ++i)
        widest = std::max(widest, b.at[i].ld);
    // Outputs that nobody keeps lie in two buffers in turn, a row at the same place in both.
    float* turns[2] = {};
    if (last > 0 && !p.out[0].y)
        for (float*& turn : turns)
            turn = arena.take(p.rows * widest);
    for (size_t i = 0; i < last; ++i) {
        if (p.out[i].y)
            continue;
        b.at[i].y = turns[i % 2];
        b.at[i].room = widest;
    }
    take_panels(b, p.layers, arena, Passes::kForward, p.layers.size());
    return b;
}

Buffers backward_buffers(const MlpParams& p, Arena& arena) {
    Buffers b = tensors_of(p);
    b.dy = p.dy;
    b.dx = p.dx;
    for (size_t i = p.first; i < p.layers.size(); ++i)
        b.at[i].dz = arena.take(p.rows * b.at[i].ld);
    take_sums(b, p.layers, arena, p.rows);
    for (size_t i = 0; i < p.layers.size(); ++i) {
        if (!p.out[i].db)
            b.at[i].db = nullptr;
        if (!p.out[i].dslope)
            b.at[i].dslope = nullptr;
    }
    const size_t first_dx = p.dx ? p.first : p.first + 1;
    take_panels(b, p.layers, arena, Passes::kBackward, first_dx);
    return b;
}

}  // namespace

int64_t mlp_fwd_work(const MlpParams& p) {
    Arena arena{nullptr};
    forward_buffers(p, arena);
    return arena.used;
}

int64_t mlp_bwd_work(const MlpParams& p) {
    Arena arena{nullptr};
    backward_buffers(p, arena);
    return arena.used;
}

int launch_mlp_fwd(const MlpParams& p, ParallelFor parallel) {
    Arena arena{p.work};
    const Buffers buffers = forward_buffers(p, arena);
    Network network(p.layers, buffers, parallel);
    network.set_batch(p.rows);
    network.pack();
    network.each_block([&](Rows r, ParallelFor f) { network.forward(r, f); });
    return network.failed;
}

int launch_mlp_bwd(const MlpParams& p, ParallelFor parallel) {
    Arena arena{p.work};
    const Buffers buffers = backward_buffers(p, arena);
    Network network(p.layers, buffers, parallel);
    network.set_batch(p.rows);
    network.pack();
    network.each_block([&](Rows r, ParallelFor f) { network.backward(r, f, p.first); });
    int failed = network.failed;
    for (size_t i = p.first; i < p.layers.size(); ++i) {
        const MlpOutputs& out = p.out[i];
        const Layer& l = p.layers[i];
        if (out.dw) {
            failed |= launch_gemm(network.weight_gradient(i, out.dw), parallel);
        }
        if (out.db)
            add_blocks(out.db, buffers.at[i].db, l.n(), network.blocks());
        if (out.dslope)
            add_blocks(out.dslope, buffers.at[i].dslope, l.e.slope_size, network.blocks());
    }
    return failed;
}

}  // namespace fusedmlp::cpu
