// The products and the kernels of a training step, for any processor: step_impl.h, gemm_impl.h with
// the vectors of vec_baseline.h.
#include "cpu/step_kernels.h"
#include "cpu/vec_baseline.h"

namespace fusedmlp::baseline {

#define FN static inline __attribute__((always_inline))

constexpr int kMR = 4;

FN VF load_part(const float* p, int n) {
    VF v = set1(0.0f);
    __builtin_memcpy(&v, p, size_t(n) * sizeof(float));
    return v;
}
FN void store_part(float* p, int n, VF v) { __builtin_memcpy(p, &v, size_t(n) * sizeof(float)); }
FN VF select_part(int n, VF a, VF b) { return select(VI{0, 1, 2, 3} < set1_int(n), a, b); }
FN VF load_bytes(const uint8_t* p) {
    return VF{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
}
FN float sum_of(VF v) { return (v[0] + v[2]) + (v[1] + v[3]); }
FN float max_of(VF v) {
    const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
}
FN void transpose(VF* r) {
    const VF a = r[0], b = r[1], c = r[2], d = r[3];
    r[0] = VF{a[0], b[0], c[0], d[0]};
    r[1] = VF{a[1], b[1], c[1], d[1]};
    r[2] = VF{a[2], b[2], c[2], d[2]};
    r[3] = VF{a[3], b[3], c[3], d[3]};
}

#undef FN

}  // namespace fusedmlp::baseline

#define FUSEDMLP_ISA baseline
#define FUSEDMLP_ISA_NAME "baseline"
#include "cpu/step_impl.h"
