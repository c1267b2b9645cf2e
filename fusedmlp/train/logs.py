"""Where the figures of a run go besides its folder: to TensorBoard, or to any module with wandb's
three verbs init, log and finish. A package is imported when it is asked for."""

import importlib
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from .config import TRACKER_VERBS, RunOptions
from .console import FIGURES, Quiet
from .errors import TrainError, UsageError

PROJECT = "fusedmlp"
TENSORBOARD = ("torch.utils.tensorboard", "tensorboardX")  # the first that is there


def check(options: RunOptions | None) -> None:
    """raises  TrainError where the tracker of --log is not there, UsageError for what is none"""
    if options is not None and options.log is not None:
        _tracker(options.log)


def with_tracker(progress: Quiet, options: RunOptions | None) -> Quiet:
    """The output, or one that tells the tracker of --log what it is told."""
    if options is None or options.log is None:
        return progress
    return _Told(progress, _tracker(options.log), options)


class _Told(Quiet):
    """A tracker that cannot be started ends the run before it begins; one that fails later costs
    its own records only."""

    def __init__(self, output: Quiet, tracker, options: RunOptions):
        self.output, self.tracker = output, tracker
        self.name = options.to_dict()["log"]
        self.note, self.warn, self.steps = output.note, output.warn, output.steps
        self.is_open = False
        self.trained, self.told = output.trained, 0  # the last epoch that the tracker was told of

    def start(self, run) -> None:
        self.output.start(run)
        settings = run.config.to_dict() | {"dims": run.about["model"]["dims"]}
        folder = run.folder.path
        try:
            if isinstance(self.tracker, _TensorBoard):
                self.tracker.open(folder, run.position.epoch)
            self.tracker.init(project=PROJECT, name=folder.name, config=settings)
        except Exception as error:  # whatever it is, it is the tracker's
            raise TrainError(f"--log {self.name} could not be started: {_line(error)}") from error
        self.is_open, self.told = True, run.position.epoch

    def epoch(self, row: dict) -> None:
        self.output.epoch(row)
        self._tell(row)

    def _tell(self, row: dict) -> None:
        self.told = row["epoch"]
        self._log({name: value for name, value in row.items() if name != "epoch"}, row["epoch"])

    def finish(self, result) -> None:
        for row in result.history:  # of several networks, which are trained at once
            if row["epoch"] > self.told:
                self._tell(row)
        last = result.history[-1] if result.history else {}
        if last and not result.interrupted:
            figures = {name: result.summary.get(name) for name in FIGURES if name not in last}
            self._log(figures, last["epoch"])
        self.output.finish(result)

    def close(self) -> None:
        self._try(lambda: self.tracker.finish())
        self.is_open = False
        self.output.close()

    def _log(self, figures: dict, epoch: int) -> None:
        figures = {name: value for name, value in figures.items() if value is not None}
        if figures:
            self._try(lambda: self.tracker.log(figures, step=epoch))

    def _try(self, do) -> None:
        if not self.is_open:
            return
        try:
            do()
        except Exception as error:
            self.is_open = False
            self.warn(f"--log {self.name} failed, and is told no more: {_line(error)}")


class _TensorBoard:
    """The three verbs on event files in the run folder: `tensorboard --logdir runs` shows them."""

    def __init__(self, module):
        self.module, self.writer = module, None

    def open(self, folder: Path, epochs: int) -> None:
        """epochs  that are done; what was written of later ones no longer counts"""
        self.writer = self.module.SummaryWriter(str(folder), purge_step=epochs + 1)

    def init(self, *, project: str, name: str, config: dict) -> None:
        self.writer.add_text("settings", f"```\n{json.dumps(config, indent=2)}\n```")

    def log(self, figures: dict, step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


def _tracker(log):
    """What has init, log and finish, of the option --log."""
    if not isinstance(log, str):
        return log
    if log == "tensorboard":
        for name in TENSORBOARD:
            try:
                return _TensorBoard(importlib.import_module(name))
            except ImportError:
                continue
        raise TrainError(
            "--log tensorboard needs tensorboard or tensorboardX, and neither is installed: pip "
            "install tensorboardX"
        )
    try:
        with _working_folder():
            module = importlib.import_module(log)
    except ModuleNotFoundError as error:
        raise TrainError(
            f"--log {log} needs the package {error.name}, which is not installed: pip install "
            f"{error.name.split('.')[0]}"
        ) from error
    except Exception as error:
        raise TrainError(f"--log {log} cannot be imported: {_line(error)}") from error
    lacks = [verb for verb in TRACKER_VERBS if not callable(getattr(module, verb, None))]
    if lacks:
        raise UsageError(
            f"--log must be tensorboard, wandb, trackio or a module with the functions init, log "
            f"and finish, but {log} has no {lacks[0]}"
        )
    return module


@contextmanager
def _working_folder():
    """A module that lies in the working folder is found, after those that are installed."""
    sys.path.append(os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
