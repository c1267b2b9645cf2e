// Chooses the instruction set once, at run time. FUSEDMLP_CPU_ISA asks for one by name; a set that
// the processor lacks is passed over for the next lower one.
#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#ifdef FUSEDMLP_X86
#    include <cpuid.h>
#endif
#if defined(FUSEDMLP_X86) && defined(__linux__)
#    include <sys/syscall.h>
#    include <unistd.h>
#endif

// Defined by isa_impl.h and gemm_bf16_impl.h, in one file an instruction set.
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
namespace avx512_bf16 {
extern const cpu::GemmKernels bf16;
}
namespace amx {
extern const cpu::GemmKernels bf16;
}
#endif
}  // namespace fusedmlp

namespace fusedmlp::cpu {
namespace {

#ifdef FUSEDMLP_X86
bool has_avx2() {
    unsigned a, b, c, d;
    __builtin_cpu_init();
    // Clang 14 has no name for F16C.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Whether the processor has AMX with bf16, and the system lets this process use its tiles.
bool has_amx() {
#    ifdef __linux__
    constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;  // of CPUID 7, EDX
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d = 0;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) ||
        !(d & kBf16))
        return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#    else
    return false;
#    endif
}
#endif

struct Set {
    const char* name;
    const Isa* isa;           // null: that of the next lower set
    const GemmKernels* bf16;  // null: there are none
    bool (*supported)();
};

// Best first.
const Set kSets[] = {
#ifdef FUSEDMLP_X86
    {"amx", nullptr, &amx::bf16, has_amx},
    {"avx512_bf16", nullptr, &avx512_bf16::bf16, has_avx512_bf16},
    {"avx512", &avx512::table, nullptr, has_avx512},
    {"avx2", &avx2::table, nullptr, has_avx2},
#endif
    {"baseline", &baseline::table, nullptr, [] { return true; }},
};

// The best supported set, none above `highest`, that fits; without a name the best of all.
template <class Fits>
const Set* find(const char* highest, const Fits& fits) {
    bool reached = true;
    if (highest)
        for (const Set& set : kSets)
            reached &= std::strcmp(set.name, highest) != 0;
    for (const Set& set : kSets) {
        reached |= highest && std::strcmp(set.name, highest) == 0;
        if (reached && fits(set) && set.supported())
            return &set;
    }
    return nullptr;
}

const Set* with_isa(const char* highest) {
    return find(highest, [](const Set& set) { return set.isa != nullptr; });
}

const char* asked() { return std::getenv("FUSEDMLP_CPU_ISA"); }

std::atomic<const Isa*> current{nullptr};
// Products in bf16 are looked for when they are first wanted: a system may grant AMX only then.
const Set kNone = {"", nullptr, nullptr, nullptr};
std::atomic<const Set*> current_bf16{nullptr};

const Set& bf16_set() {
    const Set* found = current_bf16.load(std::memory_order_relaxed);
    if (!found) {
        found = find(asked(), [](const Set& set) { return set.bf16 != nullptr; });
        found = found ? found : &kNone;
        current_bf16.store(found, std::memory_order_relaxed);
    }
    return *found;
}

}  // namespace

const Isa& isa() {
    const Isa* found = current.load(std::memory_order_relaxed);
    if (!found) {
        found = with_isa(asked())->isa;
        current.store(found, std::memory_order_relaxed);
    }
    return *found;
}

const GemmKernels* gemm_bf16() { return bf16_set().bf16; }
const char* bf16_isa() { return bf16_set().name; }

bool set_isa(const char* name) {
    name = name ? name : asked();
    const Set* bf16 = find(name, [](const Set& set) { return set.bf16 != nullptr; });
    const Set* fp32 = with_isa(name);
    current_bf16.store(bf16 ? bf16 : &kNone, std::memory_order_relaxed);
    current.store(fp32->isa, std::memory_order_relaxed);
    return !name || std::strcmp(fp32->name, name) == 0 ||
           (bf16 && std::strcmp(bf16->name, name) == 0);
}

}  // namespace fusedmlp::cpu
