"""fit_table: a DataFrame to a network that predicts DataFrames, without test rows and without a
run folder. What the estimators for tables are made of."""

from dataclasses import replace
from pathlib import Path

import torch

from . import build, ensemble
from .config import FRAME, TrainConfig, checked
from .console import Quiet
from .data.defaults import resolved
from .data.frame_data import read_table
from .data.scaling import Scaling
from .data.types import prepared, with_validation
from .data.weights import check_weights
from .inference import Trained
from .loop import fit
from .process import pick_device
from .run_state import describe_run


def fit_table(
    frame,
    config: TrainConfig | None = None,
    *,
    weights: torch.Tensor | None = None,
    progress: Quiet | None = None,
) -> Trained:
    """Train on all rows of a DataFrame; settings that the config leaves out are those of
    `fusedmlp train`, the preset too.

    config   config.target names the column to predict, by default the last one
    weights  (n,) of the rows that have a target, in the loss
    returns  a Trained, whose `predict` takes DataFrames; its config has all settings filled in
    raises   UsageError, TrainError, TypeError, as `run`
    """
    config = checked("fit_table", (config or TrainConfig()).replace(dataset=FRAME), None)
    data = read_table(
        frame,
        config.target,
        config.loss,
        leave_out=config.leave_out,
        weight_column=config.weight_column,
    )
    if weights is not None:
        check_weights(weights, len(data.x_train))
        data = replace(data, weights=weights)
    config, progress = resolved(config, data, several=True), progress or Quiet()
    data = prepared(with_validation(data, config.val_split), config.standardize)
    if config.networks > 1:
        model = ensemble.fit(config, data.to(pick_device(config)), progress).model
    else:
        model = fit(build.build_network(config, data), data, config, progress=progress).model
    about = describe_run(model, data)
    of_target = data.target_scaling or Scaling()
    return Trained(
        Path("the network"), model.eval(), config, about, Scaling(), of_target, data.preparation
    )
