"""The epochs of the estimators: scikit-learn's objective and schedule on a training engine.

A batch of B rows costs mean(loss) + alpha / (2 B) * sum of squared weights (no intercepts, no
slopes), so its gradient has alpha / B * w: scikit-learn's _compute_loss_grad divides the sum of
the rows' gradients and alpha * w alike by B, and by the sum of the weights where rows have some.
That is the weight_decay of torch.optim.Adam and SGD, set anew for a batch of another size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import compat, context
from ..train.data.scaling import Scaling
from ..train.engines.autograd import Autograd
from ..train.engines.native import Native
from ..train.optim import EpsilonHatAdam
from ..train.task import Task
from .direct import Direct
from .weights import Weights, network, read, rows_of, tensor, trained

# The loss of train/losses.py for each output activation.
LOSSES = {"softmax": "cross_entropy", "logistic": "logistic", "identity": "mse", "exp": "poisson"}


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


@dataclass
class State:
    """What a fit leaves for partial_fit to go on from, beside the weights."""

    optimizer: dict  # a state_dict of torch.optim
    number: int  # of the next step
    learning_rate: float  # as scikit-learn states it


def make_optimizer(settings, problem: Problem, weights: list, rest: list) -> torch.optim.Optimizer:
    """Adam or SGD with scikit-learn's settings. The unit of the loss changes nothing in Adam but
    epsilon."""
    groups = [{"params": weights}, {"params": rest}]
    unit = problem.unit()
    if settings.solver == "adam":
        return compat.make_optimizer(
            EpsilonHatAdam,
            groups,
            lr=settings.learning_rate_init,
            betas=(settings.beta_1, settings.beta_2),
            eps=settings.epsilon * unit,
            fused=True,
        )
    return compat.make_optimizer(
        torch.optim.SGD,
        groups,
        lr=settings.learning_rate_init / unit,
        momentum=float(settings.momentum),
        nesterov=bool(settings.nesterovs_momentum and settings.momentum > 0),
        fused=True,
    )


class Loop:
    """One network in training, from copies of the weights.

    settings  the estimator
    batch     rows of a step
    seed      of the dropout masks
    state     of an earlier Loop that this one goes on from, or None
    raises    ValueError where engine 'native' was asked for and cannot run this
    """

    def __init__(
        self,
        weights: Weights,
        activation: str,
        dropout: list[float],
        problem: Problem,
        settings,
        device: torch.device,
        batch: int,
        seed: int,
        state: State | None,
    ):
        self.problem, self.settings, self.device = problem, settings, device
        self.unit = problem.unit()
        self.is_sparse = hasattr(problem.x, "toarray")
        self.backend = None if settings.backend == "auto" else settings.backend
        self.backend = self.backend or context.now().backend
        on_cpu = device.type == "cpu"
        # fp64 rows are computed in fp64, as in scikit-learn, where backends can at little cost.
        wide = on_cpu and self.backend in (None, "reference")
        dtype = torch.float64 if wide and problem.x.dtype == np.float64 else torch.float32
        direct = on_cpu and self.backend in (None, "reference", "native")
        if settings.engine == "direct" and not direct:
            raise ValueError(
                f"{type(settings).__name__}: engine 'direct' must run on a CPU with backend "
                f"'native' or 'reference', got {device.type} and {self.backend or 'auto'!r}"
            )
        direct = direct and settings.engine != "autograd"
        engine = None
        if settings.engine == "native" or (settings.engine == "auto" and dtype == torch.float32):
            task = self._task(weights, activation, dropout, torch.float32, seed, state)
            reasons = self._reasons_against_native(task)
            if reasons and settings.engine == "native":
                raise ValueError(
                    f"{type(settings).__name__}: engine 'native' was asked for but cannot be used: "
                    + "; ".join(reasons)
                )
            engine = None if reasons else Native(task)
        if engine is None:
            kind = Direct if direct else Autograd
            engine = kind(self._task(weights, activation, dropout, dtype, seed, state))
        self.engine = engine
        self.engine.set_step(0 if state is None else state.number)
        self.learning_rate = settings.learning_rate_init if state is None else state.learning_rate

    def _task(self, weights, activation, dropout, dtype, seed, state) -> Task:
        problem, device = self.problem, self.device
        net = network(weights, activation, dropout, device, dtype).train()
        optimizer = make_optimizer(self.settings, problem, *trained(net))
        if state is not None:
            compat.load_optimizer_state_dict(optimizer, state.optimizer)
        labels = problem.out_activation == "softmax"
        task = Task(net, optimizer, LOSSES[problem.out_activation], device, seed=seed)
        task.scaling, task.backend = Scaling(dtype=dtype), self.backend
        task.x = None if self.is_sparse else rows_of(problem.x, slice(None), device, dtype)
        task.y = tensor(problem.y, device, torch.int64 if labels else dtype)
        if problem.weights is not None:
            task.row_weights = tensor(problem.weights, device, dtype)
        return task

    def _reasons_against_native(self, task: Task) -> list[str]:
        if self.is_sparse:
            return ["rows are sparse"]
        return Native.reasons_against(task)

    def read(self) -> Weights:
        """Copies of the weights as they are now."""
        return read(self.engine.task.model)

    def state(self) -> State:
        """The state from which a later Loop continues, on the CPU."""
        self.engine.sync()
        found = compat.optimizer_state_dict(self.engine.task.optimizer)
        found["state"] = {
            # Clones: a pickle of a view holds all that it is a view of.
            number: {k: v.cpu().clone() if isinstance(v, Tensor) else v for k, v in values.items()}
            for number, values in found["state"].items()
        }
        return State(found, self.engine.number, self.learning_rate)

    def set_learning_rate(self, rate: float) -> None:
        """scikit-learn's velocity has the rate inside, PyTorch's momentum buffer has not."""
        optimizer = self.engine.task.optimizer
        for group in optimizer.param_groups:
            for p in group["params"]:
                buffer = optimizer.state[p].get("momentum_buffer")
                if buffer is not None:
                    buffer.mul_(self.learning_rate / rate)
            group["lr"] = rate / self.unit
        self.learning_rate = rate

    def epoch(self, order: Tensor, batch: int) -> float:
        """One step for each `batch` of the rows in this order (n,) int64; returns the mean loss,
        with the penalty of the weights taken halfway between start and end."""
        task, alpha, before = self.engine.task, self.problem.alpha, self._squared_norm()
        weights = task.row_weights
        # Parts of the order, and what the penalty of their batches is divided by.
        if weights is None:
            full = len(order) // batch * batch
            parts = [(p, min(batch, len(p))) for p in (order[:full], order[full:]) if len(p)]
            per_row = -(-len(order) // batch) / len(order)
        else:
            # A batch without weight says nothing, and its mean would be 0 / 0.
            parts = [(p, float(weights[p].sum())) for p in order.split(batch)]
            parts = [(p, total) for p, total in parts if total > 0]
            per_row = sum(len(p) / total for p, total in parts) / len(order)
        for rows, total in parts:
            task.optimizer.param_groups[0]["weight_decay"] = self.unit * alpha / total
            self._steps(rows, min(batch, len(rows)))
        loss = self.engine.read()[0] / len(order)
        if self.problem.out_activation == "identity":
            loss *= 0.5  # scikit-learn's is half the squared error
        return loss + 0.5 * alpha * (before + self._squared_norm()) / 2 * per_row

    def _steps(self, order: Tensor, batch: int) -> None:
        """One step for each `batch` rows; sparse rows are made dense batch by batch."""
        task = self.engine.task
        if not self.is_sparse:
            self.engine.steps(order.to(self.device), batch)
            return
        for rows in order.split(batch):
            x = rows_of(self.problem.x, rows.numpy(), self.device, task.scaling.dtype)
            rows = rows.to(self.device)
            weights = None if task.row_weights is None else task.row_weights.index_select(0, rows)
            self.engine.step_on(x, task.y.index_select(0, rows), weights=weights)

    def _squared_norm(self) -> float:
        weights, _ = trained(self.engine.task.model)
        return float(sum(w.detach().square().sum() for w in weights))
