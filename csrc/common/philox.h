// The dropout mask, one element at a time: implements fusedmlp/spec/philox.py. Host and device, no
// torch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#    define FUSEDMLP_HD __host__ __device__ __forceinline__
#else
#    define FUSEDMLP_HD inline __attribute__((always_inline))
#endif

namespace fusedmlp {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
constexpr int kPhiloxColumns = 8;  // elements of one row that share a call

struct PhiloxWords {
    uint32_t w[4];
};

// Philox 4x32-10 of counter (c0, c1, c2, c3) under key (k0, k1).
FUSEDMLP_HD PhiloxWords
philox4x32_10(uint32_t k0, uint32_t k1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = uint64_t(kPhiloxM0) * c0;
        const uint64_t p1 = uint64_t(kPhiloxM1) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    return {{c0, c1, c2, c3}};
}

// The four words that columns 8 * group .. 8 * group + 7 of one row share.
FUSEDMLP_HD PhiloxWords philox_group(uint64_t seed, uint64_t stream, uint32_t row, uint32_t group) {
    return philox4x32_10(
        uint32_t(seed), uint32_t(seed >> 32), group, row, uint32_t(stream), uint32_t(stream >> 32)
    );
}

// The 32-bit window that element j = column % 8 owns; dropped if it is below the threshold.
FUSEDMLP_HD uint32_t philox_window(const PhiloxWords& words, int j) {
    const int k = j >> 1;
    return (j & 1) ? (words.w[k] >> 16) | (words.w[(k + 1) & 3] << 16) : words.w[k];
}

}  // namespace fusedmlp
