// The loop over a tile that forward and backward share: rows, then vectors of a row, each with its
// part of the mask. An Op has row(index), full(i, keep) for VL elements from i on, part(i, n, keep)
// for the last n < VL of a row, and done() after each row.
#pragma once

#include "cpu/vec/philox.h"

namespace fusedmlp::FUSEDMLP_ISA {

#define FN inline __attribute__((always_inline))

// Vectors from i on, with their windows in memory.
template <class Op>
static FN void sweep_drawn(Op& op, const uint32_t* windows, VI threshold, int64_t i, int64_t end) {
#pragma GCC unroll 1
    for (; i + VL <= end; i += VL, windows += VL)
        op.full(i, not_below(load_bits(windows), threshold));
    if (i < end)
        op.part(i, int(end - i), not_below(load_bits(windows), threshold));
}

// D draws from column i on, by way of memory: for what ends within them, and for slow activations.
template <int D, class Op>
static FN void sweep_draws(
    Op& op,
    const Draw& draw,
    const DrawRow& row,
    const DrawColumn* columns,
    VI threshold,
    int64_t i,
    int64_t end
) {
    const DrawRow rows[2] = {row, row};
    alignas(64) uint32_t windows[D * kDraw];
    VQ words[D][2];
    draw.template draw<D>(rows, columns + i / kDraw, words, [](int) {});
#pragma GCC unroll 2
    for (int d = 0; d < D; ++d) {
        VI w[4];
        in_order(words[d][0], words[d][1], w);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
            store_bits(windows + d * kDraw + j * VL, w[j]);
    }
    sweep_drawn(op, windows, threshold, i, end < i + D * kDraw ? end : i + D * kDraw);
}

// The 8 vectors from column i on, whose words have been drawn, while the next 8 are drawn: neither
// then waits for the other's latency.
template <class Op>
static FN void sweep_drawn_and_draw(
    Op& op,
    const Draw& draw,
    const DrawRow& next_row,
    const DrawColumn* next_columns,
    VQ (*words)[2],
    VI threshold,
    int64_t i
) {
    const DrawRow rows[2] = {next_row, next_row};
    VQ next[2][2];
    VI w[4];
    draw.template draw<2>(rows, next_columns, next, [&](int round) __attribute__((always_inline)) {
        const int d = round >= 6;  // which draw, and which half of it
        const int half = round - (d ? 7 : 3);
        if (half < 0) {
            in_order(words[d][0], words[d][1], w);
        } else if (half < 2) {
            const int64_t at = i + d * kDraw + 2 * half * VL;
            op.full(at, not_below(w[2 * half], threshold));
            op.full(at + VL, not_below(w[2 * half + 1], threshold));
        }
    });
#pragma GCC unroll 2
    for (int d = 0; d < 2; ++d) {
        words[d][0] = next[d][0];
        words[d][1] = next[d][1];
    }
}

template <bool LIGHT, class Op>
static FN void sweep_wide(const cpu::Tile& t, Op& op) {
    const Draw draw(*t.philox);
    const VI threshold = set1_bits(t.philox->threshold);
    DrawColumn columns[cpu::kMaxWidth / kDraw + 1];
    VQ group = add_q(set1_q(uint64_t(t.col0 / kPhiloxColumns)), lanes_q());
    for (int64_t i = 0; i < t.width; i += kDraw) {
        columns[i / kDraw] = draw.column(group);
        group = add_q(group, set1_q(VL / 2));
    }
    const int64_t whole = LIGHT ? t.width / (2 * kDraw) * (2 * kDraw) : 0;
    DrawRow drawn = draw.row(set1_q(uint64_t(t.row0) + draw.row_offset));
    VQ words[2][2] = {};
    if (whole) {
        const DrawRow rows[2] = {drawn, drawn};
        draw.template draw<2>(rows, columns, words, [](int) {});
    }
    for (int64_t row = t.row0; row < t.row1; ++row) {
        op.row(row * t.cols + t.col0);
        const DrawRow following = draw.row(set1_q(uint64_t(row) + 1 + draw.row_offset));
        int64_t i = 0;
        if constexpr (LIGHT) {
            for (; i < whole; i += 2 * kDraw) {
                const bool last = i + 2 * kDraw == whole;
                sweep_drawn_and_draw(
                    op, draw, last ? following : drawn, last ? columns : columns + i / kDraw + 2,
                    words, threshold, i
                );
            }
        }
        for (; i + kDraw < t.width; i += 2 * kDraw)
            sweep_draws<2>(op, draw, drawn, columns, threshold, i, t.width);
        if (i < t.width)
            sweep_draws<1>(op, draw, drawn, columns, threshold, i, t.width);
        op.done();
        drawn = following;
    }
}

template <class Op>
static FN void sweep_folded(const cpu::Tile& t, Op& op) {
    const Draw draw(*t.philox);
    const VI threshold = set1_bits(t.philox->threshold);
    alignas(64) uint32_t windows[cpu::kFlatWidth + cpu::kPad];
    for (int64_t row = t.row0; row < t.row1; ++row) {
        const int64_t start = row * t.cols;
        op.row(start);
        draw_folded(draw, *t.fold, row, windows);
        sweep_drawn(op, windows, threshold, 0, t.size - start < t.width ? t.size - start : t.width);
        op.done();
    }
}

template <class Op>
static FN void sweep_undropped(const cpu::Tile& t, Op& op) {
    for (int64_t row = t.row0; row < t.row1; ++row) {
        const int64_t start = row * t.cols + t.col0;
        const int64_t end = t.size - start < t.width ? t.size - start : t.width;
        op.row(start);
        int64_t i = 0;
        for (; i + VL <= end; i += VL)
            op.full(i, VM{});
        if (i < end)
            op.part(i, int(end - i), VM{});
        op.done();
    }
}

template <bool DROP, bool LIGHT, class Op>
static FN void sweep(const cpu::Tile& t, Op& op) {
    if constexpr (!DROP)
        sweep_undropped(t, op);
    else if (t.fold)
        sweep_folded(t, op);
    else
        sweep_wide<LIGHT>(t, op);
}

#undef FN

}  // namespace fusedmlp::FUSEDMLP_ISA
