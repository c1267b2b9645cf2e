"""The base of both estimators: fit, partial_fit, early stopping and prediction.

Steps and random draws come in the order of scikit-learn's MLP, so that the same random_state gives
the same start and the same batches.
"""

import math
import warnings

import numpy as np
import torch
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, shuffle

# Private by name; estimators outside scikit-learn use them, as there is no public one.
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from ..backends import registry
from ..train.config import TrainConfig
from ..train.process import pick_device
from . import lbfgs, loop, settings
from .weights import Weights, glorot, outputs

_NOT_FINITE = (
    "Solver produced non-finite parameter weights. The input data may contain large values"
)


def offers_partial_fit(estimator) -> bool:
    """For available_if: lbfgs has no partial_fit, as in scikit-learn."""
    if estimator.solver == "lbfgs":
        raise AttributeError(
            "partial_fit is only available for stochastic optimizers. lbfgs is not stochastic."
        )
    return True


class BaseFusedMLP(BaseEstimator):
    """Not for use by itself. A subclass defines how targets become numbers and back: _validated,
    _out_activation, _targets, _decoded_targets and _score_of."""

    _stratifies = False  # whether held-out rows are drawn by class

    def __init__(
        self,
        hidden_layer_sizes=(100,),
        activation="relu",
        *,
        solver="adam",
        alpha=0.0001,
        batch_size="auto",
        learning_rate="constant",
        learning_rate_init=0.001,
        power_t=0.5,
        max_iter=200,
        shuffle=True,
        random_state=None,
        tol=1e-4,
        verbose=False,
        warm_start=False,
        momentum=0.9,
        nesterovs_momentum=True,
        early_stopping=False,
        validation_fraction=0.1,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        n_iter_no_change=10,
        max_fun=15000,
        dropout=0.0,
        device="auto",
        backend="auto",
        engine="auto",
    ):
        self._keep_arguments(locals())

    def _keep_arguments(self, arguments: dict) -> None:
        """Arguments become attributes of their names, as scikit-learn asks of a constructor."""
        vars(self).update((k, v) for k, v in arguments.items() if k != "self")

    def fit(self, X, y, sample_weight=None):
        """Train from new weights, or with warm_start from those of the last fit.

        X              (n, features) array or sparse matrix
        y              (n,) or (n, outputs)
        sample_weight  (n,) or None
        returns        self
        raises         ValueError for wrong settings or data
        """
        return self._fit(X, y, sample_weight, False)

    def _fit(self, X, y, sample_weight, incremental: bool):
        settings.check(self)
        hidden = settings.hidden_sizes(self)
        dropout = settings.dropouts(self, len(hidden))
        if self.early_stopping and incremental:
            raise ValueError("partial_fit does not support early_stopping=True")
        first = not hasattr(self, "coefs_") or (not self.warm_start and not incremental)
        X, y = self._validated(X, y, incremental, first)
        X = X.tocsr() if sparse.issparse(X) else X
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X)
        random_state = check_random_state(self.random_state)
        self.n_outputs_ = y.shape[1]
        sizes = [X.shape[1], *hidden, self.n_outputs_]
        if first:
            self._start(sizes, random_state)
        elif [len(c) for c in self.coefs_] != sizes[:-1]:
            raise ValueError(
                f"warm_start: layers must be {[len(c) for c in self.coefs_]} wide as before, "
                f"got {sizes[:-1]}"
            )
        # Drawn only where it is used: otherwise batches would differ from scikit-learn's.
        seed = int(random_state.randint(2**31 - 1)) if any(dropout) else 0
        if self.solver == "lbfgs":
            self._minimize(X, y, sample_weight)
        else:
            self._train(X, y, sample_weight, dropout, seed, random_state, incremental)
        if not self._weights().are_finite():
            raise ValueError(f"{_NOT_FINITE} and need to be preprocessed.")
        return self

    def _backend(self) -> str | None:
        return None if self.backend == "auto" else self.backend

    def _outputs(self, weights: Weights, X) -> np.ndarray:
        act = settings.ACTIVATIONS[self.activation]
        return outputs(weights, act, X, self._device(), self._backend())

    def _device(self) -> torch.device:
        return pick_device(TrainConfig(device=self.device))

    def _start(self, sizes: list[int], random_state) -> None:
        self.n_iter_, self.t_ = 0, 0
        self.n_layers_ = len(sizes)
        self.out_activation_ = self._out_activation()
        self._take(glorot(sizes, settings.ACTIVATIONS[self.activation], random_state))
        if self.solver == "lbfgs":
            return
        self.loss_curve_ = []
        self._optimizer = None
        self._no_improvement_count = 0
        self.best_loss_ = None if self.early_stopping else math.inf
        self.validation_scores_ = [] if self.early_stopping else None
        self.best_validation_score_ = -math.inf if self.early_stopping else None

    def _take(self, weights: Weights) -> None:
        self.coefs_, self.intercepts_ = weights.coefs, weights.intercepts
        if self.activation == "prelu":
            self.slopes_ = weights.slopes

    def _weights(self) -> Weights:
        slopes = self.slopes_ if self.activation == "prelu" else []
        return Weights(self.coefs_, self.intercepts_, slopes)

    def _problem(self, X, y, sample_weight) -> loop.Problem:
        alpha = float(self.alpha)
        return loop.Problem(X, self._targets(y), sample_weight, self.out_activation_, alpha)

    def _minimize(self, X, y, sample_weight) -> None:
        """All rows at once, in fp64 unless C++ is asked for."""
        self.engine_ = "native" if "native" in (self.engine, self.backend) else "direct"
        backend, dtype = "reference", torch.float64
        if self.engine_ == "native":
            backend, dtype = registry.require("native", "cpu", torch.float32, "mlp"), torch.float32
        objective = lbfgs.Objective(
            self._weights(),
            settings.ACTIVATIONS[self.activation],
            self._problem(X, y, sample_weight),
            self._device() if self.engine_ == "direct" else torch.device("cpu"),
            dtype,
            backend,
        )
        weights, self.loss_, self.n_iter_ = lbfgs.fit(objective, self)
        self._take(weights.astype(X.dtype))

    def _train(self, X, y, sample_weight, dropout, seed, random_state, incremental) -> None:
        kept, held = self._split(y, random_state)
        rows = slice(None) if kept is None else kept
        count = y[rows].shape[0]
        batch = self._batch_size(count)
        weight = None if sample_weight is None else sample_weight[rows]
        problem = self._problem(X[rows], y[rows], weight)
        running = loop.Loop(
            self._weights(),
            settings.ACTIVATIONS[self.activation],
            dropout,
            problem,
            self,
            self._device(),
            batch,
            seed,
            getattr(self, "_optimizer", None) if incremental else None,
        )
        self.engine_ = running.engine.name
        validation = None
        if held is not None:
            weight = None if sample_weight is None else sample_weight[held]
            validation = X[held], self._decoded_targets(y[held]), weight
        try:
            self._epochs(running, batch, random_state, validation, incremental)
        except KeyboardInterrupt:
            warnings.warn("Training interrupted by user.", stacklevel=2)
        self._optimizer = running.state()
        if held is None or self._best is None:
            self._take(running.read())
        else:
            self._take(self._best)
            del self._best

    def _split(self, y, random_state):
        """(kept, held) row numbers of early stopping, or (None, None)."""
        if not self.early_stopping:
            return None, None
        kept, held = train_test_split(
            np.arange(len(y)),
            random_state=random_state,
            test_size=self.validation_fraction,
            stratify=y if self._stratifies and self.n_outputs_ == 1 else None,
        )
        if len(held) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of "
                "your dataset."
            )
        return kept, held

    def _batch_size(self, rows: int) -> int:
        if self.batch_size == "auto":
            return min(200, rows)
        if self.batch_size > rows:
            warnings.warn(
                "Got `batch_size` less than 1 or larger than sample size. It is going to be "
                "clipped",
                stacklevel=2,
            )
        return min(int(self.batch_size), rows)

    def _epochs(self, running, batch, random_state, validation, incremental) -> None:
        order = np.arange(running.problem.x.shape[0])
        self._best = None
        self.n_iter_ = 0
        for _ in range(1 if incremental else self.max_iter):
            if self.shuffle:
                order = shuffle(order, random_state=random_state)
            self.loss_ = running.epoch(torch.from_numpy(order), batch)
            self.n_iter_ += 1
            self.t_ += len(order)
            self.loss_curve_.append(self.loss_)
            if self.verbose:
                print(f"Iteration {self.n_iter_}, loss = {self.loss_:.8f}")
            self._count_improvement(running, validation)
            if self.solver == "sgd" and self.learning_rate == "invscaling":
                rate = self.learning_rate_init / (self.t_ + 1) ** self.power_t
                running.set_learning_rate(rate)
            if self._no_improvement_count > self.n_iter_no_change:
                if self._stops(running):
                    return
                self._no_improvement_count = 0
        if not incremental:
            warnings.warn(
                f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the "
                "optimization hasn't converged yet.",
                ConvergenceWarning,
                stacklevel=2,
            )

    def _count_improvement(self, running, validation) -> None:
        """Count epochs without improvement; keep the best weights of early stopping."""
        if validation is None:
            is_better = self.loss_ <= self.best_loss_ - self.tol
            self.best_loss_ = min(self.best_loss_, self.loss_)
        else:
            x, y, weight = validation
            now = running.read()
            z = self._outputs(now, x)
            score = self._score_of(y, z, weight) if np.isfinite(z).all() else math.nan
            self.validation_scores_.append(score)
            if self.verbose:
                print(f"Validation score: {score:f}")
            # A score that is no number is not below the bar either: scikit-learn counts so too.
            is_better = not score < self.best_validation_score_ + self.tol
            if score > self.best_validation_score_:
                self.best_validation_score_, self._best = score, now
        self._no_improvement_count = 0 if is_better else self._no_improvement_count + 1

    def _stops(self, running) -> bool:
        """Whether to stop, as nothing improves any more; adaptive rates are lowered first."""
        what = "Validation score" if self.early_stopping else "Training loss"
        said = (
            f"{what} did not improve more than tol={self.tol:f} for {self.n_iter_no_change} "
            "consecutive epochs."
        )
        adaptive = self.solver == "sgd" and self.learning_rate == "adaptive"
        if adaptive and running.learning_rate > 1e-6:
            running.set_learning_rate(running.learning_rate / 5)
            said += f" Setting learning rate to {running.learning_rate:f}"
        else:
            said += " Learning rate too small. Stopping." if adaptive else " Stopping."
            adaptive = False
        if self.verbose:
            print(said)
        return not adaptive

    def _raw(self, X) -> np.ndarray:
        """(n, outputs) before the output activation."""
        check_is_fitted(self)
        X = self._validated_rows(X)
        return self._outputs(self._weights(), X)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags
