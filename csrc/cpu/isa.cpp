// Chooses the instruction set once, at run time. FUSEDMLP_CPU_ISA=baseline|avx2|avx512 asks for
// one; a set that the processor lacks is passed over for the next lower one.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/isa.h"

// Defined by isa_impl.h, in one file an instruction set.
namespace fusedmlp {
namespace baseline {
extern const cpu::Isa table;
}
#ifdef FUSEDMLP_X86
namespace avx2 {
extern const cpu::Isa table;
}
namespace avx512 {
extern const cpu::Isa table;
}
#endif
}  // namespace fusedmlp

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
    const Isa& isa;
    bool (*supported)();
};

// Best first.
const Candidate kCandidates[] = {
#ifdef FUSEDMLP_X86
    {avx512::table, has_avx512},
    {avx2::table, has_avx2},
#endif
    {baseline::table, [] { return true; }},
};

// The best set that is not above `highest`; without a name the best of all.
const Isa& choose(const char* highest) {
    bool reached = true;
    if (highest)
        for (const Candidate& c : kCandidates)
            reached &= std::strcmp(c.isa.name, highest) != 0;
    for (const Candidate& c : kCandidates) {
        reached |= highest && std::strcmp(c.isa.name, highest) == 0;
        if (reached && c.supported())
            return c.isa;
    }
    return baseline::table;
}

std::atomic<const Isa*> current{nullptr};

}  // namespace

const Isa& isa() {
    const Isa* found = current.load(std::memory_order_relaxed);
    if (!found) {
        found = &choose(std::getenv("FUSEDMLP_CPU_ISA"));
        current.store(found, std::memory_order_relaxed);
    }
    return *found;
}

bool set_isa(const char* name) {
    const Isa& found = choose(name);
    current.store(&found, std::memory_order_relaxed);
    return std::strcmp(found.name, name) == 0;
}

}  // namespace fusedmlp::cpu
