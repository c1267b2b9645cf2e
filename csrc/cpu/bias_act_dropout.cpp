// The launchers: cut a call into tiles, run them on threads, add up the partial sums.
#include <algorithm>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace fusedmlp::cpu {
namespace {

// Elements for which another thread is worth its start.
constexpr int64_t kGrain = 16384;

// Calls body(tile) for every tile; body may fill in more of it before running the kernel.
template <class Body>
int for_each_tile(
    const Tile& common,
    const Plan& plan,
    const Inputs& inputs,
    ParallelFor parallel,
    const Body& body
) {
    const int64_t elements = plan.tile_rows * plan.width;
    return run(
        parallel, plan.tiles(), std::max<int64_t>(1, kGrain / elements),
        [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                Tile t = common;
                const int64_t row_tile = i / plan.col_tiles;
                t.row0 = row_tile * plan.tile_rows;
                t.row1 = std::min(plan.rows, t.row0 + plan.tile_rows);
                t.col0 = i % plan.col_tiles * plan.width;
                t.width = std::min(plan.width, plan.cols - t.col0);
                inputs.apply(t);
                body(t, row_tile);
            }
        }
    );
}

Tile common_tile(const EpilogueParams& e, const Plan& plan, int64_t ld, void* out, const void* in) {
    Tile t{};
    t.out = out;
    t.in = in;
    t.scale = e.drop.threshold ? e.drop.scale : 1.0f;
    t.size = plan.folded ? plan.size : e.rows * ld;
    t.cols = plan.folded ? plan.cols : ld;
    return t;
}

bool all_dropped(const EpilogueParams& e) { return e.drop.threshold >> 32; }

// Sums over the rows of tiles and over folded rows; the first `cols` of `sums` hold the result.
int add_up(double* sums, int64_t stride, const Plan& plan, int64_t cols, ParallelFor parallel) {
    const int64_t grain = std::max<int64_t>(64, 2 * kGrain / plan.row_tiles);
    const int failed = run(parallel, plan.cols, grain, [=, &plan](int64_t begin, int64_t end) {
        for (int64_t tile = 1; tile < plan.row_tiles; ++tile)
            for (int64_t c = begin; c < end; ++c)
                sums[c] += sums[tile * stride + c];
    });
    for (int64_t f = 1; f < plan.fold; ++f)
        for (int64_t c = 0; c < cols; ++c)
            sums[c] += sums[f * cols + c];
    return failed;
}

void store_sums(void* out, const double* sums, Dtype dtype, int64_t n) {
    auto* rounded = static_cast<float*>(scratch(kBiasSlot, size_t(n) * sizeof(float)));
    for (int64_t i = 0; i < n; ++i)
        rounded[i] = float(sums[i]);
    from_float(out, rounded, dtype, n);
}

// No bytes may be at null, which memset may not be given.
void clear(void* out, int64_t n, Dtype dtype) {
    if (n > 0)
        std::memset(out, 0, size_t(n) * size_of(dtype));
}

void clear_rows(void* out, const EpilogueParams& e, int64_t ld) {
    const size_t size = size_of(e.dtype);
    for (int64_t row = 0; row < e.rows; ++row)
        std::memset(static_cast<char*>(out) + size_t(row * ld) * size, 0, size_t(e.cols) * size);
}

// The sums in memory of this thread, or null where they are not wanted.
struct Sums {
    double* db;
    double* dslope;
};

// There is at least one row and column, and not all is dropped.
Sums backward(
    const BiasActDropoutBwdParams& p,
    int64_t ld,
    bool wants_db,
    bool wants_dslope,
    ParallelFor parallel,
    int& failed
) {
    const EpilogueParams& e = p.e;
    const Plan plan = make_plan(e, wants_db || wants_dslope);
    const Inputs inputs(e, plan);
    const Kernel kernel = isa().elementwise.bwd(e.act, p.saves, e.dtype, e.drop.threshold != 0);
    Tile common = common_tile(e, plan, ld, p.dz, p.dy);
    common.saved = p.saved;

    // One row of sums for each row of tiles, for db and for dslope.
    const int64_t stride = round_up(plan.cols, kPad) + kPad, plane = stride * plan.row_tiles;
    double* db = nullptr;
    double* dslope = nullptr;
    if (wants_db || wants_dslope) {
        const int64_t planes = wants_db + wants_dslope;
        auto* sums =
            static_cast<double*>(scratch(kSumSlot, size_t(planes * plane) * sizeof(double)));
        if (wants_db)
            db = sums;
        if (wants_dslope)
            dslope = sums + (planes - 1) * plane;
    }
    failed |= for_each_tile(common, plan, inputs, parallel, [=](Tile& t, int64_t row_tile) {
        alignas(64) float rows[2 * (kMaxWidth + kPad)];
        t.scratch = rows;
        if (db) {
            t.db = db + row_tile * stride + t.col0;
            std::fill_n(t.db, round_up(t.width, kPad), 0.0);
        }
        if (dslope) {
            t.dslope = dslope + row_tile * stride + t.col0;
            std::fill_n(t.dslope, round_up(t.width, kPad), 0.0);
        }
        kernel(t);
    });
    if (db)
        failed |= add_up(db, stride, plan, e.cols, parallel);
    if (dslope) {
        failed |= add_up(dslope, stride, plan, e.cols, parallel);
        if (e.slope_size == 1)
            for (int64_t c = 1; c < e.cols; ++c)
                dslope[0] += dslope[c];
    }
    return {db, dslope};
}

}  // namespace

int forward_rows(const BiasActDropoutFwdParams& p, int64_t ld, ParallelFor parallel) {
    const EpilogueParams& e = p.e;
    if (e.rows == 0 || e.cols == 0)
        return 0;
    if (all_dropped(e)) {
        clear_rows(p.y, e, ld);
        return 0;
    }
    const Plan plan = make_plan(e, false);
    const Inputs inputs(e, plan);
    const Kernel kernel = isa().elementwise.fwd(e.act, e.dtype, e.drop.threshold != 0);
    return for_each_tile(
        common_tile(e, plan, ld, p.y, p.x), plan, inputs, parallel,
        [kernel](Tile& t, int64_t) { kernel(t); }
    );
}

int backward_rows(
    const BiasActDropoutBwdParams& p,
    int64_t ld,
    double* db,
    double* dslope,
    ParallelFor parallel
) {
    const EpilogueParams& e = p.e;
    if (db)
        std::fill_n(db, e.cols, 0.0);
    if (dslope)
        std::fill_n(dslope, e.slope_size, 0.0);
    if (e.rows == 0 || e.cols == 0)
        return 0;
    if (all_dropped(e)) {
        clear_rows(p.dz, e, ld);
        return 0;
    }
    int failed = 0;
    const Sums sums = backward(p, ld, db, dslope, parallel, failed);
    if (db)
        std::copy_n(sums.db, e.cols, db);
    if (dslope)
        std::copy_n(sums.dslope, e.slope_size, dslope);
    return failed;
}

int launch_bias_act_dropout_fwd(const BiasActDropoutFwdParams& p, ParallelFor parallel) {
    return forward_rows(p, p.e.cols, parallel);
}

int launch_bias_act_dropout_bwd(const BiasActDropoutBwdParams& p, ParallelFor parallel) {
    const EpilogueParams& e = p.e;
    if (e.rows == 0 || e.cols == 0 || all_dropped(e)) {
        clear(p.dz, e.rows * e.cols, e.dtype);
        if (p.db)
            clear(p.db, e.cols, e.bias_dtype);
        if (p.dslope)
            clear(p.dslope, e.slope_size, e.slope_dtype);
        return 0;
    }
    int failed = 0;
    const Sums sums = backward(p, e.cols, p.db, p.dslope, parallel, failed);
    if (p.db)
        store_sums(p.db, sums.db, e.bias_dtype, e.cols);
    if (p.dslope)
        store_sums(p.dslope, sums.dslope, e.slope_dtype, e.slope_size);
    return failed;
}

}  // namespace fusedmlp::cpu
