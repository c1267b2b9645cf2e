// Products in bf16 for processors with AMX: tiles of 16 rows of 64 bytes, and an instruction that
// multiplies two of them.
#include "cpu/isa.h"
#include "cpu/vec/avx512.h"

#define FUSEDMLP_ISA amx
namespace fusedmlp::amx {
using namespace avx512;
}
#include "cpu/gemm_impl.h"

namespace fusedmlp::amx {

// Tile registers: 0 to 3 sums of 2 x 2 tiles of C, 4 and 5 of A, 6 and 7 of B.
class Products {
  public:
    Products() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~Products() { _tile_release(); }
    Products(const Products&) = delete;

    // c (rows, cols) = a b, or added to c; a [rows][count] words, b a panel of count words.
    void operator()(
        const float* a,
        int64_t rows,
        const float* b,
        int64_t count,
        float* c,
        int64_t ldc,
        int cols,
        bool add
    ) const {
        for (int64_t i = 0; i < rows; i += 32)
            tiles(
                a + i * count, rows - i < 32 ? int(rows - i) : 32, b, count, c + i * ldc, ldc, cols,
                add
            );
    }

  private:
    static void tiles(
        const float* a,
        int rows,
        const float* b,
        int64_t count,
        float* c,
        int64_t ldc,
        int cols,
        bool add
    ) {
        alignas(64) float copy[32 * 32];
        const bool is_whole = rows == 32 && cols == 32;
        if (add && !is_whole)
            for (int i = 0; i < rows; ++i)
                move(copy + i * 32, c + i * ldc, cols);
        float* const to = is_whole ? c : copy;
        const int64_t ld = is_whole ? ldc : 32;
        if (rows > 16)
            of_rows<true>(a, b, count, to, ld, cols > 16, add);
        else
            of_rows<false>(a, b, count, to, ld, cols > 16, add);
        if (!is_whole)
            for (int i = 0; i < rows; ++i)
                move(c + i * ldc, copy + i * 32, cols);
    }

    static void move(float* to, const float* from, int cols) {
        store_part(to, cols < 16 ? cols : 16, load_part(from, cols < 16 ? cols : 16));
        if (cols > 16)
            store_part(to + 16, cols - 16, load_part(from + 16, cols - 16));
    }

    template <bool TALL>
    static void of_rows(
        const float* a,
        const float* b,
        int64_t count,
        float* c,
        int64_t ldc,
        bool is_wide,
        bool add
    ) {
        if (is_wide)
            product<TALL, true>(a, b, count, c, ldc, add);
        else
            product<TALL, false>(a, b, count, c, ldc, add);
    }

    template <bool TALL, bool WIDE>
    static void
    product(const float* a, const float* b, int64_t count, float* c, int64_t ldc, bool add) {
        const size_t c_step = size_t(ldc) * 4, a_step = size_t(count) * 4, b_step = kNR * 4;
        if (add) {
            _tile_loadd(0, c, c_step);
            if constexpr (WIDE)
                _tile_loadd(1, c + 16, c_step);
            if constexpr (TALL)
                _tile_loadd(2, c + 16 * ldc, c_step);
            if constexpr (TALL && WIDE)
                _tile_loadd(3, c + 16 * ldc + 16, c_step);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t at = 0; at < count; at += 16) {
            _tile_loadd(4, a + at, a_step);
            _tile_loadd(6, b + at * kNR, b_step);
            if constexpr (TALL)
                _tile_loadd(5, a + 16 * count + at, a_step);
            if constexpr (WIDE)
                _tile_loadd(7, b + at * kNR + 16, b_step);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (WIDE)
                _tile_dpbf16ps(1, 4, 7);
            if constexpr (TALL)
                _tile_dpbf16ps(2, 5, 6);
            if constexpr (TALL && WIDE)
                _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, c_step);
        if constexpr (WIDE)
            _tile_stored(1, c + 16, c_step);
        if constexpr (TALL)
            _tile_stored(2, c + 16 * ldc, c_step);
        if constexpr (TALL && WIDE)
            _tile_stored(3, c + 16 * ldc + 16, c_step);
    }
};

}  // namespace fusedmlp::amx

#include "cpu/gemm_bf16_impl.h"

namespace fusedmlp::amx {
extern const cpu::GemmKernels bf16;
const cpu::GemmKernels bf16 = {
    kNR, 2, gemm_block_bf16, pack_across_bf16, pack_along_bf16, nullptr, nullptr,
};
}  // namespace fusedmlp::amx
