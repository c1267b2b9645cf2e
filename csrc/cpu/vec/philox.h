// The mask of philox.py for VL / 2 groups of 8 columns at once: one group in each 64-bit lane, its
// words in the low halves. A round is then two multiplications and two shifts.
#pragma once

namespace fusedmlp::FUSEDMLP_ISA {

#define FN inline __attribute__((always_inline))

constexpr int kDraw = 4 * VL;  // columns of one draw

// What the first rounds make of the column alone; the same for all rows.
struct DrawColumn {
    VQ c2;      // after round 1, less what the row adds
    VQ c0;      // after round 2, less what the row adds
    VQ c2_two;  // after round 2, less what the row adds
    VQ c3_two;  // after round 2
};

// And of the row alone.
struct DrawRow {
    VQ product;  // M0 c0 of round 1
    VQ high;     // its upper words
};

struct Draw {
    VQ k0[kPhiloxRounds];
    VQ k1[kPhiloxRounds];
    VQ product1;  // M1 * stream low, the same for every element
    VQ stream_high;
    VQ last_k0;  // keys of the last round, in the upper words
    VQ last_k1;
    uint64_t row_offset;

    FN explicit Draw(const cpu::Philox& p) {
        for (int i = 0; i < kPhiloxRounds; ++i) {
            k0[i] = set1_q(p.k0[i]);
            k1[i] = set1_q(p.k1[i]);
        }
        product1 = set1_q(uint64_t(kPhiloxM1) * uint32_t(p.stream));
        stream_high = set1_q(p.stream >> 32);
        last_k0 = raised_q(k0[kPhiloxRounds - 1]);
        last_k1 = raised_q(k1[kPhiloxRounds - 1]);
        row_offset = p.row_offset;
    }

    FN DrawColumn column(VQ group) const {
        const VQ m0 = set1_q(kPhiloxM0), m1 = set1_q(kPhiloxM1);
        const VQ first = mul_q(group, m0);
        const VQ second = mul_q(xor_q(high_q(first), stream_high, k1[0]), m1);
        const VQ third = mul_q(xor_q(high_q(second), product1, k0[1]), m0);
        return {xor_q(first, k1[1]), xor_q(second, k0[2]), xor_q(high_q(third), k1[2]), third};
    }

    FN DrawRow row(VQ row) const {
        const VQ product = mul_q(xor_q(high_q(product1), row, k0[0]), set1_q(kPhiloxM0));
        return {product, high_q(product)};
    }

    // D draws side by side, as a round waits longer for its products than it computes. words[d]:
    // w[1] and w[0], w[3] and w[2] of every lane's group, one below the other. between(i) is called
    // after round i, 2 to 9, for other work that shall be done meanwhile.
    template <int D, class Between>
    FN void
    draw(const DrawRow* row, const DrawColumn* column, VQ (*words)[2], Between between) const {
        const VQ m0 = set1_q(kPhiloxM0), m1 = set1_q(kPhiloxM1);
        VQ c0[D], c1[D], c2[D], c3[D];
#pragma GCC unroll 16
        for (int d = 0; d < D; ++d) {
            c1[d] = mul_q(xor_q(column[d].c2, row[d].high), m1);
            c0[d] = xor_q(high_q(c1[d]), column[d].c0);
            c2[d] = xor_q(column[d].c2_two, row[d].product);
            c3[d] = column[d].c3_two;
        }
        between(2);
#pragma GCC unroll 16
        for (int i = 3; i < kPhiloxRounds - 1; ++i) {
#pragma GCC unroll 16
            for (int d = 0; d < D; ++d) {
                const VQ p0 = mul_q(c0[d], m0), p1 = mul_q(c2[d], m1);
                c0[d] = xor_q(high_q(p1), c1[d], k0[i]);
                c2[d] = xor_q(high_q(p0), c3[d], k1[i]);
                c1[d] = p1;
                c3[d] = p0;
            }
            between(i);
        }
#pragma GCC unroll 16
        for (int d = 0; d < D; ++d) {
            words[d][0] = xor_q(mul_q(c2[d], m1), raised_q(c1[d]), last_k0);
            words[d][1] = xor_q(mul_q(c0[d], m0), raised_q(c3[d]), last_k1);
        }
    }
};

// The windows of one flat row of a folded matrix, in flat order. out: flat columns + kPad.
static inline void draw_folded(const Draw& d, const cpu::Fold& f, int64_t flat_row, uint32_t* out) {
    const VQ first = set1_q(uint64_t(flat_row * f.fold) + d.row_offset);
    for (int64_t q = 0; q < f.groups; q += VL) {
        DrawRow row[2];
        DrawColumn column[2];
        VQ words[2][2];
        for (int i = 0; i < 2; ++i) {
            row[i] = d.row(add_q(first, load_q(f.row + q + i * (VL / 2))));
            column[i] = d.column(load_q(f.group + q + i * (VL / 2)));
        }
        d.draw<2>(row, column, words, [](int) {});
        for (int i = 0; i < 2; ++i) {
            VI w[4];
            in_order(words[i][0], words[i][1], w);
            store_groups(out, f.offset + q + i * (VL / 2), w);
        }
    }
}

#undef FN

}  // namespace fusedmlp::FUSEDMLP_ISA
