// The loop over a tile that forward and backward share: rows, then vectors of a row, each with its
// part of the mask. An Op has row(index), full(i, keep) for VL elements from i on, part(i, n, keep)
// for the last n < VL of a row, and done() after each row.

namespace fusedmlp::FUSEDMLP_ISA {

// Vectors from i on, with their windows in memory.
template <class Op>
static inline __attribute__((always_inline)) void
sweep_drawn(Op& op, const uint32_t* windows, VI threshold, int64_t i, int64_t end) {
#pragma GCC unroll 1
    for (; i + VL <= end; i += VL, windows += VL)
        op.full(i, not_below(load_bits(windows), threshold));
    if (i < end)
        op.part(i, int(end - i), not_below(load_bits(windows), threshold));
}

template <bool DROP, bool LIGHT, class Op>
static inline __attribute__((always_inline)) void sweep(const cpu::Tile& t, Op& op) {
    if constexpr (!DROP) {
        for (int64_t row = t.row0; row < t.row1; ++row) {
            const int64_t start = row * t.cols + t.col0;
            const int64_t end = t.size - start < t.width ? t.size - start : t.width;
            op.row(start);
            int64_t i = 0;
            for (; i + VL <= end; i += VL) op.full(i, op.all());
            if (i < end) op.part(i, int(end - i), op.all());
            op.done();
        }
    } else {
        const Draw draw = Draw::make(*t.philox);
        const VI threshold = set1_bits(t.philox->threshold);
        alignas(64) uint32_t windows[cpu::kMaxWidth + cpu::kPad];
        for (int64_t row = t.row0; row < t.row1; ++row) {
            const int64_t start = row * t.cols + t.col0;
            const int64_t end = t.size - start < t.width ? t.size - start : t.width;
            op.row(start);
            if (t.fold) {
                draw_folded(draw, *t.fold, row, windows);
                sweep_drawn(op, windows, threshold, 0, end);
            } else {
                const VQ row_q = set1_q(uint64_t(row) + draw.row_offset);
                VQ group = add_q(set1_q(uint64_t(t.col0 / kPhiloxColumns)), lanes_q());
                VI w[4];
                int64_t i = 0;
                for (; i < end; i += kDraw) {
                    draw.windows(row_q, group, w);
                    group = add_q(group, set1_q(VL / 2));
                    if (LIGHT && i + kDraw <= end) {
#pragma GCC unroll 4
                        for (int j = 0; j < 4; ++j) op.full(i + j * VL, not_below(w[j], threshold));
                    } else {
#pragma GCC unroll 4
                        for (int j = 0; j < 4; ++j) store_bits(windows + j * VL, w[j]);
                        sweep_drawn(op, windows, threshold, i, end < i + kDraw ? end : i + kDraw);
                    }
                }
            }
            op.done();
        }
    }
}

}  // namespace fusedmlp::FUSEDMLP_ISA
