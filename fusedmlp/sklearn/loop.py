"""The loop of the estimators: epochs of steps with scikit-learn's objective, schedule and updates.

A batch of B rows costs mean(loss) + alpha / (2 B) * sum of squared weights (no intercepts, no
slopes), so its gradient has alpha / B * w: scikit-learn's _compute_loss_grad divides the sum of
the rows' gradients and alpha * w alike by B, and by the sum of the weights where rows have some.
That is the weight_decay of torch.optim.Adam and SGD, set anew for a batch of another size.

Two ways, the fastest that can: `native`, an epoch in one call of C++ (two where its last batch is
smaller), and `autograd`, step by step.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import context, functional
from ..nn import FusedMLP
from ..train.engines.native import Native
from ..train.optim import EpsilonHatAdam
from ..train.task import Task
from .weights import Weights, network, read, rows_of, tensor, trained

_NATIVE_LOSS = {"softmax": "cross_entropy", "logistic": "logistic", "identity": "mse"}


@dataclass
class Problem:
    """Rows to train on: x (n, features), an array or a csr matrix; y (n,) int64 for softmax, else
    (n, outputs); weights (n,) or None."""

    x: Any
    y: np.ndarray
    weights: np.ndarray | None
    out_activation: str  # softmax, logistic, identity, exp
    alpha: float

    def unit(self) -> float:
        """The loss that is differentiated here, over scikit-learn's. Half the squared error summed
        over k outputs is theirs (their loss_ is a mean over them), the mean over k is ours."""
        return 2.0 / self.y.shape[1] if self.out_activation == "identity" else 1.0


def make_optimizer(settings, problem: Problem, weights: list, rest: list) -> torch.optim.Optimizer:
    """Adam or SGD with scikit-learn's settings. The unit of the loss changes nothing in Adam but
    epsilon."""
    groups = [{"params": weights}, {"params": rest}]
    unit = problem.unit()
    if settings.solver == "adam":
        return EpsilonHatAdam(
            groups,
            lr=settings.learning_rate_init,
            betas=(settings.beta_1, settings.beta_2),
            eps=settings.epsilon * unit,
            fused=True,
        )
    return torch.optim.SGD(
        groups,
        lr=settings.learning_rate_init / unit,
        momentum=float(settings.momentum),
        nesterov=bool(settings.nesterovs_momentum and settings.momentum > 0),
        fused=True,
    )


def make(
    weights: Weights,
    activation: str,
    dropout: list[float],
    problem: Problem,
    settings,
    device: torch.device,
    batch: int,
    seed: int,
    state: dict | None,
) -> "Loop":
    """The Loop for copies of these weights.

    settings  the estimator
    batch     rows of a step
    seed      of the dropout masks
    state     of an earlier Loop that this one goes on from, or None
    raises    ValueError where engine 'native' was asked for and cannot run this
    """
    # As in scikit-learn fp64 rows are computed in fp64, where backends can and it costs little.
    wide = device.type == "cpu" and settings.backend in ("auto", "reference")
    dtype = torch.float64 if wide and problem.x.dtype == np.float64 else torch.float32
    # One step an epoch takes no time worth saving at the price of fp64's digits.
    small = dtype == torch.float64 and len(problem.y) <= batch
    if settings.engine == "native" or (settings.engine == "auto" and not small):
        net = network(weights, activation, dropout, device, torch.float32)
        loop = Loop(net, problem, settings, device, seed, state)
        if loop.engine is not None:
            return loop
    net = network(weights, activation, dropout, device, dtype)
    return Loop(net, problem, settings, device, seed, state, only_autograd=True)


class Loop:
    """One network in training; `make` makes it."""

    def __init__(
        self,
        net: FusedMLP,
        problem: Problem,
        settings,
        device: torch.device,
        seed: int,
        state: dict | None,
        only_autograd: bool = False,
    ):
        self.net = net.train()
        self.problem, self.settings, self.device = problem, settings, device
        dtype = self.dtype = next(net.parameters()).dtype
        is_sparse = hasattr(problem.x, "toarray")
        self.x = None if is_sparse else rows_of(problem.x, slice(None), device, dtype)
        labels = problem.out_activation == "softmax"
        self.y = tensor(problem.y, device, torch.int64 if labels else dtype)
        given = problem.weights
        self.row_weights = None if given is None else tensor(given, device, dtype)
        self.unit = problem.unit()
        self.learning_rate = settings.learning_rate_init
        self.number = 0
        self.weights, rest = trained(net)
        self.optimizer = make_optimizer(settings, problem, self.weights, rest)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.number, self.learning_rate = state["number"], state["learning_rate"]
        self.layers = net.layer_count()
        self.masks = torch.tensor([seed, 0], dtype=torch.int64, device=self.device)
        named = None if settings.backend == "auto" else settings.backend
        self.named = named or context.now().backend
        self.run_with = context.Settings(self.named, (functional.dropout_state(self.masks),))
        self.engine = None if only_autograd else self._choose(seed)
        self.way = "autograd" if self.engine is None else "native"

    def _choose(self, seed: int) -> Native | None:
        """The C++ engine, or None where it cannot run this."""
        settings, problem = self.settings, self.problem
        refusals = []
        if self.named not in (None, "native"):
            refusals.append(f"backend {self.named!r} was asked for")
        if problem.weights is not None:
            refusals.append("rows have weights")
        if problem.out_activation not in _NATIVE_LOSS:
            refusals.append(f"it has no loss for {problem.out_activation} outputs")
        if self.x is None:
            refusals.append("rows are sparse")
        if not refusals:
            loss = _NATIVE_LOSS[problem.out_activation]
            task = Task(self.net, self.optimizer, loss, self.device, self.x, self.y, seed=seed)
            refusals = Native.reasons_against(task)
            if not refusals:
                engine = Native(task)
                engine.set_step(self.number)
                return engine
        if settings.engine == "native":
            raise ValueError(
                f"{type(settings).__name__}: engine 'native' was asked for but cannot be used: "
                + "; ".join(refusals)
            )
        return None

    def read(self) -> Weights:
        """Copies of the weights as they are now."""
        return read(self.net)

    def state(self) -> dict:
        """What a later Loop needs to go on, on the CPU."""
        found = self.optimizer.state_dict()
        found["state"] = {
            number: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in of.items()}
            for number, of in found["state"].items()
        }
        return {
            "optimizer": found,
            "number": self.number,
            "learning_rate": self.learning_rate,
        }

    def set_learning_rate(self, rate: float) -> None:
        """scikit-learn's velocity has the rate inside, PyTorch's momentum buffer has not."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                buffer = self.optimizer.state[p].get("momentum_buffer")
                if buffer is not None:
                    buffer.mul_(self.learning_rate / rate)
            group["lr"] = rate / self.unit
        self.learning_rate = rate

    def epoch(self, order: Tensor, batch: int) -> float:
        """One step for each `batch` of the rows in this order (n,) int64; returns the mean loss,
        with the penalty of the weights taken halfway between start and end."""
        before = self._squared_norm()
        batches = list(order.split(batch))
        sums = [len(b) if self.row_weights is None else self._sum(b) for b in batches]
        # The mean over the rows of 1 / (sum of the weights of their batch).
        per_row = sum(len(b) / s for b, s in zip(batches, sums, strict=True) if s) / len(order)
        if self.engine is not None:
            loss = self._whole(order, batch)
        else:
            loss = torch.zeros((), dtype=torch.float64, device=self.device)
            for rows, total in zip(batches, sums, strict=True):
                if total > 0:  # rows without weight say nothing, and their mean is 0 / 0
                    self._decay(total)
                    self._step(rows, loss)
                    self.number += 1
            loss = float(loss) / len(order)
        if self.problem.out_activation == "identity":
            loss *= 0.5  # scikit-learn's is half the squared error
        norm = (before + self._squared_norm()) / 2
        return loss + 0.5 * self.problem.alpha * norm * per_row

    def _sum(self, rows: Tensor) -> float:
        return float(self.row_weights[rows].sum())

    def _squared_norm(self) -> float:
        return float(sum(w.detach().square().sum() for w in self.weights))

    def _decay(self, total: float) -> None:
        self.optimizer.param_groups[0]["weight_decay"] = self.unit * self.problem.alpha / total

    def _whole(self, order: Tensor, batch: int) -> float:
        full = len(order) // batch * batch
        for part in (order[:full], order[full:]):
            if len(part):
                self._decay(min(batch, len(part)))
                self.engine.steps(part, min(batch, len(part)))
        self.number = self.engine.number
        return self.engine.read()[0] / len(order)

    def _step(self, rows: Tensor, loss: Tensor) -> None:
        if self.x is None:
            x = rows_of(self.problem.x, rows.numpy(), self.device, self.dtype)
        else:
            x = self.x.index_select(0, rows.to(self.device))
        rows = rows.to(self.device)
        y = self.y.index_select(0, rows)
        weights = None if self.row_weights is None else self.row_weights.index_select(0, rows)
        self.masks[1:].fill_(self.number * self.layers)
        outputs = self.net(x, self.run_with)
        value = loss_of(self.problem.out_activation, outputs, y, weights)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()
        loss += value.detach().double() * len(rows)


def loss_of(out_activation: str, z: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over rows, weighted where they have weights, of scikit-learn's loss (squared error:
    twice theirs), from outputs z (B, k) before the output activation."""
    if weights is None and out_activation in ("softmax", "identity"):
        return F.cross_entropy(z, y) if out_activation == "softmax" else F.mse_loss(z, y)
    if out_activation == "softmax":
        losses = F.cross_entropy(z, y, reduction="none")
    elif out_activation == "logistic":
        losses = F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)
    elif out_activation == "identity":
        losses = F.mse_loss(z, y, reduction="none").mean(1)
    else:  # Poisson deviance, half of it: y log(y / mean) - y + mean, with mean = exp(z)
        losses = (torch.xlogy(y, y) - y * z - y + z.exp()).sum(1)
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()
