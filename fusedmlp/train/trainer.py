"""fit: the one training loop, for the command line and for a user's own model and data.

Leaves as it found them: torch's global generators, the number of threads, precision and backend
settings, signal handlers. Writes only into the run folder, and only on rank 0.
"""

import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint, distributed, finish, source, step
from .config import TrainConfig
from .data import Data, permutation, resolved, seeded
from .distributed import World
from .errors import TrainError, UsageError
from .folder import RunFolder, create
from .model import evaluate, evaluate_batches, optimizer_for
from .progress import Quiet
from .surroundings import StopRequest, pick_device, surroundings

READ_SECONDS = 0.1  # between two reads of the losses; each waits for the device
SAVE_SECONDS = 1.0  # between two checkpoints at the end of short epochs


@dataclass
class Result:
    """model is the one given to fit, trained in place; history has one dict an epoch."""

    model: nn.Module
    history: list[dict]
    config: TrainConfig
    interrupted: bool = False
    folder: Path | None = None
    paths: dict[str, Path] = field(default_factory=dict)
    summary: dict = field(default_factory=dict)


@dataclass
class Position:
    """How far a run is; the sums are those of the epoch under way."""

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
    """All that the loop works on."""

    config: TrainConfig
    world: World
    task: step.Task
    engine: object
    data: Data | source.Loaders
    progress: Quiet
    stop: StopRequest
    about: dict  # what evaluate and predict need later
    folder: RunFolder | None = None
    history: list[dict] = field(default_factory=list)
    position: Position = field(default_factory=Position)
    saved_at: float = -math.inf
    saved_step: int = -1
    halted: bool = False  # all processes have agreed to stop


def fit(
    model: nn.Module, data, config: TrainConfig | None = None, *, progress: Quiet | None = None
) -> Result:
    """Train a model in place; PyTorch's own loop of shuffle, forward, loss, backward, update.

    model    any nn.Module that maps (B, ...) inputs to (B, classes) or the targets' shape
    data     (x, y) or (x, y, x_test, y_test): tensors of n rows, integer classes or float targets; a Data;
             a loader of (x, y) batches, or (loader, test_loader), for data larger than memory
    config   a TrainConfig; its dataset, hidden, activation, dropout and init describe a model
    that you
             have made already and are not read. With `out` (or `resume`) a run folder is written.
    returns  a Result; Ctrl-C ends the loop after the step under way and returns what there is

    uint8 rows are divided by 255. The order of rows, and the masks of a FusedMLP, follow
    config.seed alone.
    """
    return _fit(model, data, config or TrainConfig(), progress or Quiet(), None)


def fit_into_folder(model: nn.Module, data: Data, config: TrainConfig, progress: Quiet) -> Result:
    """fit, with a new numbered folder under runs/ where the config names none."""
    return _fit(model, data, config, progress, Path("runs"))


def _fit(
    model: nn.Module, data, config: TrainConfig, progress: Quiet, parent: Path | None
) -> Result:
    config = config.check()
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError("fit: the model must have parameters that require gradients, got none")
    saved = checkpoint.load(config.resume) if config.resume is not None else None
    given = source.of(data, config)
    config = _resolved(config, given, saved)
    device = pick_device(config)
    world = distributed.current()
    _check_world(config, world, given)
    with surroundings(config, device) as stop:
        run = _prepare(model, given, config, device, world, stop, progress)
        _open(run, saved, parent)
        try:
            _loop(run, saved)
            return _close(run)
        except BaseException:
            if run.folder is not None and world.is_lead:
                run.folder.discard()
            raise
        finally:
            run.progress.close()


def _resolved(config: TrainConfig, data, saved: dict | None) -> TrainConfig:
    if saved is None:
        return resolved(config, data)
    was = checkpoint.config_of(saved)
    config = config.replace(
        epochs=config.epochs or was.epochs, batch_size=config.batch_size or was.batch_size
    )
    checkpoint.check_same_run(config, was)
    done = saved["position"]["epoch"]
    # A run that was cut off while it wrote its pictures has no summary yet, and gets them now.
    if config.epochs < done or (
        config.epochs == done and (config.resume / "summary.json").exists()
    ):
        raise UsageError(
            f"--resume: {config.resume} has done its {done} epochs; --epochs above {done} goes "
            "on from there"
        )
    return config


def _check_world(config: TrainConfig, world: World, data) -> None:
    if world.size == 1:
        return
    if config.batch_size < world.size:
        raise UsageError(
            f"--batch-size must be at least the number of processes, {world.size}, got "
            f"{config.batch_size}"
        )
    if isinstance(data, source.Loaders):
        raise UsageError("fit: a loader works in one process; for several pass tensors")


def _prepare(model, given, config, device, world, stop, progress) -> Run:
    model.to(device)
    data = given
    task = step.Task(model, optimizer_for(model, config), config.loss, device)
    task.precision, task.seed, task.world = config.precision, config.seed, world
    if isinstance(given, Data):
        data = source.on_device(given, model, device)
        task.x, task.y, task.scaling = data.x_train, data.y_train, data.scaling
        task.loss = "cross_entropy" if data.is_classes else "mse"
    else:
        task.scaling, task.loss = source.of_loader(given, model, config)
    torch.manual_seed(_rng_seed(config, world, 0))
    about = finish.describe(model, data, config)
    return Run(config, world, task, step.choose(config.engine, task), data, progress, stop, about)


def _rng_seed(config: TrainConfig, world: World, epoch: int) -> int:
    """For models that draw from torch's generator: other numbers each epoch, and on each
    process."""
    return seeded("model", config.seed, epoch * world.size + world.rank).initial_seed()


def _open(run: Run, saved: dict | None, parent: Path | None) -> None:
    """Make or reopen the run folder; take over what the checkpoint holds."""
    config, world = run.config, run.world
    if saved is not None:
        _restore(run, saved)
        run.folder = RunFolder(Path(config.resume), is_new=False)
    elif config.out is not None or parent is not None:
        finish.need_packages()
        text = finish.config_json(config)
        run.folder = world.lead(lambda: create(config.out, parent, config.overwrite, text))
    run.engine.set_step(run.position.global_step)
    run.progress.start(run)


def _restore(run: Run, saved: dict) -> None:
    where = f"{run.config.resume}/checkpoint.pt"
    checkpoint.check_same_model(run.task.model, saved["model"], where)
    was, now = saved["about"]["data"].get("digest"), run.about["data"].get("digest")
    if was != now:
        raise TrainError(
            f"--resume: the data must be those of the run in {run.config.resume}, got other "
            "training rows"
        )
    run.task.model.load_state_dict(saved["model"])
    run.task.optimizer.load_state_dict(saved["optimizer"])
    run.engine.load_scaler_state(saved["scaler"])
    run.history[:] = saved["history"]
    run.position = Position(**saved["position"])


def _loop(run: Run, saved: dict | None) -> None:
    position = run.position
    if saved is not None and position.step:
        _set_rng(run, saved["rng"])
    while position.epoch < run.config.epochs and not run.halted:
        if position.step == 0:
            torch.manual_seed(_rng_seed(run.config, run.world, position.epoch))
        run.task.model.train()
        done = _train_epoch(run) if isinstance(run.data, Data) else _train_loader(run)
        if not done:
            break
        run.history.append(_row(run))
        position.next_epoch()
        run.progress.epoch(run.history[-1])
        if time.monotonic() - run.saved_at >= SAVE_SECONDS:
            _save(run)
    if run.saved_step != position.global_step:
        _save(run)


def _train_epoch(run: Run) -> bool:
    """Steps to the end of the epoch; False when asked to stop before it."""
    position, batch = run.position, run.config.batch_size
    rows = len(run.task.x)
    order = permutation(run.config.seed, position.epoch, rows).to(run.task.device)
    steps = math.ceil(rows / batch)
    chunk = 1
    while position.step < steps:
        started = time.perf_counter()
        last = min(position.step + chunk, steps)
        run.engine.steps(order[position.step * batch : last * batch], batch)
        loss, right, seen = run.engine.read()
        seconds = time.perf_counter() - started
        position.advance(last - position.step, loss, right, seen, seconds)
        _check_loss(run, loss)
        run.progress.steps(position, steps)
        chunk = (
            chunk * 2
            if seconds < READ_SECONDS / 2
            else max(1, chunk // 2)
            if seconds > READ_SECONDS
            else chunk
        )
        stop, chunk = run.world.most(int(run.stop.asked), chunk)
        run.halted = bool(stop)
        if run.halted and position.step < steps:
            return False
    return True


def _train_loader(run: Run) -> bool:
    """As _train_epoch, for batches that come from an iterable."""
    position, task = run.position, run.task
    skip, read_at = position.step, time.perf_counter()
    pending = 0
    for number, batch in enumerate(run.data.train):
        if number < skip:
            continue  # of a resumed epoch: the loader has to run through what was seen
        inputs, targets = source.batch_on(batch, task)
        run.engine.step_on(inputs, targets)
        pending += 1
        seconds = time.perf_counter() - read_at
        if seconds >= READ_SECONDS or run.stop.asked:
            position.advance(pending, *_read_checked(run), seconds)
            read_at, pending = time.perf_counter(), 0
            run.progress.steps(position, run.data.length)
            run.halted = run.stop.asked
            if run.halted:
                return False
    if pending:
        seconds = time.perf_counter() - read_at
        position.advance(pending, *_read_checked(run), seconds)
    if position.rows == 0:
        raise TrainError("fit: the loader must give at least one batch, got none")
    return True


def _read_checked(run: Run) -> tuple[float, float, int]:
    loss, right, rows = run.engine.read()
    _check_loss(run, loss)
    return loss, right, rows


def _check_loss(run: Run, loss: float) -> None:
    if math.isfinite(loss):
        return
    kept = ""
    if run.folder is not None and run.saved_step >= 0:
        kept = f"; the last good checkpoint, of step {run.saved_step}, is in {run.folder.path}"
    raise TrainError(
        f"the loss is no longer finite in epoch {run.position.epoch + 1}, by step "
        f"{run.position.global_step}; "
        f"take a smaller --lr than {run.config.learning_rate():g}, or --standardize{kept}"
    )


def _row(run: Run) -> dict:
    """Close an epoch: its means, and the held-out rows."""
    position, task = run.position, run.task
    run.engine.sync()
    is_classes = task.loss == "cross_entropy"
    row = {
        "epoch": position.epoch + 1,
        "train_loss": position.loss / position.rows,
        "train_accuracy": position.right / position.rows if is_classes else None,
    }
    for part in ("val", "test"):
        row[f"{part}_loss"], row[f"{part}_accuracy"] = _evaluate(run, part)
    row["seconds"] = position.seconds
    for name, value in row.items():
        # 9 digits: the order of summing differs when a run was interrupted, in the 15th.
        row[name] = float(f"{value:.9g}") if isinstance(value, float) else value
    for part in ("val", "test"):
        if row[f"{part}_loss"] is not None:
            _check_loss(run, row[f"{part}_loss"])
    return row


def _evaluate(run: Run, part: str) -> tuple[float | None, float | None]:
    task, data = run.task, run.data
    if isinstance(data, source.Loaders):
        if part == "val" or data.test is None:
            return None, None
        return evaluate_batches(task, (source.batch_on(b, task) for b in data.test))
    x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
    if x is None:
        return None, None
    return evaluate(
        task.model, x, y, task.scaling, task.loss, precision=task.precision, world=task.world
    )


def _set_rng(run: Run, rng: dict[str, Tensor]) -> None:
    torch.set_rng_state(rng["cpu"])
    if run.task.device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], run.task.device)


def _save(run: Run) -> None:
    """Checkpoint and metrics, of rank 0, in the order in which a crash between them does no
    harm."""
    if run.folder is None:
        return
    run.engine.sync()
    if not all(bool(torch.isfinite(p).all()) for p in run.task.model.parameters()):
        _check_loss(run, math.nan)
    rng = {"cpu": torch.get_rng_state()}
    if run.task.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(run.task.device)
    content = {
        "config": replace(
            run.config, resume=None, out=None, overwrite=False, debug=False
        ).to_dict(),
        "about": run.about,
        "model": run.task.model.state_dict(),
        "optimizer": run.task.optimizer.state_dict(),
        "scaler": run.engine.scaler_state(),
        "position": asdict(run.position),
        "history": run.history,
        "rng": rng,
        "torch": str(torch.__version__),
    }

    def write():
        checkpoint.save(run.folder.file("checkpoint.pt"), content)
        run.folder.write_metrics(run.history)

    run.world.lead(write)
    run.saved_at, run.saved_step = time.monotonic(), run.position.global_step


def _close(run: Run) -> Result:
    interrupted = run.position.epoch < run.config.epochs
    result = Result(run.task.model, run.history, run.config, interrupted)
    result.summary = finish.summary(run)
    if run.folder is not None:
        result.folder = run.folder.path
        if not interrupted:
            run.world.lead(lambda: finish.write(run, result.summary))
        result.paths = run.folder.paths()
    run.progress.finish(result)
    return result
