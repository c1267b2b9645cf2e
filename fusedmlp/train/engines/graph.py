"""The `graph` engine: several training steps in one CUDA graph of fused kernels.

Parameters are updated in place and the optimizer's state is in the torch.optim object, so its
checkpoints are those of the `autograd` engine. It has never run on a GPU: `auto` takes it only
where it was found there to be right and faster (tuned.py).
On other devices the same calls run one by one, which is how they are tested.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ... import compat
from ..optim import EpsilonHatAdam
from ..task import Task
from . import graph_calls
from .graph_calls import Calls
from .plain_layers import (
    layers_of,
    reasons_against_data,
    reasons_against_optimizer,
    reasons_against_parameters,
    reasons_against_rows,
)

log = logging.getLogger("fusedmlp")

STEPS = 16  # steps of one graph, where as many of the same size follow each other
SIZES = (STEPS, 4, 1)  # steps of the graphs that make up a call
EVALUATIONS = 4  # graphs of evaluations that are kept, each for one set of rows


class Graph:
    """Steps of plain layers and SGD, Adam or AdamW on one GPU, without Python between them."""

    name = "graph"
    automatic = False  # but where tuned.py knows better

    @staticmethod
    def reasons_against(task: Task) -> list[str]:
        if task.device.type != "cuda":
            return [f"it runs on a CUDA GPU, the device is {task.device.type}"]
        return Graph.reasons_on_any_device(task)

    @staticmethod
    def reasons_on_any_device(task: Task) -> list[str]:
        """The reasons that do not depend on the device."""
        reasons = []
        if task.precision == "fp16":
            reasons.append("fp16 waits for the host, which decides on the scale of the loss")
        if task.world.size > 1:
            reasons.append("it runs in one process")
        reasons += reasons_against_optimizer(task.optimizer)
        if type(task.optimizer) is EpsilonHatAdam:
            reasons.append("torch's fused Adam has another place for epsilon")
        layers, against = layers_of(task.model)
        reasons += against
        reasons += reasons_against_parameters(task.model, task.optimizer, task.device.type)
        return reasons + (reasons_against_data(task, layers) if layers and not against else [])

    def __init__(self, task: Task):
        self.task = task
        self.calls = Calls(task, len(task.x))
        self.number = 0
        self.rows = 0  # since the last read
        self.held: list[Tensor] = []
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.tried: set[tuple] = set()  # keys that have run outside of a graph
        self.evaluated: dict[tuple, tuple[Tensor, Tensor]] = {}  # the data that graphs read
        self.captures = task.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None

    def set_step(self, number: int) -> None:
        self.number = number
        self.calls.stream.fill_(number * self.task.mask_layers)

    def step(self, indices: Tensor) -> None:
        self.steps(indices, max(1, len(indices)))

    def steps(self, order: Tensor, batch: int) -> None:
        """order (n,): rows of the data; steps of `batch` rows, the last one fewer."""
        if batch > self.calls.capacity and len(order) > self.calls.capacity:
            self._grow(batch)
        for part in order.split(max(1, self.calls.capacity // batch) * batch):
            self._part(part, batch)

    def _grow(self, capacity: int) -> None:
        """Make room for steps of more rows than the data have, some of them more than once."""
        totals = self.calls.totals
        self.calls = Calls(self.task, capacity)
        self.calls.totals.copy_(totals)
        self.set_step(self.number)
        self.graphs.clear()
        self.tried.clear()
        self.held = []

    def _part(self, order: Tensor, batch: int) -> None:
        held = self.calls.prepare()
        if [id(t) for t in held] != [id(t) for t in self.held]:
            # The optimiser was given another state: graphs write to the memory of the old one.
            self.graphs.clear()
            self.held = held
            self.calls.count_updates()
        whole, rest = divmod(len(order), batch)
        steps = whole + (rest > 0)
        schedule = self.task.schedule
        factors = None if schedule.is_constant else schedule.factors(self.number, steps)
        self.calls.load(order, factors)
        self._run(batch, whole)
        if rest:
            self._run(rest, 1)
        self.number += steps
        self.rows += len(order)
        if self.calls.adam is not None:
            state = self.task.optimizer.state
            compat.foreach_add_([state[p]["step"] for p in self.task.model.parameters()], steps)

    def _run(self, rows: int, count: int) -> None:
        """The next `count` steps, of `rows` rows each."""
        if not count:
            return
        most = graph_calls.MAX_VALUES // (rows * self.calls.layers[0].linear.in_features)
        while count:
            several = next(n for n in SIZES if n <= max(1, min(count, most)))
            self._go((rows, several), functools.partial(self.calls.run, rows, several))
            count -= several
        torch.autograd.graph.increment_version(self.calls.parameters)

    def _go(self, key: tuple, calls: Callable[[], None]) -> None:
        """Run calls that are the same for each key: the first time directly, later as a graph."""
        if self.captures and key not in self.tried:
            self._outside(calls)
            self.tried.add(key)
            return
        if self.captures and key not in self.graphs:
            try:
                self.graphs[key] = self._captured(calls)
            except Exception as error:  # nothing of a capture was run: the calls follow below
                self._capture_no_more(error)
        if self.captures:
            self.graphs[key].replay()
        else:
            calls()

    def _capture_no_more(self, error: BaseException) -> None:
        """Continue call by call, with the same results. An error of the calls themselves is raised
        again by them."""
        while error.__context__ is not None:
            # The error that ended the capture, before the end of the capture failed.
            error = error.__context__
        log.warning(
            "engine graph: a CUDA graph could not be captured, so the steps of this run go on call "
            "by call, which gives the same results but takes longer: %s: %s",
            type(error).__name__,
            error,
        )
        self.captures, self.name = False, "graph, call by call"
        self.graphs.clear()

    def _outside(self, calls: Callable[[], None]) -> None:
        """Run the calls on a side stream, as part of the training: libraries and kernels are loaded
        and compiled for these alignments and choose tiles, which a capture does not allow."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls()
        torch.cuda.current_stream().wait_stream(side)

    def _captured(self, calls: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Capture as torch.cuda.graph does, which also waits for the device and frees its cached
        memory: the next allocations would then wait as well."""
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            graph.capture_begin(pool=self.pool)
            try:
                calls()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        return graph

    def read(self) -> tuple[float, float, int]:
        loss, right = self.calls.totals.tolist()  # the one wait for the device
        self.calls.totals.zero_()
        rows, self.rows = self.rows, 0
        return loss, right, rows

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor | None:
        """(sum of losses, number right, rows) in fp64, on the device, over rows x (n, ...) as
        stored and their targets, in evaluation mode and without label smoothing; None where it
        cannot take them. Does not wait. The data of the last few calls stay alive."""
        task, device = self.task, self.task.x.device
        if x.device != device or y.device != device:
            return None
        if reasons_against_rows(task, x, y, self.calls.layers):
            return None
        key = "evaluate", x.data_ptr(), y.data_ptr(), len(x)
        if key not in self.evaluated and len(self.evaluated) == EVALUATIONS:
            for old in self.evaluated:
                self.graphs.pop(old, None)
                self.tried.discard(old)
            self.evaluated.clear()
        self.evaluated[key] = x, y
        self._go(key, functools.partial(self.calls.evaluate, x, y))
        return self.calls.evaluated.clone()

    def sync(self) -> None:
        """Nothing to do: parameters and state are the task's own tensors."""

    def scaler_state(self) -> dict | None:
        return None

    def load_scaler_state(self, state: dict | None) -> None:
        pass
