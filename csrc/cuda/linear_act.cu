// y = drop(act(x w^T + b)) and, where it is asked for, h = x w^T, in one kernel for bf16 and fp16.
//
//     x (M, K)   w (N, K)   y, h (M, N)   sums in fp32; h is rounded, y is made of what was not
//
// A block makes a (BM, BN) tile, each of its warps a (WM, WN) part of it with mma.sync m16n8k16.
// x and w come in (BM, BK) and (BN, BK) tiles by 16-byte asynchronous copies, STAGES of them in
// shared memory; the 16-byte chunks of a row are swizzled, so that ldmatrix meets no bank twice.
// The epilogue goes through shared memory once, to have eight neighbours of a row in a thread: one
// Philox call and one 16-byte store each.
//
// Masked: what is copied from rows beyond M and N and columns beyond K is 0, and rows beyond M and
// columns beyond N are not stored.
#include "cuda/epilogue.cuh"
#include "cuda/mma.cuh"

namespace fusedmlp::cuda {
namespace {

struct LinearActArgs {
    LinearActParams p;
    Columns columns;
    Divider by_column_tiles;
    bool vectors;  // y and h take 16-byte stores
};

template <int BM_, int BN_, int BK_, int STAGES_, int WARPS_M_, int WARPS_N_>
struct Tile {
    static constexpr int BM = BM_, BN = BN_, BK = BK_, STAGES = STAGES_;
    static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
    static constexpr int THREADS = WARPS_M * WARPS_N * kWarp;
    static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;  // of a warp
    static constexpr int CHUNKS = BK / 8;                       // 16 bytes each, of a row
    static constexpr int STAGE_BYTES = (BM + BN) * BK * 2;
    // A row of the epilogue, in floats: 8 more, so that half a warp, which stores pairs of four
    // rows, meets no bank twice.
    static constexpr int STAGED_ROW = WN + 8;
    static constexpr int STAGED = WM * STAGED_ROW;  // of a warp
    static constexpr int PIPELINE_BYTES = STAGES * STAGE_BYTES;
    static constexpr int EPILOGUE_BYTES = WARPS_M * WARPS_N * STAGED * int(sizeof(float));
    static constexpr int SHARED = PIPELINE_BYTES > EPILOGUE_BYTES ? PIPELINE_BYTES : EPILOGUE_BYTES;
    static_assert(SHARED <= 48 * 1024, "more needs cudaFuncSetAttribute");
    static_assert(WM % 16 == 0 && WN % 16 == 0 && BK % 16 == 0 && kWarp % (WN / 8) == 0);
    static_assert((BM + BN) * CHUNKS % THREADS == 0);

    // Bytes into a stage's (rows, BK) tile; eight neighbouring rows have a chunk in eight places.
    FUSEDMLP_HD static int offset(int row, int chunk) {
        const int turn = CHUNKS >= 8 ? row & 7 : (row >> 1) & 3;
        return (row * CHUNKS + (chunk ^ turn)) * 16;
    }
};

using Small = Tile<32, 32, 64, 4, 2, 2>;
using Medium = Tile<64, 64, 64, 3, 2, 2>;
using Large = Tile<128, 64, 32, 4, 4, 2>;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// Starts the copies of columns k0 to k0 + BK of the block's rows of x and w. A chunk outside has 0
// bytes to copy: its address is not read.
template <class T, class TILE>
__device__ __forceinline__ void
fetch(char* stage, const LinearActParams& p, int64_t row0, int64_t col0, int64_t k0) {
#    pragma unroll
    for (int i = 0; i < (TILE::BM + TILE::BN) * TILE::CHUNKS / TILE::THREADS; ++i) {
        const int chunk_of_all = int(threadIdx.x) + i * TILE::THREADS;
        const int row = chunk_of_all / TILE::CHUNKS, chunk = chunk_of_all % TILE::CHUNKS;
        const bool of_x = row < TILE::BM;
        const int64_t at = of_x ? row0 + row : col0 + (row - TILE::BM);
        const int64_t rows = of_x ? p.e.rows : p.e.cols, stride = of_x ? p.x_stride : p.w_stride;
        const auto* from = static_cast<const T*>(of_x ? p.x : p.w);
        const int64_t k = k0 + chunk * 8, left = p.k - k;
        const int count = at >= rows || left <= 0 ? 0 : left < 8 ? int(left) : 8;
        cp_async16(
            stage + TILE::offset(row, chunk), count ? from + at * stride + k : from,
            count * int(sizeof(T))
        );
    }
}

// The warp's part of one stage: sums (WM / 16, WN / 8) += x tile w tile^T.
template <class T, class TILE>
__device__ __forceinline__ void
multiply(float (&sums)[TILE::WM / 16][TILE::WN / 8][4], const char* stage, int warp_m, int warp_n) {
    const int lane = int(threadIdx.x) % kWarp;
#    pragma unroll
    for (int k = 0; k < TILE::BK / 16; ++k) {
        uint32_t a[TILE::WM / 16][4], b[TILE::WN / 16][4];
        // x: rows 0..7, 8..15 of the low eight of k, then of the high eight.
#    pragma unroll
        for (int m = 0; m < TILE::WM / 16; ++m)
            ldmatrix_x4(
                a[m],
                stage + TILE::offset(warp_m * TILE::WM + m * 16 + lane % 16, 2 * k + lane / 16)
            );
        // w: the low and the high eight of k for rows 0..7, then for rows 8..15.
#    pragma unroll
        for (int n = 0; n < TILE::WN / 16; ++n)
            ldmatrix_x4(
                b[n], stage + TILE::offset(
                                  TILE::BM + warp_n * TILE::WN + n * 16 + lane % 8 + lane / 16 * 8,
                                  2 * k + lane / 8 % 2
                              )
            );
#    pragma unroll
        for (int m = 0; m < TILE::WM / 16; ++m)
#    pragma unroll
            for (int n = 0; n < TILE::WN / 8; ++n)
                mma_16x8x16<T>(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
}

template <class T>
__device__ __forceinline__ void
store_eight(void* to, int64_t at, const float (&v)[kEight], int count, bool vectors) {
    if (vectors)
        Octet<T, true>::write(static_cast<T*>(to) + at, v, count);
    else
        Octet<T, false>::write(static_cast<T*>(to) + at, v, count);
}

template <class T, class TILE>
__device__ __forceinline__ void linear_act(const LinearActArgs& args) {
    const LinearActParams& p = args.p;
    const EpilogueParams& e = args.columns.e;
    char* const shared = shared_memory();
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
    const int warp_m = warp / TILE::WARPS_N, warp_n = warp % TILE::WARPS_N;
    const int64_t row_tile = args.by_column_tiles.quotient(blockIdx.x);
    const int64_t row0 = row_tile * TILE::BM;
    const int64_t col0 = (blockIdx.x - row_tile * int64_t(args.by_column_tiles.divisor)) * TILE::BN;

    const int64_t steps = (p.k + TILE::BK - 1) / TILE::BK;
#    pragma unroll
    for (int s = 0; s < TILE::STAGES - 1; ++s) {
        if (s < steps)
            fetch<T, TILE>(shared + s * TILE::STAGE_BYTES, p, row0, col0, s * int64_t(TILE::BK));
        cp_async_commit();
    }

    // The eight columns of this thread in the epilogue: their latency hides behind the products.
    constexpr int kOfRow = TILE::WN / 8;  // threads for a row
    const int64_t col = col0 + warp_n * TILE::WN + lane % kOfRow * kEight;
    const int64_t cols_left = e.cols - col;
    const int count = int(cols_left < 0 ? 0 : cols_left < kEight ? cols_left : kEight);
    float bias[kEight];
    args.columns.template load_bias<T>(bias, col, count);
    const Draws draws = load_draws(e.drop);

    float sums[TILE::WM / 16][TILE::WN / 8][4] = {};
    int stage = 0, free = TILE::STAGES - 1;
    for (int64_t step = 0; step < steps; ++step) {
        cp_async_wait<TILE::STAGES - 2>();
        // All have this stage, and all are done with the one before it, which is fetched into next.
        __syncthreads();
        const int64_t next = step + TILE::STAGES - 1;
        if (next < steps)
            fetch<T, TILE>(shared + free * TILE::STAGE_BYTES, p, row0, col0, next * TILE::BK);
        cp_async_commit();
        multiply<T, TILE>(sums, shared + stage * TILE::STAGE_BYTES, warp_m, warp_n);
        stage = stage + 1 == TILE::STAGES ? 0 : stage + 1;
        free = free + 1 == TILE::STAGES ? 0 : free + 1;
    }
    // No copy is under way any more: the last STAGES - 1 groups are empty.
    __syncthreads();  // the stages become the warps' staging areas

    // Of each (16, 8) product a lane has two columns of row lane / 4 and two of the row 8 below.
    float* const staged = reinterpret_cast<float*>(shared) + warp * TILE::STAGED;  // (WM, WN)
#    pragma unroll
    for (int m = 0; m < TILE::WM / 16; ++m)
#    pragma unroll
        for (int n = 0; n < TILE::WN / 8; ++n)
#    pragma unroll
            for (int i = 0; i < 4; ++i)
                staged
                    [(m * 16 + lane / 4 + i / 2 * 8) * TILE::STAGED_ROW + n * 8 + lane % 4 * 2 +
                     i % 2] = sums[m][n][i];
    __syncwarp();
    if (count == 0)
        return;
    const float scale = kept_scale(e.drop);
#    pragma unroll 1
    for (int r = lane / kOfRow; r < TILE::WM; r += kWarp / kOfRow) {
        const int64_t row = row0 + warp_m * TILE::WM + r;
        if (row >= e.rows)
            break;
        float v[kEight];
#    pragma unroll
        for (int j = 0; j < kEight; ++j)
            v[j] = staged[r * TILE::STAGED_ROW + lane % kOfRow * kEight + j];
        const int64_t at = row * e.cols + col;
        if (p.h)
            store_eight<T>(p.h, at, v, count, args.vectors);
#    pragma unroll
        for (int j = 0; j < kEight; ++j)
            v[j] += bias[j];
        // One of the families has the activation; the other two leave v as it is.
        activate<T, kPlain>(v, args.columns, scale, col, count);
        activate<T, kSloped>(v, args.columns, scale, col, count);
        activate<T, kSmooth>(v, args.columns, scale, col, count);
        if (draws.on)
            drop(v, draws, args.columns.mask_row(row), uint32_t(col / kEight));
        store_eight<T>(p.y, at, v, count, args.vectors);
    }
}

#endif

template <class T, class TILE>
__global__ void __launch_bounds__(TILE::THREADS, TILE::THREADS > 128 ? 2 : 4) linear_act_kernel(
    const LinearActArgs args
) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    linear_act<T, TILE>(args);
#endif
}

template <class TILE>
int64_t blocks_of(const EpilogueParams& e) {
    return ceil_div(e.rows, TILE::BM) * ceil_div(e.cols, TILE::BN);
}

template <class T, class TILE>
int launch_tile(LinearActArgs& args, void* stream) {
    const int64_t blocks = blocks_of<TILE>(args.p.e);
    args.by_column_tiles = Divider(ceil_div(args.p.e.cols, TILE::BN), blocks);
    return launch(linear_act_kernel<T, TILE>, blocks, TILE::THREADS, TILE::SHARED, stream, args);
}

template <class T>
int launch_dtype(LinearActArgs& args, void* stream, LinearTile tile) {
    if (tile == LinearTile::kLarge)
        return launch_tile<T, Large>(args, stream);
    if (tile == LinearTile::kMedium)
        return launch_tile<T, Medium>(args, stream);
    return launch_tile<T, Small>(args, stream);
}

// The widest tile that still gives work to most multiprocessors of a large GPU. Not measured: no
// GPU has run it yet.
LinearTile tile_by_size(const EpilogueParams& e) {
    constexpr int64_t kEnough = 96;
    if (blocks_of<Large>(e) >= kEnough)
        return LinearTile::kLarge;
    return blocks_of<Medium>(e) >= kEnough ? LinearTile::kMedium : LinearTile::kSmall;
}

// Products above which a library's GEMM and one more kernel are taken. Not measured.
constexpr int64_t kMostProducts = int64_t(1) << 30;

}  // namespace

bool linear_act_takes(const LinearActParams& p) {
    const EpilogueParams& e = p.e;
    if (e.dtype == Dtype::kFloat32 || e.rows == 0 || e.cols == 0)
        return false;
    if (!aligned(p.x) || !aligned(p.w) || p.x_stride % 8 || p.w_stride % 8)
        return false;
    const double products = double(e.rows) * double(e.cols) * double(p.k);
    return products <= double(kMostProducts) && e.rows <= INT32_MAX && e.cols <= INT32_MAX;
}

int launch_linear_act(const LinearActParams& p, void* stream, LinearTile tile) {
    const EpilogueParams& e = p.e;
    if (e.rows == 0 || e.cols == 0)
        return 0;
    if (all_dropped(e)) {
        LinearActParams kept = p;
        kept.e.drop.threshold = 0;
        const int failed = p.h ? launch_linear_act(kept, stream, tile) : 0;
        return failed ? failed : fill_zero(p.y, size_t(e.rows * e.cols) * size_of(e.dtype), stream);
    }
    LinearActArgs args;
    args.p = p;
    args.columns = Columns(e);
    args.vectors = takes_vectors(e.dtype, e.cols, {p.y, p.h});
    if (tile == LinearTile::kBySize)
        tile = tile_by_size(e);
    if (e.dtype == Dtype::kFloat16)
        return launch_dtype<Half>(args, stream, tile);
    return launch_dtype<BFloat>(args, stream, tile);
}

}  // namespace fusedmlp::cuda
