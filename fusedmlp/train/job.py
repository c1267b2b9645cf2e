"""run: the main job, from a config to a trained network in a run folder."""

from pathlib import Path

from . import build, distributed
from .config import TrainConfig
from .console import Quiet
from .data import datasets, types
from .loop import Result, fit_into_folder
from .process import pick_device


def run(config: TrainConfig, progress: Quiet | None = None) -> Result:
    """Load the data set, make the network of the config, train it; under torchrun, in all
    processes together."""
    config = with_whole_paths(config.check())
    progress = progress or Quiet()
    world = distributed.join(pick_device(config).type)
    try:
        loaded = None

        def load_first() -> str:
            # Rank 0 before the others: the one download, and the choice of a data set, are for all.
            nonlocal loaded
            loaded = datasets.read(config)
            return loaded.name if config.dataset == "auto" else config.dataset

        config = config.replace(dataset=world.lead(load_first))
        loaded = loaded or datasets.read(config)
        config = types.resolved(config, loaded)
        loaded = types.prepared(loaded, config.standardize)
        if world.is_lead:
            for note in loaded.notes:
                progress.note(note)
        network = build.build(config, loaded)
        return fit_into_folder(network, loaded, config, progress if world.is_lead else Quiet())
    finally:
        if distributed.started_by_torchrun():
            distributed.leave()


def with_whole_paths(config: TrainConfig) -> TrainConfig:
    """So that a run can be resumed and evaluated from another working folder."""
    if config.dataset.lower().endswith((".npz", ".csv")):
        config = config.replace(dataset=str(Path(config.dataset).absolute()))
    if config.data_dir is not None:
        config = config.replace(data_dir=config.data_dir.absolute())
    return config
