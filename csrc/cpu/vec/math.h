// exp and its relatives on vectors, branch-free, right at NaN, infinities, -0 and subnormals.
// Polynomials: minimax fits of relative error (bounds beside each), evaluated in fp32. The sweep
// in tests/backends/test_native.py measures the result against fp64.
#pragma once

namespace fusedmlp::FUSEDMLP_ISA {

#define FN static inline __attribute__((always_inline))

constexpr float kLog2E = 1.44269504088896341f;
// ln 2 in two parts; n times the first is exact for |n| < 2^15.
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440e-4f;

FN VF negate(VF x) { return flip(x, set1(-0.0f)); }
FN VF copysign(VF magnitude, VF x) { return flip(abs(magnitude), sign(x)); }

// e^r - 1 for |r| <= ln 2 / 2, relative error 1.3e-8.
FN VF expm1_reduced(VF r) {
    VF q = set1(0.00139465544f);
    q = fma(q, r, set1(0.00836664438f));
    q = fma(q, r, set1(0.0416662805f));
    q = fma(q, r, set1(0.16666542f));
    q = fma(q, r, set1(0.5f));
    return fma(r * r, q, r);
}

// x = n ln 2 + r, n integral, |r| <= ln 2 / 2.
FN VF reduce(VF x, VF& n) {
    n = round(x * set1(kLog2E));
    return fnma(n, set1(kLn2Low), fnma(n, set1(kLn2High), x));
}

FN VF exp(VF x) {
    // Beyond these bounds the result is 0 or Inf anyway. NaN passes as the second argument.
    x = max(set1(-104.0f), min(set1(89.0f), x));
    VF n;
    const VF r = reduce(x, n);
    return scale_by_pow2(set1(1.0f) + expm1_reduced(r), n);
}

// e^x - 1 for x <= 0; +0 for both zeros.
FN VF expm1_of_negative(VF x) {
    x = max(set1(-20.0f), x);
    VF n;
    const VF r = reduce(x, n), s = pow2(n);
    return fma(s, expm1_reduced(r), s - set1(1.0f));
}

// log(1 + u) for 0 <= u <= 1, as 2 atanh(u / (2 + u)); relative error 5e-9.
FN VF log1p_of_fraction(VF u) {
    const VF s = u / (set1(2.0f) + u), w = s * s;
    VF q = set1(0.140122294f);
    q = fma(q, w, set1(0.139995709f));
    q = fma(q, w, set1(0.200108498f));
    q = fma(q, w, set1(0.333332062f));
    const VF t = s + s;
    return fma(t * w, q, t);
}

FN VF sigmoid(VF x) { return set1(1.0f) / (set1(1.0f) + exp(negate(x))); }

FN VF tanh(VF x) {
    const VF a = abs(x), w = x * x, one = set1(1.0f);
    // Up to 5/8 an odd polynomial, relative error 4.4e-9.
    VF p = set1(-0.0057049864f);
    p = fma(p, w, set1(0.0206390861f));
    p = fma(p, w, set1(-0.0537397154f));
    p = fma(p, w, set1(0.133314416f));
    p = fma(p, w, set1(-0.333332807f));
    const VF small = fma(a * w, p, a);
    // Above, 1 - 2 e / (1 + e) with e = exp(-2 |x|).
    VF n;
    const VF r = reduce(max(set1(-40.0f), set1(-2.0f) * a), n);
    const VF e = (one + expm1_reduced(r)) * pow2(n);
    const VF large = one - (e + e) / (one + e);
    return copysign(select(gt(a, set1(0.625f)), large, small), x);
}

FN VF softplus(VF x) { return max(set1(0.0f), x) + log1p_of_fraction(exp(negate(abs(x)))); }

// The standard normal distribution function at x, and e^(-x^2 / 2).
FN VF normal_cdf(VF x, VF& bell) {
    bell = exp(set1(-0.5f) * x * x);
    // P(X > |x|) = bell q P(q) with q = 1 / (1 + 0.3 |x| / sqrt 2); relative error 1.7e-8.
    const VF q = set1(1.0f) / fma(abs(x), set1(0.212132034f), set1(1.0f));
    VF p = set1(-0.06382732838392258f);
    p = fma(p, q, set1(0.23781707882881165f));
    p = fma(p, q, set1(-0.2448088377714157f));
    p = fma(p, q, set1(0.2593739628791809f));
    p = fma(p, q, set1(-0.0359906405210495f));
    p = fma(p, q, set1(0.10191154479980469f));
    p = fma(p, q, set1(0.07582980394363403f));
    p = fma(p, q, set1(0.08508070558309555f));
    p = fma(p, q, set1(0.08461371064186096f));
    const VF tail = bell * q * p;
    return select(gt(x, set1(0.0f)), set1(1.0f) - tail, tail);
}

#undef FN

}  // namespace fusedmlp::FUSEDMLP_ISA
