// dz = keep ? dy * scale * act'(z) : 0, with its column sum db and the sum for prelu's slope in the
// same pass.
//
// A block takes a chunk of rows of `lanes` groups of eight columns: a thread one group, and of the
// rows every (kThreads / lanes)-th, summing in fp32 as it goes. The block adds up its threads in
// shared memory, a second kernel the blocks: always in the same order, which depends on the shape
// alone. Masked: groups beyond the last column, rows beyond the last of the chunk.
#include "cuda/column_sums.cuh"

namespace fusedmlp::cuda {
namespace {

constexpr int kMinRows = 4;          // of a thread, for a second chunk to be worth its sum
constexpr int64_t kBlocks = 2048;    // enough to fill any GPU several times
constexpr int64_t kSmall = 1 << 20;  // elements: below, narrow blocks, so that there are more

struct BwdArgs {
    void* dz;           // (M, N)
    const void* dy;     // (M, N)
    const void* saved;  // (M, N) or null
    int saves;          //
    float scale;        // of kept elements
    float unscale;      // 1 / scale
    Columns columns;
    ColumnTiles tiles;
    SumTarget db;      // of (N,)
    SumTarget dslope;  // of (N,) or of one number
};

constexpr float kLargest = 3.40282347e38f;  // finite

// y / scale. The product alone is off by as much for every element, which a sum over rows shows.
__device__ __forceinline__ float without_scale(float y, const BwdArgs& p) {
    const float quotient = y * p.unscale, rest = fmaf(-quotient, p.scale, y);
    return rest == rest ? fmaf(rest, p.unscale, quotient) : quotient;  // infinite, or NaN
}

// act'(z) of eight elements. v: the saved values on the way in. negative: min(z, 0), from z only.
template <class T, int ACT, bool FROM_Y>
__device__ __forceinline__ void
derive(float (&v)[kEight], float (&negative)[kEight], const BwdArgs& p, int64_t col, int count) {
    float slope[kEight], bias[kEight];
    p.columns.template load_slope<T, ACT>(slope, col, count);
    // Again for each row: eight registers for the whole loop would cost more than a cache hit.
    if constexpr (!FROM_Y)
        p.columns.template load_bias<T>(bias, col, count);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
        if constexpr (FROM_Y) {
            v[j] = act_grad_y<ACT>(ACT == kLeakyRelu ? v[j] : without_scale(v[j], p), slope[j]);
        } else {
            const float z = v[j] + bias[j];
            if constexpr (ACT == kPrelu)
                negative[j] = z > 0.0f ? 0.0f : z;
            v[j] = act_grad_z<ACT>(z, slope[j]);
        }
    }
}

// As above, by the numbers of the call.
template <class T, int FAMILY>
__device__ __forceinline__ void derive_any(
    float (&v)[kEight],
    float (&negative)[kEight],
    const BwdArgs& p,
    int64_t col,
    int count
) {
    with_act<FAMILY>(p.columns.e.act, [&](auto tag) {
        constexpr int kAct = decltype(tag)::value;
        if constexpr (act_has_grad_y(kAct)) {
            if (p.saves == kSavesY)
                return derive<T, kAct, true>(v, negative, p, col, count);
        }
        derive<T, kAct, false>(v, negative, p, col, count);
    });
}

// Blocks that have to fit on a multiprocessor: the cap on registers.
constexpr int resident_blocks(int family, size_t element) {
    return family == kPlain ? 5 : family == kSmooth && element == 4 ? 3 : 4;
}

template <class T, bool VECTOR, int FAMILY>
__global__ void __launch_bounds__(
    kThreads,
    resident_blocks(FAMILY, sizeof(T))
) bias_act_dropout_bwd_kernel(const BwdArgs p) {
    // Rows whose loads are under way together: 64 bytes of a thread.
    constexpr int kRows = VECTOR && sizeof(T) == 2 ? 2 : 1;
    const EpilogueParams& e = p.columns.e;
    const TilePlace place = p.tiles.place(e.rows, e.cols);
    const int count = place.count, step = place.row_step;
    float db[kEight] = {}, dslope[kEight] = {};
    if (count > 0) {
        const int64_t col = place.col;
        Draws draws = load_draws(e.drop);
        // y of relu and dropout holds their joint mask.
        const bool relu_mask = FAMILY == kPlain && e.act == kRelu && p.saves == kSavesY;
        const bool draw = draws.on && !relu_mask;
        const bool is_relu = e.act == kRelu || e.act == kReluSquared;
        int64_t at = place.row * e.cols + col;
        const int64_t jump = int64_t(step) * e.cols;
        uint32_t mask_row = p.columns.mask_row(place.row);
#pragma unroll 1
        for (int left = place.rows; left > 0; left -= kRows) {
            forget_origin(draws.seed);  // the keys of the ten rounds would take 20 registers
            Octet<T, VECTOR> dy[kRows], saved[kRows];
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                if (i >= left)
                    break;
                dy[i].read(static_cast<const T*>(p.dy) + at + i * jump, count);
                if (p.saved)
                    saved[i].read(static_cast<const T*>(p.saved) + at + i * jump, count);
            }
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                if (i >= left)
                    break;
                float dz[kEight], v[kEight], negative[kEight];
                dy[i].get(dz);
#pragma unroll
                for (int j = 0; j < kEight; ++j) {
                    dz[j] *= p.scale;
                    negative[j] = 0.0f;
                }
                if (p.saved) {
                    saved[i].get(v);
                    if (relu_mask) {
#pragma unroll
                        for (int j = 0; j < kEight; ++j)
                            dz[j] = v[j] <= 0.0f ? 0.0f : dz[j];
                    } else {
                        derive_any<T, FAMILY>(v, negative, p, col, count);
#pragma unroll
                        for (int j = 0; j < kEight; ++j) {
                            // Kept out of the mask by a select: 0 * inf would be NaN.
                            negative[j] = negative[j] == 0.0f ? 0.0f : dz[j] * negative[j];
                            // An infinite derivative is that of an overflowed relu_squared.
                            const bool stays = FAMILY == kPlain && dz[j] == 0.0f && v[j] > kLargest;
                            // A unit that is off is selected too: 0 times infinity would be NaN.
                            const bool off = FAMILY == kPlain && is_relu && v[j] == 0.0f;
                            dz[j] = off ? 0.0f : stays ? dz[j] : dz[j] * v[j];
                        }
                    }
                }
                if (draw) {
                    const PhiloxWords words =
                        philox_group(draws.seed, draws.stream, mask_row, uint32_t(col / kEight));
#pragma unroll
                    for (int j = 0; j < kEight; ++j) {
                        const bool dropped = philox_window(words, j) < draws.threshold;
                        dz[j] = dropped ? 0.0f : dz[j];
                        negative[j] = dropped ? 0.0f : negative[j];
                    }
                }
                Octet<T, VECTOR>::write(static_cast<T*>(p.dz) + at, dz, count);
                at += jump;
                mask_row += uint32_t(step);
#pragma unroll
                for (int j = 0; j < kEight; ++j) {
                    db[j] += dz[j];
                    if (FAMILY == kSloped)
                        dslope[j] += negative[j];
                }
            }
        }
    }
    if (p.db.out)
        add_block<false>(db, p.tiles, place, e.cols, p.db);
    if (FAMILY == kSloped && p.dslope.out) {
        if (p.dslope.one)
            add_block<true>(dslope, p.tiles, place, e.cols, p.dslope);
        else
            add_block<false>(dslope, p.tiles, place, e.cols, p.dslope);
    }
}

ColumnTiles make_tiles(const BiasActDropoutBwdParams& p) {
    const EpilogueParams& e = p.e;
    ColumnTiles t;
    const int64_t groups = ceil_div(e.cols, kEight);
    const int widest = e.rows * e.cols <= kSmall ? 1 : 3;
    while (t.log_lanes < widest && (int64_t(1) << t.log_lanes) < groups)
        ++t.log_lanes;
    const int64_t col_tiles = ceil_div(groups, int64_t(1) << t.log_lanes);
    const int64_t row_step = kThreads >> t.log_lanes;
    int64_t rows = 2 * row_step;
    if (p.db || p.dslope) {
        const int64_t chunks = kBlocks / col_tiles > 1 ? kBlocks / col_tiles : 1;
        rows = kMinRows * row_step;
        if (ceil_div(e.rows, rows) > chunks)
            rows = ceil_div(ceil_div(e.rows, chunks), rows) * rows;
    }
    t.rows_of_chunk = rows;
    t.chunks = ceil_div(e.rows, rows);
    t.by_col_tiles = Divider(col_tiles, t.chunks * col_tiles);
    return t;
}

int64_t blocks_of(const ColumnTiles& t) { return t.chunks * int64_t(t.by_col_tiles.divisor); }

// Floats of scratch memory for the sums of blocks: none when one block has all rows of its columns.
int64_t db_scratch(const BiasActDropoutBwdParams& p, const ColumnTiles& t) {
    return p.db && t.chunks > 1 ? t.chunks * p.e.cols : 0;
}
int64_t dslope_scratch(const BiasActDropoutBwdParams& p, const ColumnTiles& t) {
    if (!p.dslope)
        return 0;
    if (p.e.slope_size == 1)
        return blocks_of(t) > 1 ? blocks_of(t) : 0;
    return t.chunks > 1 ? t.chunks * p.e.cols : 0;
}

bool nothing_to_do(const EpilogueParams& e) { return e.rows == 0 || e.cols == 0 || all_dropped(e); }

}  // namespace

int64_t bias_act_dropout_bwd_scratch(const BiasActDropoutBwdParams& p) {
    if (nothing_to_do(p.e) || !(p.db || p.dslope))
        return 0;
    const ColumnTiles tiles = make_tiles(p);
    return db_scratch(p, tiles) + dslope_scratch(p, tiles);
}

int launch_bias_act_dropout_bwd(const BiasActDropoutBwdParams& p, float* scratch, void* stream) {
    const EpilogueParams& e = p.e;
    int failed = 0;
    if (nothing_to_do(e)) {
        failed = fill_zero(p.dz, size_t(e.rows * e.cols) * size_of(e.dtype), stream);
        if (!failed && p.db)
            failed = fill_zero(p.db, size_t(e.cols) * size_of(e.bias_dtype), stream);
        if (!failed && p.dslope)
            failed = fill_zero(p.dslope, size_t(e.slope_size) * size_of(e.slope_dtype), stream);
        return failed;
    }
    BwdArgs args;
    args.dz = p.dz;
    args.dy = p.dy;
    args.saved = p.saves == kSavesNothing || e.act == kNone ? nullptr : p.saved;
    args.saves = args.saved ? p.saves : int(kSavesNothing);
    args.scale = kept_scale(e.drop);
    args.unscale = 1.0f / args.scale;
    args.columns = Columns(e);
    args.tiles = make_tiles(p);
    const int64_t db_floats = db_scratch(p, args.tiles),
                  dslope_floats = dslope_scratch(p, args.tiles);
    const bool one_slope = e.slope_size == 1;
    args.db = {p.db, e.bias_dtype, false};
    args.dslope = {p.dslope, e.slope_dtype, one_slope};
    if (db_floats)
        args.db = {scratch, Dtype::kFloat32, false};
    if (dslope_floats)
        args.dslope = {scratch + db_floats, Dtype::kFloat32, one_slope};

    const bool vectors = takes_vectors(e.dtype, e.cols, {p.dz, p.dy, args.saved});
    const size_t shared = p.db || p.dslope ? kSumShared : 0;
    failed = with_kernel(e, vectors, [&](auto element, auto vector, auto family) {
        const auto kernel =
            bias_act_dropout_bwd_kernel<decltype(element), vector.value, family.value>;
        return launch(kernel, blocks_of(args.tiles), kThreads, shared, stream, args);
    });
    if (!failed && db_floats)
        failed = add_rows(p.db, e.bias_dtype, scratch, args.tiles.chunks, e.cols, stream);
    if (!failed && dslope_floats)
        failed = add_rows(
            p.dslope, e.slope_dtype, scratch + db_floats,
            one_slope ? blocks_of(args.tiles) : args.tiles.chunks, one_slope ? 1 : e.cols, stream
        );
    return failed;
}

}  // namespace fusedmlp::cuda
