"""solver="lbfgs": scikit-learn's objective over all rows, minimised by SciPy."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize

# Private by name; it words the warning of scikit-learn's own estimators.
from sklearn.utils.optimize import _check_optimize_result
from torch import Tensor

from ..train.losses import row_losses
from .direct import Passes
from .loop import LOSSES, Problem
from .weights import ROWS, Weights, network, read, rows_of, tensor


class Objective:
    """The mean loss of all rows with its penalty, alpha / (2 n) times the sum of squared weights,
    and its gradient; with row weights, n is their sum. Rows are computed in blocks.

    dtype    of the computation: fp64, or fp32 with backend 'native'
    """

    def __init__(
        self,
        weights: Weights,
        activation: str,
        problem: Problem,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
    ):
        self.problem, self.device, self.dtype = problem, device, dtype
        self.kind = LOSSES[problem.out_activation]
        hidden = len(weights.coefs) - 1
        self.net = network(weights, activation, [0.0] * hidden, device, dtype)
        self.passes = Passes(self.net, self.kind, backend)
        labels = problem.out_activation == "softmax"
        self.y = tensor(problem.y, device, torch.int64 if labels else dtype)
        # Dense rows stay on the device, sparse ones are made dense block by block.
        self.x = None if hasattr(problem.x, "toarray") else self._dense(slice(None))
        given = problem.weights
        self.row_weights = None if given is None else tensor(given, device, dtype)
        self.total = float(len(self.y) if given is None else given.sum())

    def _dense(self, rows: slice) -> Tensor:
        return rows_of(self.problem.x, rows, self.device, self.dtype)

    @torch.no_grad()
    def __call__(self, vector: np.ndarray) -> tuple[float, np.ndarray]:
        flat, count, alpha = self.passes.flat, self.passes.weights, self.problem.alpha
        flat.copy_(torch.from_numpy(vector))
        loss, gradient = 0.0, torch.zeros(len(vector), dtype=torch.float64, device=self.device)
        for start in range(0, len(self.y), ROWS):
            rows = slice(start, start + ROWS)
            x = self._dense(rows) if self.x is None else self.x[rows]
            y = self.y[rows]
            weights = None if self.row_weights is None else self.row_weights[rows]
            z, part = self.passes(x, y, weights)
            each = row_losses(self.kind, z, y).double()
            share = float(len(y) if weights is None else weights.sum()) / self.total
            loss += float((each if weights is None else each * weights).sum()) / self.total
            gradient.add_(part, alpha=share)
        # All of it per output of the network, as the gradients of scikit-learn are.
        loss, gradient = loss / self.problem.unit(), gradient / self.problem.unit()
        decay, w = alpha / self.total, flat[:count].double()
        loss += 0.5 * decay * float(w @ w)
        gradient[:count] += decay * w
        return loss, gradient.cpu().numpy()

    def of_one_output(self, loss: float, vector: np.ndarray) -> float:
        """scikit-learn's loss_: of the squared error the mean over outputs, not their sum."""
        if self.problem.out_activation != "identity":
            return loss
        w = vector[: self.passes.weights]
        penalty = 0.5 * self.problem.alpha / self.total * float(w @ w)
        return (loss - penalty) / self.problem.y.shape[1] + penalty


def fit(objective: Objective, settings) -> tuple[Weights, float, int]:
    """(weights, loss, iterations) of the minimum that is found from the objective's weights on.

    settings  the estimator: max_iter, max_fun, tol, verbose
    warns     ConvergenceWarning where it stops before the gradient is as small as tol
    """
    number = 0

    def say(intermediate_result: OptimizeResult) -> None:
        nonlocal number
        number += 1
        print(f"Iteration {number}, loss = {intermediate_result.fun:.8f}")

    found = minimize(
        objective,
        objective.passes.flat.double().cpu().numpy(),
        method="L-BFGS-B",
        jac=True,
        options={"maxfun": settings.max_fun, "maxiter": settings.max_iter, "gtol": settings.tol},
        callback=say if settings.verbose else None,
    )
    iterations = _check_optimize_result("lbfgs", found, settings.max_iter)
    objective.passes.flat.copy_(torch.from_numpy(found.x))
    return read(objective.net), objective.of_one_output(float(found.fun), found.x), iterations
