// The numbers of an update that depend on the step: learning rate and bias corrections.
#include <cmath>

#include "cpu/step.h"

namespace fusedmlp::cpu {

// torch.optim.SGD, Adam and AdamW: these numbers in double, each rounded once. Epsilon hat:
// section 2 of Kingma and Ba, w -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps).
UpdateParams numbers_of(const StepParams& p, const StepParam& w, double lr_scale, int64_t updates) {
    UpdateParams u{};
    const double lr = w.lr * lr_scale;
    u.rule = p.rule;
    if (!has_moments(p.rule)) {
        u.lr = float(lr);
        u.weight_decay = float(w.weight_decay);
        u.momentum = float(p.momentum);
        return u;
    }
    const double t = double(updates);
    const double root = std::sqrt(1.0 - std::pow(p.beta2, t));
    const bool is_hat = p.rule == kAdamEpsilonHat;
    u.lr = float((is_hat ? lr * root : lr) / (1.0 - std::pow(p.beta1, t)));
    u.weight_decay = float(p.rule == kAdamW ? 1.0 - lr * w.weight_decay : w.weight_decay);
    u.momentum = float(1.0 - p.beta1);
    u.beta2 = float(p.beta2);
    u.rest2 = float(1.0 - p.beta2);
    u.root = is_hat ? 1.0f : float(root);
    u.eps = float(p.eps);
    return u;
}

}  // namespace fusedmlp::cpu
