"""The process of a run: its device, settings, generators and signals, and the other processes that
torchrun started with it.

Every setting is put back at the end of a run.
"""

import contextlib
import gc
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .. import environment
from ..backends import registry
from .config import TrainConfig
from .data.types import seeded
from .errors import LostProcessError, TrainError, UsageError


@dataclass
class StopRequest:
    """Ctrl-C or SIGTERM sets it; the loop looks at it between steps."""

    asked: bool = False
    at: float = 0.0


def pick_device(config: TrainConfig) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        if config.precision == "tf32":
            raise UsageError(
                "--precision tf32 needs a GPU, and this run is on the CPU; take fp32 or bf16"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = (
            "torch sees no GPU"
            if torch.backends.cuda.is_built()
            else "this torch is built without CUDA"
        )
        raise TrainError(f"--device cuda was asked for, but {built}; take --device cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def run_settings(config: TrainConfig, device: torch.device):
    """Set the config's backend and precision, and allow seeding torch's generators; all are put
    back at the end."""
    with contextlib.ExitStack() as stack:
        cuda = [device.index] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        if config.backend != "auto":
            stack.enter_context(registry.use_backend(config.backend))
        if device.type == "cuda":
            stack.enter_context(_fp32_matmul("tf32" if config.precision == "tf32" else "ieee"))
        yield


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators that `run_settings` puts back, and no others: torch.manual_seed also
    queues calls for every kind of device there could be, which takes longer than a short epoch."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def seed_epoch(config: TrainConfig, world: "World", epoch: int, device: torch.device) -> None:
    """Seed the generators for models that draw from them: each epoch and process differently."""
    number = seeded("model", config.seed, epoch * world.size + world.rank).initial_seed()
    seed_generators(number, device)


@contextlib.contextmanager
def _fp32_matmul(mode: str):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = mode
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextlib.contextmanager
def stop_on_signals():
    """Yields a StopRequest. The first Ctrl-C or SIGTERM sets it; a second Ctrl-C, at least a second
    later, interrupts the loop at once."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return

    def ask(number, frame):
        # torchrun sends another signal right after the terminal's.
        if stop.asked and number == signal.SIGINT and time.monotonic() - stop.at > 1.0:
            raise KeyboardInterrupt
        if not stop.asked:
            stop.asked, stop.at = True, time.monotonic()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# The limit of joining and of every later wait; longer than the one download that rank 0 may try.
WAIT_SECONDS = 180.0


class OtherProcessError(TrainError):
    """Another process failed and reports why; this process says nothing."""


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started, or alone.

    Every process holds the whole data set; a step's batch is split over them by rows. Alone,
    nothing here touches torch.distributed.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str = "cpu"  # where the tensors of collectives are: the CPU for gloo, a GPU for NCCL

    @property
    def is_lead(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int) -> tuple[int, int]:
        """[first, last) of a batch's rows that this process works on."""
        return batch * self.rank // self.size, batch * (self.rank + 1) // self.size

    @contextlib.contextmanager
    def others(self):
        """Raise what torch says of a process that has gone as LostProcessError."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or isinstance(error, TrainError) or not _tells_of_a_loss(error):
                raise
            raise LostProcessError(
                f"process {self.rank} of {self.size}: another process has ended or does not answer"
            ) from error

    def sum(self, values: Tensor) -> Tensor:
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def max(self, *values: int) -> list[int]:
        """The largest of each value over all processes."""
        if self.size == 1:
            return list(values)
        gathered = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(gathered, op=dist.ReduceOp.MAX)
        return gathered.tolist()

    def run_on_lead(self, do: Callable):
        """Call do() on rank 0 only; all processes return its result, or all fail with its error,
        which rank 0 reports."""
        if self.size == 1:
            return do()
        box = [None, None]
        error = None
        if self.is_lead:
            try:
                box = [do(), None]
            except Exception as raised:
                error, box = raised, [None, str(raised) or type(raised).__name__]
        dist.broadcast_object_list(box, src=0, device=torch.device(self.device))
        if error is not None:
            raise error
        if box[1] is not None:
            raise OtherProcessError(box[1])
        return box[0]


def _tells_of_a_loss(error: RuntimeError) -> bool:
    """gloo's errors have no type of their own."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


ALONE = World()


def started_by_torchrun() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_quiet_process() -> bool:
    """True where another process of the same run writes the output."""
    return started_by_torchrun() and os.environ["RANK"] != "0"


def current_world() -> World:
    """The World of the process group that exists already; ALONE without one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{local}" if dist.get_backend() == "nccl" else "cpu"
    return World(dist.get_rank(), dist.get_world_size(), local, device)


def join_processes(device: str) -> World:
    """Join the processes of torchrun, if it started this one.

    device  cpu (gloo) or cuda (NCCL), the same on all
    """
    if not started_by_torchrun() or dist.is_initialized():
        return current_world()
    missing = [n for n in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UsageError(
            f"RANK is set but {missing[0]} is not; start several processes with torchrun "
            "--nproc-per-node N -m fusedmlp train ..., or unset RANK"
        )
    rank, size, local = (int(os.environ.get(n, "0")) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise TrainError(
                f"process {local} of this machine needs a GPU of its own, but there are "
                f"{torch.cuda.device_count()}; take a smaller --nproc-per-node, or --device cpu"
            )
        torch.cuda.set_device(local)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    seconds = float(environment.read("FUSEDMLP_DDP_SECONDS") or WAIT_SECONDS)
    # DistributedDataParallel imports it, and defaults of its functions are the group that there is
    # then: imported later, it keeps the group, whose threads can abort the end of the process.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=seconds)
        )
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise LostProcessError(
            f"process {rank} could not join the {size} processes at {place} within {seconds:g} "
            f"s: {first_line}"
        ) from error
    return current_world()


@contextlib.contextmanager
def together(device: str):
    """The World of the processes that torchrun started, which are joined and left again."""
    world = join_processes(device)
    try:
        with world.others():
            yield world
        if world.size > 1:
            # DistributedDataParallel is part of a cycle, and keeps the group until that is found.
            gc.collect()
    finally:
        if started_by_torchrun() and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
