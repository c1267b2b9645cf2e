"""Training: `fit` for any model and data, `run` for the main job of the command line.

result = fusedmlp.train.fit(model, (x, y, x_test, y_test), fusedmlp.train.TrainConfig(epochs=5))
"""

from .build import evaluate, predict
from .config import RunOptions, TrainConfig
from .crossvalidation import CrossvalResult, crossval
from .data.datasets import load as load_data
from .data.types import Data, Scaling
from .errors import TrainError, UsageError
from .in_memory import fit_table
from .inference import Trained, load
from .loop import Result, explain, fit, run
from .many import Member, fit_many, reasons_against_many

__all__ = [
    "CrossvalResult",
    "Data",
    "Member",
    "Result",
    "RunOptions",
    "Scaling",
    "Trained",
    "TrainConfig",
    "TrainError",
    "UsageError",
    "crossval",
    "evaluate",
    "explain",
    "fit",
    "fit_many",
    "fit_table",
    "load",
    "load_data",
    "predict",
    "reasons_against_many",
    "run",
]
