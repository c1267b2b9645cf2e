"""Run and Position: what the loop works on, and how it goes to disk and comes back exactly."""

import math
import time
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from . import checkpoint
from .config import TrainConfig
from .console import Quiet
from .data.loaders import Loaders
from .data.types import Data, seeded
from .distributed import World
from .errors import TrainError
from .process import StopRequest
from .run_folder import RunFolder
from .task import Task


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
    task: Task
    engine: object
    data: Data | Loaders
    progress: Quiet
    stop: StopRequest
    about: dict  # what evaluate and predict need later
    folder: RunFolder | None = None
    history: list[dict] = field(default_factory=list)
    position: Position = field(default_factory=Position)
    saved_at: float = -math.inf
    saved_step: int = -1
    chunk: int = 1  # steps between two reads of the losses
    halted: bool = False  # all processes have agreed to stop


def rng_seed(config: TrainConfig, world: World, epoch: int) -> int:
    """For models that draw from torch's generator: another in each epoch, and each process."""
    return seeded("model", config.seed, epoch * world.size + world.rank).initial_seed()


def restore(run: Run, saved: dict) -> None:
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


def set_rng(run: Run, rng: dict[str, Tensor]) -> None:
    torch.set_rng_state(rng["cpu"])
    if run.task.device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], run.task.device)


def save(run: Run) -> None:
    """Checkpoint, then metrics (resuming writes those again), by rank 0."""
    if run.folder is None:
        return
    run.engine.sync()
    if not all(bool(torch.isfinite(p).all()) for p in run.task.model.parameters()):
        check_loss(run, math.nan)
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


def kept(run: Run) -> str:
    """What there is on the disk to go on from, as the end of a message."""
    folder = run.folder.path
    try:
        position = Position(**checkpoint.load(folder)["position"])
    except TrainError:
        return "there is no checkpoint yet, so the run has to be started anew"
    place = f"epoch {position.epoch}" + (f", step {position.step}" if position.step else "")
    return f"its checkpoint of {place} is kept: go on with --resume {folder}"


def check_loss(run: Run, loss: float) -> None:
    if math.isfinite(loss):
        return
    kept = ""
    if run.folder is not None and run.saved_step >= 0:
        kept = f"; the last good checkpoint, of step {run.saved_step}, is in {run.folder.path}"
    other = "" if run.config.standardize else ", or --standardize"
    raise TrainError(
        f"the loss is no longer finite in epoch {run.position.epoch + 1}, by step "
        f"{run.position.global_step}; "
        f"take a smaller --lr than {run.config.learning_rate(run.task.loss):g}{other}{kept}"
    )
