// fp16 and bf16 on a CPU, as GPUs round them: to nearest, ties to even; a NaN stays one.
#pragma once

#include <cstdint>
#include <cstring>

namespace fusedmlp::emulation {

inline float float_of(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, sizeof(f));
    return f;
}

inline uint32_t bits_of(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof(bits));
    return bits;
}

inline float from_bfloat(uint16_t h) { return float_of(uint32_t(h) << 16); }

inline uint16_t to_bfloat(float f) {
    const uint32_t bits = bits_of(f);
    if (f != f)
        return uint16_t(0x7FFF);
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float from_half(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31,
                   mantissa = h & 1023;
    if (exponent == 31)
        return float_of(sign | 0x7F800000 | mantissa << 13);
    if (exponent)
        return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    const float small = float(mantissa) * 0x1p-24f;
    return sign ? -small : small;
}

inline uint16_t to_half(float f) {
    const uint32_t bits = bits_of(f), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000)
        return uint16_t(0x7FFF);
    if (magnitude >= 0x477FF000)
        return uint16_t(sign | 0x7C00);  // 65520 and above
    if (magnitude < 0x38800000) {        // below 2^-14: steps of 2^-24
        const float steps = float_of(magnitude) * 0x1p24f + 0x1p23f;
        return uint16_t(sign | (bits_of(steps) & 0x7FF));
    }
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13));
}

}  // namespace fusedmlp::emulation
