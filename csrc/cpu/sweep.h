// The loop over a tile that forward and backward share: rows, then vectors of a row, each with its
// part of the mask. An Op has row(index), full(i, keep) for VL elements from i on, part(i, n, keep)
// for the last n < VL of a row, and done() after each row.

namespace fusedmlp::FUSEDMLP_ISA {

#define FN inline __attribute__((always_inline))

// Vectors from i on, with their windows in memory.
template <class Op>
static FN void
sweep_drawn(Op& op, const uint32_t* windows, VI threshold, int64_t i, int64_t end) {
#pragma GCC unroll 1
    for (; i + VL <= end; i += VL, windows += VL)
        op.full(i, not_below(load_bits(windows), threshold));
    if (i < end)
        op.part(i, int(end - i), not_below(load_bits(windows), threshold));
}

// D draws: columns [i, i + D kDraw), of which those from `end` on are not there.
template <int D, bool LIGHT, class Op>
static FN void sweep_draws(
    Op& op, const Draw& draw, const DrawRow& row, const DrawColumn* columns, VI threshold, int64_t i, int64_t end
) {
    const DrawRow rows[2] = {row, row};
    VI w[D][4];
    draw.windows<D>(rows, columns + i / kDraw, w);
    if (LIGHT && i + D * kDraw <= end) {
#pragma GCC unroll 8
        for (int j = 0; j < 4 * D; ++j)
            op.full(i + j * VL, not_below(w[j / 4][j % 4], threshold));
    } else {
        alignas(64) uint32_t windows[D * kDraw];
#pragma GCC unroll 8
        for (int j = 0; j < 4 * D; ++j) store_bits(windows + j * VL, w[j / 4][j % 4]);
        sweep_drawn(op, windows, threshold, i, end < i + D * kDraw ? end : i + D * kDraw);
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
    for (int64_t row = t.row0; row < t.row1; ++row) {
        op.row(row * t.cols + t.col0);
        const DrawRow drawn = draw.row(set1_q(uint64_t(row) + draw.row_offset));
        int64_t i = 0;
        for (; i + kDraw < t.width; i += 2 * kDraw)
            sweep_draws<2, LIGHT>(op, draw, drawn, columns, threshold, i, t.width);
        if (i < t.width) sweep_draws<1, false>(op, draw, drawn, columns, threshold, i, t.width);
        op.done();
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
        for (; i + VL <= end; i += VL) op.full(i, VM{});
        if (i < end) op.part(i, int(end - i), VM{});
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
