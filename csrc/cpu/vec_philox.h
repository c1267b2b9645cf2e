// The mask of rng.py for VL / 2 groups of 8 columns at once: one group in each 64-bit lane, its
// words in the low halves. A round is then two multiplications and two shifts.

namespace fusedmlp::FUSEDMLP_ISA {


constexpr int kDraw = 4 * VL;  // columns of one draw

struct Draw {
    VQ k0[kPhiloxRounds];
    VQ k1[kPhiloxRounds];
    VQ product1;  // M1 * stream low, the same for every element
    VQ stream_high;
    uint64_t row_offset;

    static inline __attribute__((always_inline)) Draw make(const cpu::Philox& p) {
        Draw d;
        for (int i = 0; i < kPhiloxRounds; ++i) {
            d.k0[i] = set1_q(p.k0[i]);
            d.k1[i] = set1_q(p.k1[i]);
        }
        d.product1 = set1_q(uint64_t(kPhiloxM1) * uint32_t(p.stream));
        d.stream_high = set1_q(p.stream >> 32);
        d.row_offset = p.row_offset;
        return d;
    }

    // 4 VL windows in column order. row, group: one for each lane.
    inline __attribute__((always_inline)) void windows(VQ row, VQ group, VI out[4]) const {
        const VQ m0 = set1_q(kPhiloxM0), m1 = set1_q(kPhiloxM1);
        VQ c0 = xor_q(high_q(product1), row, k0[0]);
        VQ c1 = product1;
        VQ c3 = mul_q(group, m0);
        VQ c2 = xor_q(high_q(c3), stream_high, k1[0]);
#pragma GCC unroll 16
        for (int i = 1; i < kPhiloxRounds; ++i) {
            const VQ p0 = mul_q(c0, m0), p1 = mul_q(c2, m1);
            c0 = xor_q(high_q(p1), c1, k0[i]);
            c2 = xor_q(high_q(p0), c3, k1[i]);
            c1 = p1;
            c3 = p0;
        }
        const VQ pair[4] = {pair_q(c0, c1), pair_q(c1, c2), pair_q(c2, c3), pair_q(c3, c0)};
        in_order(pair, out);
    }
};

// The windows of one flat row of a folded matrix, in flat order. out: flat columns + kDraw.
static inline void draw_folded(const Draw& d, const cpu::Fold& f, int64_t flat_row, uint32_t* out) {
    const VQ first = set1_q(uint64_t(flat_row * f.fold) + d.row_offset);
    for (int64_t q = 0; q < f.groups; q += VL / 2) {
        VI w[4];
        d.windows(add_q(first, load_q(f.row + q)), load_q(f.group + q), w);
        store_groups(out, f.offset + q, w);
    }
}


}  // namespace fusedmlp::FUSEDMLP_ISA
