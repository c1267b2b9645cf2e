"""Several networks in one call of C++, each on a thread of its own.

Results, including optimizer state and position, are bitwise those of training each network alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import native_op
from .native import LOSSES, Native

CALL_SECONDS = 0.5  # aimed at for one call: Ctrl-C is seen between two calls
FIRST_CALL_STEPS = 1.0  # steps of the first call
MAX_GROWTH = 16  # steps of a call over those of the last: the first are too short to be timed well

Sums = tuple[float, float, int]  # sum of losses, number right, rows


@dataclass(frozen=True)
class Share:
    """The work of one network in a call: epochs of its own data order and batch size."""

    engine: Native
    order: Tensor  # (epochs * rows,) int64 rows of the data
    batch: int
    epochs: int = 1

    @property
    def rows(self) -> int:
        return len(self.order) // self.epochs

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return -(-self.rows // self.batch)


class NativeMany:
    """Runs networks that have x, y, loss and scaling in common and nothing else."""

    def __init__(self):
        self.work = torch.empty(1, 0)
        self.chunk = FIRST_CALL_STEPS  # steps of each network in the next call

    def epochs_ahead(self, steps: int) -> int:
        """Epochs of so many steps that the next call has time for; at least 1."""
        return max(1, int(self.chunk // max(1, steps)))

    def run(self, shares: Sequence[Share]) -> list[list[Sums]]:
        """Train each network for its epochs; for each the sums of the epochs that it did, which end
        with one whose loss is not finite. One epoch may take several calls, where it is long."""
        if max(share.steps for share in shares) <= self.chunk or any(s.epochs > 1 for s in shares):
            return self._timed(shares)
        sums = [(0.0, 0.0, 0)] * len(shares)
        done = 0
        while any(done < share.steps for share in shares):
            last = done + max(1, int(self.chunk))
            going = [i for i, share in enumerate(shares) if done < share.steps]
            parts = [_part(shares[i], done, last) for i in going]
            for i, [more] in zip(going, self._timed(parts), strict=True):
                sums[i] = tuple(a + b for a, b in zip(sums[i], more, strict=True))
            done = last
        return [[each] for each in sums]

    def _timed(self, shares: Sequence[Share]) -> list[list[Sums]]:
        started = time.perf_counter()
        sums = self._call(shares)
        seconds = time.perf_counter() - started
        steps = max(share.steps * share.epochs for share in shares)
        self.chunk = max(1.0, steps * min(MAX_GROWTH, CALL_SECONDS / max(seconds, 1e-9)))
        return sums

    @torch.no_grad()
    def _call(self, shares: Sequence[Share]) -> list[list[Sums]]:
        engines = [share.engine for share in shares]
        calls = [s.engine.call(s.steps * s.epochs) for s in shares]
        none = torch.empty(0, dtype=torch.float64)
        has_first, has_second = (any(getattr(c, m) for c in calls) for m in ("first", "second"))
        first, second = [], []
        for engine, call in zip(engines, calls, strict=True):
            empty = [torch.empty(0)] * len(engine.parameters)
            first += (call.first or empty) if has_first else []
            second += (call.second or empty) if has_second else []
        totals = torch.zeros(sum(share.epochs for share in shares), 3, dtype=torch.float64)
        task, scaling = engines[0].task, engines[0].task.scaling
        ints = [
            (*call.ints, len(share.engine.layers), share.batch, share.epochs)
            for call, share in zip(calls, shares, strict=True)
        ]
        while True:
            needed = native_op.train_many(
                task.x,
                task.y,
                [share.order for share in shares],
                scaling.mean,
                scaling.std,
                [none if c.lr_scale is None else c.lr_scale for c in calls],
                [p for e in engines for p in e.parameters],
                first,
                second,
                totals,
                self.work,
                [n for c in calls for n in c.layer_ints],
                [n for c in calls for n in c.layer_floats],
                [n for row in ints for n in row],
                [n for c in calls for n in c.floats],
                float(scaling.divisor),
                LOSSES[task.loss],
            )
            if needed <= self.work.shape[1]:
                break
            self.work = slots(len(shares), needed)
        rows = iter([(loss, right, int(n)) for loss, right, n in totals.tolist()])
        sums = [[next(rows) for _ in range(share.epochs)] for share in shares]
        for share, mine in zip(shares, sums, strict=True):
            mine[:] = [row for row in mine if row[2]]
            share.engine.advance(share.steps * len(mine))
        return sums


def slots(networks: int, floats: int) -> Tensor:
    """Memory of a call, a row for each thread that takes part."""
    threads = min(networks, torch.get_num_threads())
    # 16 floats are a cache line: no two threads write to one.
    return torch.empty(threads, -(-floats // 16) * 16)


def _part(share: Share, first: int, last: int) -> Share:
    """Steps first to last of its one epoch."""
    return replace(share, order=share.order[first * share.batch : last * share.batch])
