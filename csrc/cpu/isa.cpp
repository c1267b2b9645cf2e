// Chooses the instruction set once, at run time. FUSEDMLP_CPU_ISA=baseline|avx2|avx512 asks for
// one; a set that the processor lacks is passed over for the next lower one.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/tile.h"

namespace fusedmlp::cpu {
namespace {

#ifdef FUSEDMLP_X86
bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Candidate {
    Kernels kernels;
    bool (*supported)();
};

// Best first.
const Candidate kCandidates[] = {
#ifdef FUSEDMLP_X86
    {{"avx512", avx512::fwd_kernel, avx512::bwd_kernel}, has_avx512},
    {{"avx2", avx2::fwd_kernel, avx2::bwd_kernel}, has_avx2},
#endif
    {{"baseline", baseline::fwd_kernel, baseline::bwd_kernel}, [] { return true; }},
};

// The best set that is not above `highest`; without a name the best of all.
const Kernels& choose(const char* highest) {
    bool reached = true;
    if (highest)
        for (const Candidate& c : kCandidates)
            reached &= std::strcmp(c.kernels.name, highest) != 0;
    for (const Candidate& c : kCandidates) {
        reached |= highest && std::strcmp(c.kernels.name, highest) == 0;
        if (reached && c.supported())
            return c.kernels;
    }
    return kCandidates[sizeof kCandidates / sizeof *kCandidates - 1].kernels;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* k = current.load(std::memory_order_relaxed);
    if (!k) {
        k = &choose(std::getenv("FUSEDMLP_CPU_ISA"));
        current.store(k, std::memory_order_relaxed);
    }
    return *k;
}

bool set_isa(const char* name) {
    const Kernels& k = choose(name);
    current.store(&k, std::memory_order_relaxed);
    return std::strcmp(k.name, name) == 0;
}

}  // namespace fusedmlp::cpu
