// The row kernels of step_kernels.h; included once for each instruction set.
#include "cpu/vec/math.h"

namespace fusedmlp::FUSEDMLP_ISA {

#define FN static inline __attribute__((always_inline))

FN VF load_row(const float* p) { return load(p); }
FN VF load_row(const uint8_t* p) { return load_bytes(p); }

// ISO C++ forbids vector operations on what may lie past the end, so the tail goes through a copy.
template <class T>
FN VF load_row_part(const T* p, int n) {
    T copy[VL] = {};
    __builtin_memcpy(copy, p, size_t(n) * sizeof(T));
    return load_row(copy);
}

enum Mean { kNoMean, kOneMean, kMeanRow };

// By the reciprocal and one correction, a third of the time of a division.
FN VF divided(VF v, VF divisor, VF inverse) {
    const VF q = v * inverse;
    return fma(fma(negate(q), divisor, v), inverse, q);
}

// Whether that is the quotient for every byte.
static bool divides_bytes(float divisor) {
    const VF d = set1(divisor), inverse = set1(1.0f / divisor);
    for (int first = 0; first < 256; first += VL) {
        uint8_t bytes[VL];
        for (int i = 0; i < VL; ++i)
            bytes[i] = uint8_t(first + i);
        float quick[VL];
        const VF v = load_bytes(bytes);
        store(quick, divided(v, d, inverse));
        for (int i = 0; i < VL; ++i)
            if (!(quick[i] == float(first + i) / divisor))
                return false;
    }
    return true;
}

constexpr int64_t kFetched = 4;  // rows ahead

enum Divides { kNo, kQuickly, kYes };

template <class T, Divides DIVIDES, Mean MEAN>
static void gather_rows(
    float* out,
    int64_t ld,
    const cpu::ScalingParams& s,
    const int64_t* order,
    int64_t begin,
    int64_t end,
    int64_t k0,
    int64_t k1
) {
    const VF divisor = set1(s.divisor), inverse = set1(1.0f / s.divisor);
    const VF mean = set1(MEAN == kOneMean ? *s.mean : 0.0f),
             std = set1(MEAN == kOneMean ? *s.std : 1.0f);
    const auto value = [&](VF v, VF m, VF d) {
        if constexpr (DIVIDES == kQuickly)
            v = divided(v, divisor, inverse);
        if constexpr (DIVIDES == kYes)
            v = v / divisor;
        if constexpr (MEAN != kNoMean)
            v = (v - m) / d;
        return v;
    };
    const int64_t width = k1 - k0, whole = width / VL * VL;
    const int rest = int(width - whole);
    const T* const data = static_cast<const T*>(s.rows) + k0;
    const float* const means = MEAN == kMeanRow ? s.mean + k0 : nullptr;
    const float* const stds = MEAN == kMeanRow ? s.std + k0 : nullptr;
    for (int64_t row = begin; row < end; ++row) {
        const T* from = data + order[row] * s.width;
        // Rows are drawn at random: none is in a cache, and one waits for memory longer than it
        // takes to scale.
        if (row + kFetched < end) {
            const T* next = data + order[row + kFetched] * s.width;
            for (int64_t i = 0; i < width; i += 64 / int64_t(sizeof(T)))
                __builtin_prefetch(next + i);
        }
        float* to = out + row * ld + k0;
        // Another thread has read these lines, and gives them up slowly where it is far away.
        if (row + 1 < end)
            for (int64_t i = 0; i < width; i += 16)
                __builtin_prefetch(to + ld + i, 1);
        for (int64_t i = 0; i < whole; i += VL) {
            const bool by_column = MEAN == kMeanRow;
            store(
                to + i, value(
                            load_row(from + i), by_column ? load(means + i) : mean,
                            by_column ? load(stds + i) : std
                        )
            );
        }
        if (rest) {
            const bool by_column = MEAN == kMeanRow;
            const VF v = value(
                load_row_part(from + whole, rest),
                by_column ? load_part(means + whole, rest) : mean,
                by_column ? load_part(stds + whole, rest) : std
            );
            store_part(to + whole, rest, v);
        }
    }
}

template <class T, Divides DIVIDES>
static void gather_of(
    float* out,
    int64_t ld,
    const cpu::ScalingParams& s,
    const int64_t* order,
    int64_t begin,
    int64_t end,
    int64_t k0,
    int64_t k1
) {
    if (!s.mean)
        return gather_rows<T, DIVIDES, kNoMean>(out, ld, s, order, begin, end, k0, k1);
    if (s.mean_size == 1)
        return gather_rows<T, DIVIDES, kOneMean>(out, ld, s, order, begin, end, k0, k1);
    gather_rows<T, DIVIDES, kMeanRow>(out, ld, s, order, begin, end, k0, k1);
}

static void gather(
    float* out,
    int64_t ld,
    const cpu::ScalingParams& s,
    const int64_t* order,
    int64_t begin,
    int64_t end,
    int64_t k0,
    int64_t k1
) {
    const auto of = [&](auto gather) { gather(out, ld, s, order, begin, end, k0, k1); };
    if (s.is_bytes && s.divisor != 1.0f)
        of(divides_bytes(s.divisor) ? &gather_of<uint8_t, kQuickly> : &gather_of<uint8_t, kYes>);
    else if (s.is_bytes)
        of(&gather_of<uint8_t, kNo>);
    else
        of(s.divisor != 1.0f ? &gather_of<float, kYes> : &gather_of<float, kNo>);
}

// A row counts in the mean loss of the batch, and so in its gradient, by its weight over the total.
FN double weight_of(const cpu::LossParams& p, int64_t row) {
    return p.weights ? double(p.weights[p.order[row]]) : 1.0;
}

// With q = (1 - e) [target] + e / C: loss = log sum exp z - sum q z; its gradient: softmax z - q.
static void
cross_entropy(const cpu::LossParams& p, int64_t begin, int64_t end, double* loss, int64_t* right) {
    const auto* labels = static_cast<const int64_t*>(p.targets);
    const int64_t cols = p.cols, whole = cols / VL * VL;
    const int rest = int(cols - whole);
    const VF lowest = set1(-__builtin_inff());
    const float even = p.smoothing / float(cols);
    for (int64_t row = begin; row < end; ++row) {
        const double weight = weight_of(p, row);
        const float share = float(weight / p.total_weight);
        float* z = p.out + row * cols;
        VF top = lowest, sum = set1(0.0f), plain = set1(0.0f);
        for (int64_t i = 0; i < whole; i += VL)
            top = max(load(z + i), top);
        if (rest)
            top = max(select_part(rest, load_part(z + whole, rest), lowest), top);
        const float highest = max_of(top);
        const int64_t label = labels[p.order[row]];
        const bool known = label >= 0 && label < cols;
        const float at_label = known ? z[label] : __builtin_nanf("");
        bool is_right = at_label == highest;
        for (int64_t i = 0; is_right && i < label; ++i)
            is_right = z[i] != highest;
        const VF shift = set1(highest);
        for (int64_t i = 0; i < whole; i += VL) {
            const VF v = load(z + i), e = exp(v - shift);
            if (p.smoothing != 0.0f)
                plain = plain + v;
            sum = sum + e;
            store(z + i, e);
        }
        if (rest) {
            const VF v = load_part(z + whole, rest);
            const VF e = select_part(rest, exp(v - shift), set1(0.0f));
            if (p.smoothing != 0.0f)
                plain = plain + v;
            sum = sum + e;
            store_part(z + whole, rest, e);
        }
        const float total = sum_of(sum), log_total = __builtin_logf(total);
        float row_loss = log_total + (highest - at_label);
        if (p.smoothing != 0.0f) {
            const float others = log_total + (highest - sum_of(plain) / float(cols));
            row_loss = (1.0f - p.smoothing) * row_loss + p.smoothing * others;
        }
        *loss += weight * double(row_loss);
        *right += is_right;
        // An unknown label makes the row NaN, and with it the loss.
        const VF factor = set1(known ? share / total : at_label), less = set1(even * share);
        for (int64_t i = 0; i < whole; i += VL)
            store(z + i, load(z + i) * factor - less);
        if (rest)
            store_part(z + whole, rest, load_part(z + whole, rest) * factor - less);
        if (known)
            z[label] -= (1.0f - p.smoothing) * share;
    }
}

static void
squared_error(const cpu::LossParams& p, int64_t begin, int64_t end, double* loss, int64_t* right) {
    const int64_t cols = p.cols;
    for (int64_t row = begin; row < end; ++row) {
        const double weight = weight_of(p, row);
        const float factor = float(2.0 * weight / (p.total_weight * double(cols)));
        float* out = p.out + row * cols;
        const float* target = static_cast<const float*>(p.targets) + p.order[row] * cols;
        double squares = 0.0;
        for (int64_t i = 0; i < cols; ++i) {
            const float gap = out[i] - target[i];
            squares += double(gap) * double(gap);
            out[i] = gap * factor;
        }
        *loss += weight * (squares / double(cols));
    }
    (void)right;
}

// torch.binary_cross_entropy_with_logits, summed over the outputs of a row: loss = (1 - y) z +
// log(1 + exp(-z)); its gradient: 1 / (1 + exp(-z)) - y.
static void
logistic(const cpu::LossParams& p, int64_t begin, int64_t end, double* loss, int64_t* right) {
    const int64_t cols = p.cols, whole = cols / VL * VL;
    const int rest = int(cols - whole);
    const VF one = set1(1.0f);
    for (int64_t row = begin; row < end; ++row) {
        const double weight = weight_of(p, row);
        const VF share = set1(float(weight / p.total_weight));
        float* out = p.out + row * cols;
        const float* target = static_cast<const float*>(p.targets) + p.order[row] * cols;
        VF sum = set1(0.0f);
        for (int64_t i = 0; i < whole; i += VL) {
            const VF z = load(out + i), y = load(target + i);
            sum = sum + fma(one - y, z, softplus(negate(z)));
            store(out + i, (sigmoid(z) - y) * share);
        }
        if (rest) {
            const VF z = load_part(out + whole, rest), y = load_part(target + whole, rest);
            const VF losses = fma(one - y, z, softplus(negate(z)));
            sum = sum + select_part(rest, losses, set1(0.0f));
            store_part(out + whole, rest, (sigmoid(z) - y) * share);
        }
        *loss += weight * double(sum_of(sum));
    }
    (void)right;
}

// torch.optim.SGD: g += wd w; m = momentum m + g; g = m, or g + momentum m; w -= lr g.
template <bool MOMENTUM, bool NESTEROV>
struct Sgd {
    VF lr, decay, momentum;
    explicit Sgd(const cpu::UpdateParams& u)
        : lr(set1(-u.lr)), decay(set1(u.weight_decay)), momentum(set1(u.momentum)) {}
    FN VF next(VF w, VF g, VF& m, VF&, const Sgd& s) {
        g = fma(w, s.decay, g);
        if constexpr (MOMENTUM) {
            m = m * s.momentum + g;
            g = NESTEROV ? fma(m, s.momentum, g) : m;
        }
        return fma(g, s.lr, w);
    }
};

// torch.optim.Adam: g += wd w, or AdamW: w *= 1 - lr wd; m += (1 - b1) (g - m);
// v = b2 v + (1 - b2) g g; w -= step m / (sqrt(v) / root + eps): _single_tensor_adam of
// torch/optim.
template <bool DECOUPLED>
struct Adam {
    VF step, decay, first, second, rest, root, eps;
    explicit Adam(const cpu::UpdateParams& u)
        : step(set1(-u.lr)), decay(set1(u.weight_decay)), first(set1(u.momentum)),
          second(set1(u.beta2)), rest(set1(u.rest2)), root(set1(u.root)), eps(set1(u.eps)) {}
    FN VF next(VF w, VF g, VF& m, VF& v, const Adam& s) {
        if constexpr (!DECOUPLED)
            g = fma(w, s.decay, g);
        m = fma(s.first, g - m, m);
        v = fma(s.rest * g, g, v * s.second);
        if constexpr (DECOUPLED)
            w = w * s.decay;
        return w + s.step * m / (sqrt(v) / s.root + s.eps);
    }
};

template <class R, bool M1, bool M2>
static void update_with(const R& rule, float* w, const float* g, float* m1, float* m2, int64_t n) {
    const VF none = set1(0.0f);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        VF m = M1 ? load(m1 + i) : none, v = M2 ? load(m2 + i) : none;
        store(w + i, R::next(load(w + i), load(g + i), m, v, rule));
        if constexpr (M1)
            store(m1 + i, m);
        if constexpr (M2)
            store(m2 + i, v);
    }
    if (i == n)
        return;
    const int rest = int(n - i);
    VF m = M1 ? load_part(m1 + i, rest) : none, v = M2 ? load_part(m2 + i, rest) : none;
    store_part(w + i, rest, R::next(load_part(w + i, rest), load_part(g + i, rest), m, v, rule));
    if constexpr (M1)
        store_part(m1 + i, rest, m);
    if constexpr (M2)
        store_part(m2 + i, rest, v);
}

static void
update(const cpu::UpdateParams& u, float* w, const float* g, float* m1, float* m2, int64_t n) {
    if (u.rule == cpu::kAdamW)
        update_with<Adam<true>, true, true>(Adam<true>(u), w, g, m1, m2, n);
    else if (cpu::has_moments(u.rule))
        update_with<Adam<false>, true, true>(Adam<false>(u), w, g, m1, m2, n);
    else if (!m1)
        update_with<Sgd<false, false>, false, false>(Sgd<false, false>(u), w, g, m1, m2, n);
    else if (u.rule == cpu::kNesterov)
        update_with<Sgd<true, true>, true, false>(Sgd<true, true>(u), w, g, m1, m2, n);
    else
        update_with<Sgd<true, false>, true, false>(Sgd<true, false>(u), w, g, m1, m2, n);
}

static double square_sum(const float* g, int64_t n) {
    double total = 0.0;
    for (int64_t i = 0; i < n;) {
        // Short sums in fp32, their sum in double.
        VF sum = set1(0.0f);
        const int64_t stop = n - i < 64 * VL ? n : i + 64 * VL;
        for (; i + VL <= stop; i += VL)
            sum = fma(load(g + i), load(g + i), sum);
        total += double(sum_of(sum));
        if (i < stop && stop == n)
            for (; i < n; ++i)
                total += double(g[i]) * double(g[i]);
    }
    return total;
}

static void scale(float* g, float factor, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        g[i] *= factor;
}

static void add(float* sum, const float* x, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        store(sum + i, load(sum + i) + load(x + i));
    if (const int rest = int(n - i))
        store_part(sum + i, rest, load_part(sum + i, rest) + load_part(x + i, rest));
}

static constexpr cpu::StepKernels kStepKernels = {
    gather, cross_entropy, squared_error, logistic, update, square_sum, scale, add,
};

#undef FN

}  // namespace fusedmlp::FUSEDMLP_ISA
