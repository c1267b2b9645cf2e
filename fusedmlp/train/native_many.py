"""Several networks of one shape in one call of C++, each on a thread of its own.

Each is a `native` engine; only the calls are joined, so what one of them is left with, optimiser
state and position among it, is what it would have come to alone.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from . import native_op
from .native_step import LOSSES, Native

CALL_SECONDS = 0.5  # about, of one call: Ctrl-C is seen between two


def refuses(engines: list[Native], batches: list[int]) -> list[str]:
    """Reasons why the engines cannot share a call; batches: rows a step of each."""
    reasons = []
    first = engines[0]
    for name, of in _COMMON.items():
        if any(of(e) != of(first) for e in engines):
            reasons.append(f"the members differ in {name}")
    if len(set(batches)) > 1:
        reasons.append("the members differ in batch size")
    return reasons


_COMMON = {
    "the shape of the network": lambda e: [
        (layer.act, *(None if t is None else tuple(t.shape) for t in layer.tensors()))
        for layer in e.layers
    ],
    "the optimiser": lambda e: type(e.task.optimizer),
    "the loss": lambda e: e.task.loss,
}


class NativeMany:
    """engines: of tasks with the same x, y and scaling, for which `refuses` has no reasons."""

    def __init__(self, engines: list[Native], batch: int):
        self.engines, self.batch = engines, batch
        self.work = torch.empty(1, 0)
        self.chunk = 1  # steps of the next call

    def steps(self, orders: list[Tensor]) -> None:
        """One step of each for each `batch` rows of its order; the sums go to engine.read()."""
        done = 0
        while any(done < len(order) for order in orders):
            last = done + self.chunk * self.batch
            started = time.perf_counter()
            self._call([order[done:last] for order in orders])
            done = last
            if time.perf_counter() - started < CALL_SECONDS / 2:
                self.chunk *= 2

    @torch.no_grad()
    def _call(self, orders: list[Tensor]) -> None:
        engines, task = self.engines, self.engines[0].task
        steps = [-(-len(order) // self.batch) for order in orders]
        calls = [e.call(n) for e, n in zip(engines, steps, strict=True)]
        none = torch.empty(0, dtype=torch.float64)
        empty = [torch.empty(0)] * len(engines[0].parameters)
        has_first, has_second = (any(getattr(c, m) for c in calls) for m in ("first", "second"))
        totals = torch.zeros(len(engines), 3, dtype=torch.float64)
        scaling = task.scaling
        while True:
            needed = native_op.train_many(
                task.x,
                task.y,
                orders,
                scaling.mean,
                scaling.std,
                [none if c.lr_scale is None else c.lr_scale for c in calls],
                [p for e in engines for p in e.parameters],
                [t for c in calls for t in c.first or empty] if has_first else [],
                [t for c in calls for t in c.second or empty] if has_second else [],
                totals,
                self.work,
                [n for c in calls for n in c.layer_ints],
                [n for c in calls for n in c.layer_floats],
                [n for c in calls for n in c.ints],
                [n for c in calls for n in c.floats],
                float(scaling.divisor),
                self.batch,
                LOSSES[task.loss],
            )
            if needed <= self.work.shape[1]:
                break
            threads = min(len(engines), torch.get_num_threads())
            # 16 floats are a cache line: no two threads write to one.
            self.work = torch.empty(threads, -(-needed // 16) * 16)
        for engine, n, sums in zip(engines, steps, totals, strict=True):
            engine.totals += sums
            if n:
                engine.advance(n)
