// Launches and their check, shared memory, and the arithmetic of indices. No torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/params.h"

namespace fusedmlp::cuda {

constexpr int kWarp = 32;

__device__ __forceinline__ char* shared_memory() {
    extern __shared__ __align__(128) char bytes[];
    return bytes;
}

// Hides where v comes from, so that nothing made of it is kept in registers over a loop.
__device__ __forceinline__ void forget_origin(uint64_t& v) { asm volatile("" : "+l"(v)); }

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
    __device__ __forceinline__ int64_t quotient(int64_t n) const {
        if (divisor == 1)
            return n;
        return int64_t(magic ? __umul64hi(uint64_t(n), magic) : uint64_t(n) / divisor);
    }
};

}  // namespace fusedmlp::cuda
