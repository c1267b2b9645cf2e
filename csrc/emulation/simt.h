// Runs CUDA kernels of this project on the CPU, a block at a time: every thread is a fiber, and a
// barrier switches to the next one. Stands in for the CUDA half of cuda/simt.h.
//
// It finds what a GPU's sanitizers find: threads run in an order that can be chosen, so that a
// missing barrier shows; asynchronous copies land at once or as late as they may; shared memory
// starts as NaN; accesses outside of the memory a test has named, or not aligned to their width,
// and threads that miss a barrier are errors. No timing, one device, x87-free IEEE arithmetic.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "common/philox.h"

#define FUSEDMLP_DEVICE inline
#define FUSEDMLP_KERNEL(threads, blocks) void
#define FUSEDMLP_UNROLL
#define FUSEDMLP_NO_UNROLL
#define FUSEDMLP_UNROLL_BY(n)

namespace fusedmlp::cuda {

struct alignas(16) Words {
    uint32_t x, y, z, w;
};

}  // namespace fusedmlp::cuda

namespace fusedmlp::emulation {

// Values of cudaError_t.
enum Error : int { kIllegalAddress = 700, kMisaligned = 716, kLaunchFailure = 719 };

struct Thread {
    uint32_t thread, block, blocks;
};
extern Thread current;

enum class Barrier : int { kNone, kBlock, kWarp };
void wait(Barrier kind);

// What the 32 threads of a warp hand in at a collective, by lane, once all have called it.
constexpr size_t kExchangeBytes = 64;
struct Exchange {
    const char* lane[32];
};
Exchange exchange(const void* mine, size_t bytes);

// Counts and reports an access that a GPU would not survive; true if it may be done.
bool allowed(const void* at, size_t bytes, size_t alignment, bool write);

void check_alignment(const void* at, size_t alignment);

char* shared();
void copy_async(void* to, const void* from, int bytes, int width);
void copy_async_commit();
void copy_async_wait(int groups_left);

int run(const std::function<void()>& kernel, int64_t blocks, int threads, size_t shared_bytes);

}  // namespace fusedmlp::emulation

namespace fusedmlp::cuda {

FUSEDMLP_DEVICE uint32_t thread_index() { return emulation::current.thread; }
FUSEDMLP_DEVICE uint32_t block_index() { return emulation::current.block; }
FUSEDMLP_DEVICE uint32_t block_count() { return emulation::current.blocks; }
FUSEDMLP_DEVICE void sync_block() { emulation::wait(emulation::Barrier::kBlock); }
FUSEDMLP_DEVICE void sync_warp() { emulation::wait(emulation::Barrier::kWarp); }
FUSEDMLP_DEVICE float shuffle_xor(float v, int mask) {
    const emulation::Exchange all = emulation::exchange(&v, sizeof(v));
    std::memcpy(&v, all.lane[(emulation::current.thread % 32) ^ unsigned(mask)], sizeof(v));
    return v;
}
FUSEDMLP_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) {
    return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64);
}

FUSEDMLP_DEVICE void forget_origin(uint64_t&) {}

template <class V>
FUSEDMLP_DEVICE V load(const V* at) {
    V value{};
    if (emulation::allowed(at, sizeof(V), alignof(V), false))
        std::memcpy(&value, at, sizeof(V));
    return value;
}
template <class V>
FUSEDMLP_DEVICE void store(V* at, V value) {
    if (emulation::allowed(at, sizeof(V), alignof(V), true))
        std::memcpy(at, &value, sizeof(V));
}

FUSEDMLP_DEVICE char* shared_memory() { return emulation::shared(); }

template <class Params>
int launch(
    void (*kernel)(Params),
    int64_t blocks,
    int threads,
    size_t shared,
    void*,
    const Params& params
) {
    return emulation::run([&] { kernel(params); }, blocks, threads, shared);
}

inline int fill_zero(void* at, size_t bytes, void*) {
    if (bytes)
        std::memset(at, 0, bytes);
    return 0;
}

}  // namespace fusedmlp::cuda
