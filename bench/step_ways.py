"""The ways to run a training step that gpu_step.py times, and whether each computes the same step.

All train a network of ReLU layers with SGD on a data set that lies on its device; a step takes row
numbers. Times nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmlp.nn import FusedMLP
from fusedmlp.spec import philox
from fusedmlp.train.data import types
from fusedmlp.train.engines.graph import Graph
from fusedmlp.train.task import Task, autocast

RATE, SEED = 0.05, 0x5EED
FLOOR = 1e-3  # relative error of an update: one hidden unit on the other side of relu's kink
LOSS_NEAR = 0.05  # relative, of the mean loss of a way that draws masks of its own


@dataclass(frozen=True)
class Case:
    """A network, dropout after its hidden layers, the precision and the rows of a step."""

    dims: tuple[int, ...]
    dropout: tuple[float, ...]
    precision: str
    batch: int = 256

    def __str__(self) -> str:
        p = ", ".join(f"{p:g}" for p in self.dropout)
        return "-".join(map(str, self.dims)) + (f", dropout {p}" if p else "")


def network(case: Case, device) -> FusedMLP:
    """The same initial weights for every way."""
    torch.manual_seed(0)
    dropout = case.dropout or (0.0,) * (len(case.dims) - 2)
    return FusedMLP(case.dims[0], case.dims[1:-1], case.dims[-1], dropout=dropout).to(device)


class Eager:
    """PyTorch's own modules: gather, forward, loss, backward, update."""

    def __init__(self, case: Case, loaded: types.Data):
        self.case, self.device = case, loaded.x_train.device
        self.net = nn.Sequential(*copy.deepcopy(network(case, self.device)).children()).train()
        self.x, self.y = loaded.scaling(loaded.x_train), loaded.y_train
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=RATE, fused=True)
        self.total = torch.zeros((), device=self.device)
        self.loss = self.plain_loss

    def plain_loss(self, x: Tensor, y: Tensor) -> Tensor:
        with autocast(self.device, self.case.precision):
            return F.cross_entropy(self.net(x), y)

    def step(self, rows: Tensor) -> None:
        # First: a compiled graph writes its gradients to the memory of those of the last step.
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.x[rows], self.y[rows])
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()

    def steps(self, order: Tensor) -> None:
        for rows in order.split(self.case.batch):
            self.step(rows)

    def read(self) -> float:
        """Mean losses of the steps since the last read, added up."""
        total = self.total.item()
        self.total.zero_()
        return total


def need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError("it needs CUDA graphs")


class EagerGraph(Eager):
    """The step in one CUDA graph, captured by hand; the row numbers are copied in."""

    def __init__(self, case: Case, loaded: types.Data):
        super().__init__(case, loaded)
        need_cuda(self.device)
        self.rows = torch.arange(case.batch, device=self.device)
        self.prepare()
        before = [p.detach().clone() for p in self.net.parameters()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(self.rows)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step(self.rows)
        with torch.no_grad():
            for p, was in zip(self.net.parameters(), before, strict=True):
                p.copy_(was)
        self.total.zero_()

    def prepare(self) -> None:
        """What comes before the capture."""

    def steps(self, order: Tensor) -> None:
        for rows in order.split(self.case.batch):
            self.rows.copy_(rows)
            self.graph.replay()


class Compile(Eager):
    """Forward and loss by torch.compile, which makes CUDA graphs of both directions itself."""

    def __init__(self, case: Case, loaded: types.Data):
        super().__init__(case, loaded)
        need_cuda(self.device)
        self.loss = torch.compile(self.plain_loss, dynamic=False, mode="reduce-overhead")

    def step(self, rows: Tensor) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        super().step(rows)


class CompileGraph(EagerGraph):
    """Forward and loss by torch.compile without graphs, the whole step captured by hand."""

    def prepare(self) -> None:
        self.loss = torch.compile(self.plain_loss, dynamic=False)


class Ours:
    """The engine `graph`; without a GPU its calls one by one."""

    def __init__(self, case: Case, loaded: types.Data):
        device = loaded.x_train.device
        self.case, self.net = case, network(case, device).train()
        optimizer = torch.optim.SGD(self.net.parameters(), lr=RATE)
        task = Task(self.net, optimizer, "cross_entropy", device, loaded.x_train, loaded.y_train)
        task.scaling, task.precision, task.seed = loaded.scaling, case.precision, SEED
        refuses = Graph.reasons_against if device.type == "cuda" else Graph.reasons_on_any_device
        if reasons := refuses(task):
            raise RuntimeError("; ".join(reasons))
        self.engine = Graph(task)
        self.engine.set_step(0)

    def steps(self, order: Tensor) -> None:
        self.engine.steps(order, self.case.batch)

    def read(self) -> float:
        return self.engine.read()[0] / self.case.batch


WAYS = {
    "graph": Ours,
    "eager": Eager,
    "eager graph": EagerGraph,
    "compile": Compile,
    "compile graph": CompileGraph,
}


class Masked(Eager):
    """PyTorch's loop with our masks put in by hand, in the case's precision or in fp64."""

    def __init__(self, case: Case, loaded: types.Data, dtype: torch.dtype = torch.float32):
        super().__init__(case, loaded)
        self.net = self.net.to(dtype)
        self.linears = [m for m in self.net if isinstance(m, nn.Linear)]
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=RATE)
        # The division in the run's own dtype: the inputs' rounding is part of what is compared.
        self.x = loaded.x_train.to(dtype) / loaded.scaling.divisor
        self.total, self.number, self.dtype = self.total.to(dtype), 0, dtype

    def plain_loss(self, x: Tensor, y: Tensor) -> Tensor:
        precision = self.case.precision if self.dtype == torch.float32 else "fp32"
        with autocast(self.device, precision):
            *hidden, last = self.linears
            for layer, linear in enumerate(hidden):
                x, p = F.relu(linear(x)), (self.case.dropout or (0.0,) * len(hidden))[layer]
                if p > 0:
                    stream = self.number * len(self.linears) + layer
                    keep = philox.dropout_mask(SEED, stream, *x.shape, p, device=self.device)
                    x = torch.where(keep, x / (1 - p), torch.zeros_like(x))
            self.number += 1
            return F.cross_entropy(last(x), y)


class Checker:
    """Holds ways against an fp64 loop over the steps of `order`; a way is back at its initial
    weights afterwards."""

    def __init__(self, case: Case, loaded: types.Data, order: Tensor):
        self.case, self.order = case, order
        truth, plain = Masked(case, loaded, torch.float64), Masked(case, loaded)
        self.start = _flat(truth.net)
        for loop in (truth, plain):
            loop.steps(order)
        self.moved = _flat(truth.net) - self.start
        self.loss = truth.read()
        self.plain = self._error(plain)

    def _error(self, way) -> float:
        """Of the parameters' updates, relative, in the Frobenius norm."""
        gap = _flat(way.net) - self.start - self.moved
        return (gap.norm() / self.moved.norm()).item()

    def wrong(self, way) -> str | None:
        """Why a way does not compute the case's steps; None when it does."""
        before = [p.detach().clone() for p in way.net.parameters()]
        way.steps(self.order)
        loss, error = way.read(), self._error(way)
        with torch.no_grad():
            for p, was in zip(way.net.parameters(), before, strict=True):
                p.copy_(was)
        if not abs(loss - self.loss) <= LOSS_NEAR * abs(self.loss):
            return f"wrong: losses add up to {loss:.4g}, {self.loss:.4g} in fp64"
        own_masks = any(self.case.dropout) and not isinstance(way, Ours)
        limit = max(2 * self.plain, FLOOR)
        if not own_masks and not error <= limit:
            return f"wrong: relative error {error:.1e}, at most {limit:.1e} allowed"
        return None


def _flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])
