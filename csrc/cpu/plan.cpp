// How an elementwise call is cut into tiles and rows of scratch memory, and its dtype conversions.
#include "cpu/plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/vec/baseline.h"

namespace fusedmlp::cpu {

void* scratch(Slot slot, size_t bytes) {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    struct Memory {
        std::unique_ptr<void, Free> at;
        size_t bytes = 0;
    };
    thread_local Memory slots[kSlots];
    Memory& m = slots[slot];
    if (m.bytes < bytes) {
        const size_t wanted = (bytes + 4095) / 4096 * 4096;
        m.at.reset(std::aligned_alloc(64, wanted));
        m.bytes = m.at ? wanted : 0;
        if (!m.at)
            throw std::bad_alloc();
    }
    return m.at.get();
}

Plan make_plan(const EpilogueParams& e, bool sums) {
    constexpr int64_t kTileElements = 16384;
    constexpr int64_t kMaxSums = 64;
    Plan p;
    p.size = e.rows * e.cols;
    p.fold = 1;
    // Rows that waste much of a draw or end in a broken vector: several make one flat row.
    if (e.cols < 256 && e.cols % 64 != 0) {
        p.fold = std::max<int64_t>(1, std::min(e.rows, kFlatWidth / e.cols));
        if (p.fold >= 16)
            p.fold &= ~int64_t(15);
    }
    p.folded = e.cols < 256 && e.cols % 64 != 0;
    p.rows = ceil_div(e.rows, p.fold);
    p.cols = p.fold * e.cols;
    p.col_tiles = ceil_div(p.cols, kMaxWidth);
    p.width = p.col_tiles == 1 ? p.cols : round_up(ceil_div(p.cols, p.col_tiles), 64);
    p.tile_rows = std::max<int64_t>(1, kTileElements / p.width);
    if (sums)
        p.tile_rows = round_up(std::max(p.tile_rows, ceil_div(p.rows, kMaxSums)), kSumRows);
    p.row_tiles = ceil_div(p.rows, p.tile_rows);
    return p;
}

void to_float(float* out, const void* in, Dtype dtype, int64_t n) {
    if (dtype == Dtype::kFloat32) {
        std::memcpy(out, in, size_t(n) * sizeof(float));
        return;
    }
    const auto* bits = static_cast<const uint16_t*>(in);
    for (int64_t i = 0; i < n; i += baseline::VL) {
        const size_t count = size_t(std::min<int64_t>(n - i, baseline::VL));
        Half h[baseline::VL] = {};
        float f[baseline::VL];
        std::memcpy(h, bits + i, count * sizeof(uint16_t));
        baseline::store(
            f, dtype == Dtype::kFloat16 ? baseline::load(h)
                                        : baseline::load(reinterpret_cast<const BFloat*>(h))
        );
        std::memcpy(out + i, f, count * sizeof(float));
    }
}

void from_float(void* out, const float* in, Dtype dtype, int64_t n) {
    if (dtype == Dtype::kFloat32) {
        std::memcpy(out, in, size_t(n) * sizeof(float));
        return;
    }
    auto* bits = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < n; i += baseline::VL) {
        const size_t count = size_t(std::min<int64_t>(n - i, baseline::VL));
        Half h[baseline::VL];
        float f[baseline::VL] = {};
        std::memcpy(f, in + i, count * sizeof(float));
        if (dtype == Dtype::kFloat16)
            baseline::store(h, baseline::load(f));
        else
            baseline::store(reinterpret_cast<BFloat*>(h), baseline::load(f));
        std::memcpy(bits + i, h, count * sizeof(uint16_t));
    }
}

namespace {

// `n` values in fp32, `times` times over.
const float* repeated(Slot slot, const void* in, Dtype dtype, int64_t n, int64_t times) {
    auto* out = static_cast<float*>(scratch(slot, size_t(n * times) * sizeof(float)));
    to_float(out, in, dtype, n);
    for (int64_t done = 1; done < times; done *= 2)
        std::memcpy(out + done * n, out, size_t(std::min(done, times - done) * n) * sizeof(float));
    return out;
}

const float* filled(Slot slot, float value, int64_t n) {
    auto* out = static_cast<float*>(scratch(slot, size_t(n) * sizeof(float)));
    std::fill_n(out, n, value);
    return out;
}

struct MinusZeros {
    float value[kMaxWidth + kPad];
    constexpr MinusZeros() : value() {
        for (float& v : value)
            v = -0.0f;
    }
};
alignas(64) constexpr MinusZeros kMinusZeros;

Philox make_philox(const DropoutParams& d) {
    Philox p;
    uint32_t k0 = uint32_t(uint64_t(d.state[0])), k1 = uint32_t(uint64_t(d.state[0]) >> 32);
    for (int i = 0; i < kPhiloxRounds; ++i, k0 += kPhiloxW0, k1 += kPhiloxW1) {
        p.k0[i] = k0;
        p.k1[i] = k1;
    }
    p.stream = uint64_t(d.state[1]) + uint64_t(d.stream_offset);
    p.row_offset = uint64_t(d.row_offset);
    p.threshold = uint32_t(d.threshold);
    return p;
}

// The same for all calls with this many columns, so the last one is kept.
Fold make_fold(int64_t fold, int64_t cols) {
    thread_local int64_t known_fold = 0, known_cols = 0;
    const int64_t per_row = ceil_div(cols, kPhiloxColumns), groups = fold * per_row;
    const int64_t padded = groups + 16;  // whole draws
    const bool is_known = known_fold == fold && known_cols == cols;
    known_fold = known_cols = 0;  // should there be no memory
    auto* row = static_cast<uint32_t*>(scratch(kFoldSlot, size_t(3 * padded) * sizeof(uint32_t)));
    uint32_t *group = row + padded, *offset = group + padded;
    if (!is_known) {
        for (int64_t q = 0; q < padded; ++q) {
            row[q] = uint32_t(q / per_row);
            group[q] = uint32_t(q % per_row);
            const int64_t at = q / per_row * cols + q % per_row * kPhiloxColumns;
            offset[q] = uint32_t(q < groups ? at : fold * cols);
        }
    }
    known_fold = fold;
    known_cols = cols;
    return {fold, groups, row, group, offset};
}

}  // namespace

Inputs::Inputs(const EpilogueParams& e, const Plan& plan) : folded(plan.folded) {
    const int64_t width = plan.width;
    bias = kMinusZeros.value;
    bias_moves = e.bias != nullptr;
    if (e.bias) {
        const bool as_it_is = e.bias_dtype == Dtype::kFloat32 && plan.fold == 1;
        bias = as_it_is ? static_cast<const float*>(e.bias)
                        : repeated(kBiasSlot, e.bias, e.bias_dtype, e.cols, plan.fold);
    }
    slope = nullptr;
    slope_moves = e.act == kPrelu && e.slope_size != 1;
    if (slope_moves) {
        slope = repeated(kSlopeSlot, e.slope, e.slope_dtype, e.cols, plan.fold);
    } else if (e.act == kPrelu) {
        float value;
        to_float(&value, e.slope, e.slope_dtype, 1);
        slope = filled(kSlopeSlot, value, width);
    } else if (e.act == kLeakyRelu) {
        slope = filled(kSlopeSlot, e.alpha, width);
    }
    if (e.drop.threshold) {
        philox = make_philox(e.drop);
        if (folded)
            fold = make_fold(plan.fold, e.cols);
    }
}

void Inputs::apply(Tile& t) const {
    t.bias = bias + (bias_moves ? t.col0 : 0);
    t.slope = slope ? slope + (slope_moves ? t.col0 : 0) : nullptr;
    t.philox = &philox;
    t.fold = folded ? &fold : nullptr;
}

}  // namespace fusedmlp::cpu
