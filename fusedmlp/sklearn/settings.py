"""Checks of the constructor's arguments, which fit makes, as scikit-learn's conventions ask."""

import math
from collections.abc import Iterable
from numbers import Integral, Real

from ..spec import activations

# scikit-learn's names for what this package calls otherwise.
_SKLEARN_NAMES = {"identity": "none", "logistic": "sigmoid"}
ACTIVATIONS = {**{name: name for name in activations.NAMES}, **_SKLEARN_NAMES}
_CHOICES = {
    "activation": tuple(ACTIVATIONS),
    "solver": ("adam", "sgd", "lbfgs"),
    "learning_rate": ("constant", "invscaling", "adaptive"),
    "device": ("auto", "cpu", "cuda"),
    "backend": ("auto", "native", "triton", "reference"),
    "engine": ("auto", "native", "direct", "autograd"),
    "loss": ("log_loss", "squared_error", "poisson"),
}
# name -> (least, most, is the least itself allowed, is the most)
_NUMBERS = {
    "alpha": (0, math.inf, True, False),
    "learning_rate_init": (0, math.inf, False, False),
    "power_t": (0, math.inf, True, False),
    "tol": (0, math.inf, True, False),
    "momentum": (0, 1, True, True),
    "validation_fraction": (0, 1, True, False),
    "beta_1": (0, 1, True, False),
    "beta_2": (0, 1, True, False),
    "epsilon": (0, math.inf, False, False),
}
_COUNTS = ("max_iter", "n_iter_no_change", "max_fun")
_SWITCHES = ("shuffle", "warm_start", "nesterovs_momentum", "early_stopping")


def check(estimator) -> None:
    """Raise ValueError for the first wrong setting."""
    name = type(estimator).__name__
    for key, choices in _CHOICES.items():
        value = getattr(estimator, key)
        if value not in choices:
            raise ValueError(f"{name}: {key} must be one of {', '.join(choices)}, got {value!r}")
    for key, (least, most, with_least, with_most) in _NUMBERS.items():
        value = getattr(estimator, key)
        if (
            not isinstance(value, Real)
            or not (value > least or (with_least and value == least))
            or not (value < most or (with_most and value == most))
        ):
            sides = f"{'[' if with_least else '('}{least}, {most}{']' if with_most else ')'}"
            raise ValueError(f"{name}: {key} must be a number in {sides}, got {value!r}")
    for key in _COUNTS:
        value = getattr(estimator, key)
        if not (_is_count(value) or (key == "n_iter_no_change" and value == math.inf)):
            raise ValueError(f"{name}: {key} must be an integer of at least 1, got {value!r}")
    for key in _SWITCHES:
        if getattr(estimator, key) not in (True, False):
            raise ValueError(f"{name}: {key} must be a bool, got {getattr(estimator, key)!r}")
    if estimator.solver == "lbfgs" and (
        estimator.engine == "autograd" or estimator.backend == "triton"
    ):
        raise ValueError(
            f"{name}: solver 'lbfgs' must have engine auto, native or direct and backend auto, "
            f"native or reference, got {estimator.engine!r} and {estimator.backend!r}"
        )
    if estimator.batch_size != "auto" and not _is_count(estimator.batch_size):
        raise ValueError(
            f"{name}: batch_size must be 'auto' or an integer of at least 1, got "
            f"{estimator.batch_size!r}"
        )


def _is_count(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def hidden_sizes(estimator) -> list[int]:
    """hidden_layer_sizes as a list; one number is one layer."""
    sizes = estimator.hidden_layer_sizes
    sizes = list(sizes) if isinstance(sizes, Iterable) else [sizes]
    if not all(_is_count(size) for size in sizes):
        raise ValueError(f"hidden_layer_sizes must be > 0, got {sizes}.")
    return [int(size) for size in sizes]


def dropouts(estimator, layers: int) -> list[float]:
    """dropout after each hidden layer."""
    given = estimator.dropout
    found = list(given) if isinstance(given, Iterable) else [given] * layers
    if len(found) != layers or not all(isinstance(p, Real) and 0 <= p <= 1 for p in found):
        raise ValueError(
            f"{type(estimator).__name__}: dropout must be a number between 0 and 1, or one for "
            f"each of the {layers} hidden layers, got {given!r}"
        )
    if estimator.solver == "lbfgs" and any(found):
        raise ValueError(
            f"{type(estimator).__name__}: dropout must be 0 with solver 'lbfgs', which needs the "
            f"same loss at each call, got {given!r}; take 'adam' or 'sgd'"
        )
    return [float(p) for p in found]
