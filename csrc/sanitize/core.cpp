// Drives all of csrc/cpu for the sanitizers, with neither OpenMP nor torch, so that they see every
// thread: each call is made once on one thread, then with its loops cut into pieces at random,
// which run on real threads with nothing between them but start and end. All must give the same
// bits, and no NaN: memory that nobody has written is NaN.
//
//   core [seed] [rounds]    seed 0: one from the clock
#include <cstdlib>

#include "sanitize/harness.h"

namespace fusedmlp::cpu {
namespace {

int drive(uint64_t seed, int64_t rounds) {
    dice.seed(seed);
    all_loops();
    for (const char* isa : {"baseline", "avx2", "avx512", "avx512_bf16", "amx"}) {
        if (!set_isa(isa)) {
            std::printf("%s: this processor lacks it\n", isa);
            continue;
        }
        const int64_t before = calls;
        dice.seed(seed);
        if (!gemm_bf16())
            all_elementwise();
        all_products();
        all_networks(rounds);
        std::printf("%s: %d calls\n", isa, int(calls - before));
    }
    std::printf(wrong ? "%d of %d calls are wrong\n" : "%d wrong of %d\n", int(wrong), int(calls));
    return wrong ? 1 : 0;
}

}  // namespace
}  // namespace fusedmlp::cpu

int main(int count, char** words) {
    uint64_t seed = count > 1 ? std::strtoull(words[1], nullptr, 10) : 0;
    if (!seed)
        seed = uint64_t(std::chrono::system_clock::now().time_since_epoch().count());
    const int64_t rounds = count > 2 ? std::atoll(words[2]) : 2;
    std::printf("seed %llu, %d rounds\n", static_cast<unsigned long long>(seed), int(rounds));
    return fusedmlp::cpu::drive(seed, rounds);
}
