"""Several networks in one call of C++, each on a thread of its own.

Results, including optimizer state and position, are bitwise those of training each network alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from .native import Share, train

CALL_SECONDS = 0.5  # aimed at for one call: Ctrl-C is seen between two calls
FIRST_CALL_STEPS = 1.0  # steps of the first call
MAX_GROWTH = 16  # steps of a call over those of the last: the first are too short to be timed well

Sums = tuple[float, float, int]  # sum of losses, number right, rows


class NativeMany:
    """Runs networks that have the data, the loss and the scaling in common and nothing else."""

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

    def _call(self, shares: Sequence[Share]) -> list[list[Sums]]:
        totals = torch.zeros(sum(share.epochs for share in shares), 3, dtype=torch.float64)
        task = shares[0].engine.task
        data = task.x, task.y, task.row_weights
        self.work = train(shares, *data, task.scaling, totals, self.work)
        rows = iter([(loss, right, int(n)) for loss, right, n in totals.tolist()])
        sums = [[next(rows) for _ in range(share.epochs)] for share in shares]
        for share, mine in zip(shares, sums, strict=True):
            mine[:] = [row for row in mine if row[2]]
            share.engine.advance(share.steps * len(mine))
        return sums


def _part(share: Share, first: int, last: int) -> Share:
    """Steps first to last of its one epoch."""
    return replace(share, order=share.order[first * share.batch : last * share.batch])
