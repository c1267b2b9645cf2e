// Products in bf16 for AVX-512 with VDPBF16PS.
#include "cpu/isa.h"
#include "cpu/vec/avx512.h"

#define FUSEDMLP_ISA avx512_bf16
namespace fusedmlp::avx512_bf16 {
using namespace avx512;
}
#include "cpu/gemm_impl.h"

namespace fusedmlp::avx512_bf16 {

// Tiles of C in vector registers.
struct Products {
    struct Bf16 {
        static constexpr bool kCopies = false;  // B is packed
        static inline __attribute__((always_inline)) VF sum(VF a, VF b, VF c) {
            return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
        }
    };

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
        static constexpr Micros<Bf16> micros;
        const int64_t tiles = (rows + kMR - 1) / kMR;
        for (int64_t tile = 0, i = 0, height; tile < tiles; ++tile, i += height) {
            height = (rows - i + tiles - tile - 1) / (tiles - tile);
            micros.of[height][cols > VL](
                a + i * count, count, 1, b, kNR, count, c + i * ldc, ldc, cols, add, nullptr
            );
        }
    }
};

}  // namespace fusedmlp::avx512_bf16

#include "cpu/gemm_bf16_impl.h"

namespace fusedmlp::avx512_bf16 {
extern const cpu::GemmKernels bf16;
const cpu::GemmKernels bf16 = {
    kNR, 2, gemm_block_bf16, pack_across_bf16, pack_along_bf16, nullptr, nullptr,
};
}  // namespace fusedmlp::avx512_bf16
