"""Learning-rate schedules as factors of the rate: a pure function of the number of the step, so a
resumed run needs nothing but that number.

With W warm-up steps of S in all, step s (from 0 on) has the factor
    s < W       (s + 1) / (W + 1)    LinearLR(start_factor=1 / (W + 1), total_iters=W)
    constant    1
    cosine      (1 + cos(pi t / T)) / 2    CosineAnnealingLR(T_max=T), eta_min 0
    linear      1 - t / T            LinearLR(start_factor=1, end_factor=0, total_iters=T)
where t = s - W and T = S - W. The right column names the class of torch.optim.lr_scheduler with the
same closed form, advanced once a step; SequentialLR(milestones=[W]) joins the two parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UsageError

KINDS = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class Schedule:
    """kind: one of KINDS; steps: S, where the kind needs it; warmup: W."""

    kind: str = "constant"
    steps: int = 0
    warmup: int = 0

    @property
    def is_constant(self) -> bool:
        """True where every factor is 1."""
        return self.kind == "constant" and self.warmup == 0

    def factor(self, step: int) -> float:
        """The factor of the learning rate in this step, counted from 0 over the whole run."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done

    def factors(self, first: int, count: int) -> Tensor:
        """(count,) fp64 on the CPU: the factors of the steps from `first` on."""
        return torch.tensor(
            [self.factor(step) for step in range(first, first + count)], dtype=torch.float64
        )


def schedule_of(config, steps_per_epoch: int | None) -> Schedule:
    """The schedule of a config whose epochs are known; steps_per_epoch is None for a loader without
    a length."""
    if config.lr_schedule == "constant" and config.warmup_epochs == 0:
        return Schedule()
    if config.warmup_epochs > config.epochs:
        raise UsageError(
            f"--warmup-epochs must be at most the {config.epochs} epochs of the run, got "
            f"{config.warmup_epochs:g}"
        )
    if steps_per_epoch is None:
        raise UsageError(
            "--lr-schedule and --warmup-epochs need to know the steps of an epoch; give fit a "
            "loader that has a length"
        )
    warmup = round(config.warmup_epochs * steps_per_epoch)
    return Schedule(config.lr_schedule, config.epochs * steps_per_epoch, warmup)
