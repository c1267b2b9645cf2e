"""Adam as its authors also write it, with epsilon beside the root of the uncorrected moment."""

from __future__ import annotations

import math

import torch


class EpsilonHatAdam(torch.optim.Adam):
    """torch.optim.Adam with the order of computation at the end of section 2 of Kingma and Ba
    (arXiv:1412.6980), which scikit-learn's MLP has:

        w -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

    There eps is called epsilon hat: torch.optim.Adam with eps / sqrt(1 - b2^t) is the same.
    Arguments, groups and state are those of torch.optim.Adam. All parameters must have gradients at
    each step, and the betas be numbers.
    """

    def step(self, closure=None):
        given = [group["eps"] for group in self.param_groups]
        for group in self.param_groups:
            state = self.state.get(group["params"][0], {})
            updates = 1 + int(state.get("step", 0))
            group["eps"] /= math.sqrt(1.0 - group["betas"][1] ** updates)
        try:
            return super().step(closure)
        finally:
            for group, eps in zip(self.param_groups, given, strict=True):
                group["eps"] = eps
