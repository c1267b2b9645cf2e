// What the kernels take from CUDA, in one place: threads, barriers, memory accesses, launches.
// Under FUSEDMLP_EMULATE the same names come from emulation/simt.h and the kernels run on the CPU,
// which is how tests execute every line of every .cu without a GPU. No torch.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/params.h"

#ifdef FUSEDMLP_EMULATE
#    include "emulation/simt.h"
#else

#    include <cuda_runtime.h>

#    define FUSEDMLP_DEVICE __device__ __forceinline__
// `blocks` of `threads` have to fit on a multiprocessor: the cap on registers.
#    define FUSEDMLP_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#    define FUSEDMLP_UNROLL _Pragma("unroll")
#    define FUSEDMLP_NO_UNROLL _Pragma("unroll 1")
#    define FUSEDMLP_UNROLL_BY(n) FUSEDMLP_PRAGMA(unroll n)
#    define FUSEDMLP_PRAGMA(text) _Pragma(#text)

namespace fusedmlp::cuda {

using Words = uint4;  // the widest access, 16 bytes

FUSEDMLP_DEVICE uint32_t thread_index() { return threadIdx.x; }
FUSEDMLP_DEVICE uint32_t block_index() { return blockIdx.x; }
FUSEDMLP_DEVICE uint32_t block_count() { return gridDim.x; }
FUSEDMLP_DEVICE void sync_block() { __syncthreads(); }
FUSEDMLP_DEVICE void sync_warp() { __syncwarp(); }
FUSEDMLP_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
FUSEDMLP_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

// Hides where v comes from, so that nothing made of it is kept in registers over a loop.
FUSEDMLP_DEVICE void forget_origin(uint64_t& v) { asm volatile("" : "+l"(v)); }

// Every access to global memory goes through these two (and cp_async16 of mma.h).
template <class V>
FUSEDMLP_DEVICE V load(const V* at) {
    return *at;
}
template <class V>
FUSEDMLP_DEVICE void store(V* at, V value) {
    *at = value;
}
// Left to itself, the compiler makes four stores of some.
FUSEDMLP_DEVICE void store(Words* at, Words value) { __stwb(at, value); }

FUSEDMLP_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char bytes[];
    return bytes;
}

// The only launch in this project, and its check. Returns a cudaError_t.
template <class Params>
int launch(
    void (*kernel)(Params),
    int64_t blocks,
    int threads,
    size_t shared,
    void* stream,
    const Params& params
) {
    if (blocks > INT32_MAX)
        return cudaErrorInvalidConfiguration;
    kernel<<<unsigned(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
}

inline int fill_zero(void* at, size_t bytes, void* stream) {
    return bytes ? cudaMemsetAsync(at, 0, bytes, static_cast<cudaStream_t>(stream)) : cudaSuccess;
}

}  // namespace fusedmlp::cuda

#endif

namespace fusedmlp::cuda {

constexpr int kWarp = 32;

FUSEDMLP_HD int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Quotients by a number that is known at launch: one high product where that is exact.
struct Divider {
    uint64_t divisor = 1;
    uint64_t magic = 0;  // 0: divide

    Divider() = default;
    // For numerators below `limit`.
    Divider(int64_t by, int64_t limit) : divisor(uint64_t(by)) {
        // magic = floor(2^64 / by) + 1 is exact while numerator * by < 2^64.
        const bool exact = divisor > 1 && uint64_t(limit) <= UINT64_MAX / divisor;
        magic = exact ? UINT64_MAX / divisor + 1 : 0;
    }
    FUSEDMLP_DEVICE int64_t quotient(int64_t n) const {
        if (divisor == 1)
            return n;
        return int64_t(magic ? multiply_high(uint64_t(n), magic) : uint64_t(n) / divisor);
    }
};

}  // namespace fusedmlp::cuda
