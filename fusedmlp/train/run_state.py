"""Run and Result: what the training loop works on, how it continues from a checkpoint, and the
results that it writes at its end."""

import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import compat
from ..backends import choice
from ..nn import FusedMLP
from ..spec import activations
from . import plots
from .best import Best, best_epoch
from .build import dims_of, predict, regression, shape_of
from .config import RunOptions, TrainConfig, flag_name
from .console import Quiet
from .data.loaders import Loaders
from .data.types import Data
from .errors import TrainError, UsageError
from .process import StopRequest, World
from .run_folder import RunFolder, check_same_model, load_checkpoint, model_bytes, save_checkpoint
from .task import Task

# Settings that may differ between a run and its continuation; others would make it another run.
MAY_CHANGE = ("epochs", "time_limit", "data_dir", "device", "backend", "engine", "tune")


@dataclass
class Result:
    """model is the one given to fit, trained in place; history has one dict an epoch. With
    `keep="best"` the model has the weights of the epoch summary["kept_epoch"]."""

    model: nn.Module
    history: list[dict]
    config: TrainConfig
    interrupted: bool = False
    folder: Path | None = None
    paths: dict[str, Path] = field(default_factory=dict)
    summary: dict = field(default_factory=dict)


@dataclass
class Position:
    """How far a run is; loss, right, rows and seconds are sums over the present epoch."""

    epoch: int = 0  # epochs that are done
    step: int = 0  # steps of this epoch that are done
    global_step: int = 0
    loss: float = 0.0
    right: float = 0.0
    rows: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    total_rows: int = 0

    def advance(self, steps: int, loss: float, right: float, rows: int, seconds: float) -> None:
        self.step += steps
        self.global_step += steps
        self.loss += loss
        self.right += right
        self.rows += rows
        self.total_rows += rows
        self.seconds += seconds
        self.total_seconds += seconds

    def next_epoch(self) -> None:
        self.epoch += 1
        self.step, self.loss, self.right, self.rows, self.seconds = 0, 0.0, 0.0, 0, 0.0


@dataclass
class Run:
    """What the loop works on."""

    config: TrainConfig
    options: RunOptions | None  # None: nothing is written
    world: World
    task: Task
    engine: object
    data: Data | Loaders
    progress: Quiet
    stop: StopRequest
    about: dict  # what evaluate and predict need later
    folder: RunFolder | None = None
    best: Best | None = None  # None: the weights of the last epoch are kept
    history: list[dict] = field(default_factory=list)
    position: Position = field(default_factory=Position)
    saved_at: float = -math.inf
    saved_step: int = -1
    chunk: int = 1  # steps between two reads of the losses
    halted: bool = False  # all processes have agreed to stop
    timed_out: bool = False  # and because of the time limit
    clock: tuple[float, float] | None = None  # when the first epoch began, and when the last one

    def check_time(self) -> None:
        """Before an epoch: whether it still fits into the time limit, taken to be as long as the
        last one. The first always does."""
        if self.config.time_limit is None:
            return
        now = time.monotonic()
        began, last = self.clock or (now, now)
        late = self.clock is not None and 2 * now - last - began > self.config.time_limit
        self.clock = began, now
        self.timed_out = bool(self.world.max(int(late))[0])

    @property
    def is_over(self) -> bool:
        """Whether it ends early, with no better epoch in sight."""
        return self.best is not None and self.best.is_over(self.position.epoch)


def _check_same_run(config: TrainConfig, saved: TrainConfig) -> None:
    """Raise UsageError where the continuation asks for something that only a new run can have."""
    asked, was = config.to_dict(), saved.to_dict()
    for name, value in asked.items():
        if name not in MAY_CHANGE and value != was[name]:
            raise UsageError(
                f"--resume: {flag_name(name)} must stay {was[name]} as in the run, got "
                f"{value}; leave it out, or start a new run"
            )


def check_continuation(
    config: TrainConfig, data: Data | Loaders, folder: Path, saved: dict
) -> None:
    """Raise UsageError where the run in this folder cannot go on as the config says."""
    was = TrainConfig.from_dict(saved["config"])
    _check_same_run(config, was)
    if was.lr_schedule != "constant" and config.epochs != was.epochs:
        raise UsageError(
            f"--resume: --epochs must stay {was.epochs} as in the run, got {config.epochs}: its "
            f"--lr-schedule {was.lr_schedule} ends there"
        )
    done = saved["position"]["epoch"]
    is_over = was.patience is not None and done - best_epoch(saved["history"]) >= was.patience
    # A run that was cut off before its end, or lacks a picture, gets what is missing now.
    pictures = plots.run_pictures([], _held_out(data), lambda rows: rows)
    has_all = _told_epochs(folder) == done and all((folder / name).exists() for name in pictures)
    if config.epochs < done or ((config.epochs == done or is_over) and has_all):
        way_on = f"--epochs above {done} goes on from there"
        if is_over:
            way_on = f"none of the last {was.patience} was better, which is its --patience"
        if was.lr_schedule != "constant":
            way_on = f"its --lr-schedule {was.lr_schedule} has ended"
        raise UsageError(f"--resume: {folder} has done its {done} epochs; {way_on}")


def _told_epochs(folder: Path) -> int | None:
    """The epochs of the results in a folder, which may be those of the run before it went on."""
    try:
        return json.loads((folder / "summary.json").read_text(encoding="utf-8"))["epochs"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def restore(run: Run, saved: dict) -> None:
    where = f"{run.options.resume}/checkpoint.pt"
    check_same_model(run.task.model, saved["model"], where)
    was, now = saved["about"]["data"].get("digest"), run.about["data"].get("digest")
    if was != now:
        raise TrainError(
            f"--resume: the data must be those of the run in {run.options.resume}, got other "
            "training rows"
        )
    run.task.model.load_state_dict(saved["model"])
    compat.load_optimizer_state_dict(run.task.optimizer, saved["optimizer"])
    run.engine.load_scaler_state(saved["scaler"])
    run.history[:] = saved["history"]
    run.position = Position(**saved["position"])
    if run.best is not None:
        run.best = Best(run.best.patience, **saved["best"])


def set_rng(run: Run, rng: dict[str, Tensor]) -> None:
    torch.set_rng_state(rng["cpu"])
    if run.task.device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], run.task.device)


def save(run: Run) -> None:
    """Write the checkpoint, then the metrics (resuming writes those again); rank 0 does it."""
    if run.folder is None:
        return
    run.engine.sync()
    if not all(bool(torch.isfinite(p).all()) for p in run.task.model.parameters()):
        check_loss(run, math.nan)
    rng = {"cpu": torch.get_rng_state()}
    if run.task.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(run.task.device)
    content = {
        "config": run.config.to_dict(),
        "about": run.about,
        "model": run.task.model.state_dict(),
        "optimizer": compat.optimizer_state_dict(run.task.optimizer),
        "scaler": run.engine.scaler_state(),
        "position": asdict(run.position),
        "history": run.history,
        "best": None if run.best is None else run.best.to_dict(),
        "rng": rng,
        "torch": str(torch.__version__),
    }

    def write():
        save_checkpoint(run.folder.file("checkpoint.pt"), content)
        run.folder.write_metrics(run.history)

    run.world.run_on_lead(write)
    run.saved_at, run.saved_step = time.monotonic(), run.position.global_step


def what_is_kept(run: Run) -> str:
    """The end of a message: which checkpoint is on the disk to continue from."""
    folder = run.folder.path
    try:
        position = Position(**load_checkpoint(folder)["position"])
    except TrainError:
        return "there is no checkpoint yet, so the run has to be started anew"
    place = f"epoch {position.epoch}" + (f", step {position.step}" if position.step else "")
    return f"its checkpoint of {place} is kept: go on with --resume {folder}"


def about_time(run: Run) -> str:
    """What is said of a run that its time limit has ended."""
    way_on = f"; go on with --resume {run.folder.path}" if run.folder is not None else ""
    return (
        f"--time-limit {run.config.time_limit:g}: stopped after {run.position.epoch} of "
        f"{run.config.epochs} epochs, since another would not fit{way_on}"
    )


def check_loss(run: Run, loss: float) -> None:
    if math.isfinite(loss):
        return
    kept = ""
    if run.folder is not None and run.saved_step >= 0:
        kept = f"; the last good checkpoint, of step {run.saved_step}, is in {run.folder.path}"
    rate = run.config.learning_rate(run.task.loss)
    other = "" if run.config.standardize else ", or --standardize"
    raise TrainError(
        f"the loss is no longer finite in epoch {run.position.epoch + 1}, by step "
        f"{run.position.global_step}; take a smaller --lr than {rate:g}{other}{kept}"
    )


def describe_run(model: nn.Module, data) -> dict:
    """{"model": ..., "data": ...} in plain values, which checkpoint.pt and model.safetensors
    hold."""
    about = {"kind": type(model).__name__, "dims": dims_of(model)}
    # The layers are asked, not the config: fit may have been given any network.
    about |= (shape_of(model) if type(model) is FusedMLP else None) or {}
    return {
        "model": about,
        "data": data.describe() if isinstance(data, Data) else {"name": data.name},
    }


def summary(run: Run) -> dict:
    config, history, position = run.config, run.history, run.position
    kept = position.epoch if run.best is None else run.best.epoch
    last = history[kept - 1] if history else {}
    about = run.about["model"]
    content = {
        "dataset": run.data.name,
        "dims": about["dims"],
        "activation": about.get("activation"),
        "dropout": about.get("dropout"),
        "epochs": position.epoch,
        "kept_epoch": kept,
        "seed": config.seed,
        "test_accuracy": last.get("test_accuracy"),
        "test_loss": last.get("test_loss"),
        "train_loss": last.get("train_loss"),
        "train_accuracy": last.get("train_accuracy"),
        "val_accuracy": last.get("val_accuracy"),
        "val_loss": last.get("val_loss"),
        "train_seconds": round(position.total_seconds, 4),
        "samples_per_second": round(position.total_rows / position.total_seconds, 1)
        if position.total_seconds
        else None,
        "batch_size": config.batch_size if run.task.x is not None else None,  # a loader decides
        "optimizer": config.optimizer,
        "lr": config.lr,
        "standardize": config.standardize,
        "precision": config.precision,
        "backend": _backend(run),
        "engine": run.engine.name,
        "device": _device_name(run.task.device),
        "threads": torch.get_num_threads(),
        "processes": run.world.size,
        "torch": str(torch.__version__),
    }
    return content | _regression(run)


def _regression(run: Run) -> dict:
    """{"test_rmse", "test_r2"}; empty for classes, for a loader and without test rows."""
    if not isinstance(run.data, Data) or run.data.is_classes or run.data.x_test is None:
        return {}
    outputs = predict(run.task.model, run.data.x_test, run.task.scaling, run.task.precision)
    return regression(outputs, run.data)


def _backend(run: Run) -> str:
    """The backend of the first hidden layer; `eager` where PyTorch's own kernels are the fastest
    known. The native engine has no other than its own kernels."""
    if run.engine.name == "native":
        return "native"
    dims = run.about["model"]["dims"]
    name = run.about["model"].get("activation")
    if len(dims) < 2 or name is None:
        return "eager"
    if run.config.backend != "auto":
        return run.config.backend
    if run.engine.name == "graph":
        return run.engine.calls.backend(run.config.batch_size)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        run.config.precision, run.task.scaling.dtype
    )
    dropout = any(run.about["model"]["dropout"])
    act = activations.IDS[name]
    return choice.select(
        "linear_act",
        run.task.device.type,
        dtype,
        act,
        dropout,
        run.config.batch_size,
        dims[0],
        dims[1],
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


def write_results(run: Run, content: dict) -> None:
    """Write the results, the summary last: a folder that has one is complete, but for pictures.
    Those of before, where the run has gone on, are not of these results."""
    folder = run.folder
    folder.write_config(run.config)
    folder.write_metrics(run.history)
    folder.write("model.safetensors", model_bytes(run.task.model, run.about))
    folder.remove_pictures()
    folder.write_json("summary.json", content)


def draw_results(run: Run) -> None:
    """Write the pictures of a run whose results are written, and the importance of its columns."""
    task = run.task

    def outputs(rows: Tensor) -> Tensor:
        return predict(task.model, rows, task.scaling, task.precision).cpu()

    pictures = plots.run_pictures(run.history, _held_out(run.data), outputs)
    run.folder.write_pictures(pictures, run.progress.warn)


def _held_out(data: Data | Loaders) -> Data | None:
    """The data with test rows, for which the validation rows stand in; None without either."""
    if not isinstance(data, Data) or data.x_test is not None:
        return data if isinstance(data, Data) else None
    if data.x_val is None:
        return None
    name = f"{data.name}, validation rows"
    return replace(data, name=name, x_test=data.x_val, y_test=data.y_val)
