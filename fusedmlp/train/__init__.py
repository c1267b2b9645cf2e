"""Training: `fit` for any model and data, `run` for the main job of the command line.

result = fusedmlp.train.fit(model, (x, y, x_test, y_test), fusedmlp.train.TrainConfig(epochs=5))
"""

from .config import TrainConfig
from .crossvalidation import CrossvalResult, crossval
from .data import Data, Scaling
from .ensemble import Member, fit_many, refuses_many
from .errors import TrainError, UsageError
from .inference import load
from .job import run
from .model import evaluate, predict
from .trainer import Result, explain, fit

__all__ = [
    "CrossvalResult",
    "Data",
    "Member",
    "Result",
    "Scaling",
    "TrainConfig",
    "TrainError",
    "UsageError",
    "crossval",
    "evaluate",
    "explain",
    "fit",
    "fit_many",
    "load",
    "predict",
    "refuses_many",
    "run",
]
