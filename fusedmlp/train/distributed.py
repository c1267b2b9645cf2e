"""World: this process among those that torchrun started, or alone. Who does what, and what all
agree on.

Every process holds the whole data set; a step's batch is split over them by rows. Alone, nothing
here
touches torch.distributed.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .. import environment
from .errors import TrainError, UsageError

# To join, and for every wait afterwards; longer than the one download that rank 0 may try.
WAIT_SECONDS = 180.0


class Elsewhere(TrainError):
    """Another process failed and reports it: this one ends without a word."""


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str = "cpu"  # of the tensors in collectives: gloo's CPU, or NCCL's GPU

    @property
    def is_lead(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int) -> tuple[int, int]:
        """[first, last) of a batch's rows that this process works on."""
        return batch * self.rank // self.size, batch * (self.rank + 1) // self.size

    def sum(self, values: Tensor) -> Tensor:
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def most(self, *values: int) -> list[int]:
        """The largest of each value over all processes."""
        if self.size == 1:
            return list(values)
        gathered = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(gathered, op=dist.ReduceOp.MAX)
        return gathered.tolist()

    def lead(self, do: Callable):
        """do() on rank 0 only; all get its result, or all fail with its error, which rank 0
        reports."""
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
            raise Elsewhere(box[1])
        return box[0]


ALONE = World()


def started_by_torchrun() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_quiet_process() -> bool:
    """True where another process of the same run does the talking."""
    return started_by_torchrun() and os.environ["RANK"] != "0"


def current() -> World:
    """The world that exists already: the caller's own process group, or alone."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{local}" if dist.get_backend() == "nccl" else "cpu"
    return World(dist.get_rank(), dist.get_world_size(), local, device)


def join(device: str) -> World:
    """Join the processes of torchrun, if it started this one.

    device  cpu (gloo) or cuda (NCCL), the same on all
    """
    if not started_by_torchrun() or dist.is_initialized():
        return current()
    missing = [n for n in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UsageError(
            f"RANK is set but {missing[0]} is not; start several processes with torchrun "
            "--nproc-per-node N "
            "-m fusedmlp train ..., or unset RANK"
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
    try:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=seconds)
        )
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise TrainError(
            f"process {rank} could not join the {size} processes at {place} within {seconds:g} "
            f"s: {first_line}"
        ) from error
    return current()


def leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
