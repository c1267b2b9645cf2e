"""The ways to run training steps that steps.py and train.py time, and whether each computes the
same steps. All train a network of ReLU layers with SGD, on rows that lie on its device. Times
nothing.
"""

from __future__ import annotations

import copy
import gzip
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmlp.nn import FusedMLP
from fusedmlp.spec import philox
from fusedmlp.train.data import images, types
from fusedmlp.train.engines.graph import Graph
from fusedmlp.train.engines.native import Native
from fusedmlp.train.task import Task, autocast

from .timing import captured

SEED = 0x5EED
# Relative error of an update: one hidden unit on the other side of relu's kink makes up to 4.5e-3
# in 8 steps of 784-256-10, in PyTorch's own loop too; a rate that is 3 % off makes 3e-2.
FLOOR = 1e-2
LOSS_NEAR = 0.05  # relative, of the mean loss of a way that draws masks of its own


@dataclass(frozen=True)
class Network:
    """A case: its layers, dropout after the hidden ones, and how a step is run."""

    dims: tuple[int, ...]
    dropout: tuple[float, ...]
    batch: int = 256
    precision: str = "fp32"
    rate: float = 0.05

    def __str__(self) -> str:
        p = "/".join(f"{p:g}" for p in self.dropout)
        dropout = f" dropout {p}" if any(self.dropout) else ""
        return f"{'-'.join(map(str, self.dims))}{dropout} batch {self.batch}"

    @property
    def flops(self) -> int:
        """Of the products of a step; the first layer's input has no gradient."""
        pairs = zip(self.dims, self.dims[1:], strict=False)
        return sum(2 * self.batch * k * n * (2 + (i > 0)) for i, (k, n) in enumerate(pairs))

    def model(self, device="cpu") -> FusedMLP:
        """The same initial weights for every way."""
        torch.manual_seed(0)
        first, *hidden, last = self.dims
        return FusedMLP(first, hidden, last, dropout=self.dropout).to(device)


def network(dims: str, dropout: tuple[float, ...] = (), **settings) -> Network:
    """dims: as 784-256-10"""
    sizes = tuple(int(n) for n in dims.split("-"))
    return Network(sizes, dropout or (0.0,) * (len(sizes) - 2), **settings)


def noise(rows: int, tests: int = 1, features: int = 784, classes: int = 10) -> types.Data:
    """Noise of Fashion-MNIST's kind."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (rows + tests, features), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, classes, (rows + tests,), generator=generator)
    names = tuple(str(i) for i in range(classes))
    parts = x[:rows], y[:rows], x[rows:], y[rows:]
    return types.Data("noise", *parts, classes=names, scaling=types.Scaling(255.0))


class Eager:
    """PyTorch's own modules on fp32 rows in memory: gather, forward, loss, backward, update."""

    def __init__(
        self, case: Network, data: types.Data, net: nn.Module | None = None, x: Tensor | None = None
    ):
        self.case, self.device = case, data.x_train.device
        net = case.model(self.device) if net is None else net
        self.net = nn.Sequential(*copy.deepcopy(net).children()).to(self.device).train()
        self.x, self.y = data.scaling(data.x_train) if x is None else x, data.y_train
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=case.rate, fused=fused)
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

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        self.net.eval()
        with torch.inference_mode(), autocast(self.device, self.case.precision):
            right = self.net(x).argmax(1) == y
        self.net.train()
        return right.float().mean().item()


def _need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError("it needs CUDA graphs")


class EagerGraph(Eager):
    """The step in one CUDA graph, captured by hand; the row numbers are copied in."""

    def __init__(self, case: Network, data: types.Data):
        super().__init__(case, data)
        _need_cuda(self.device)
        self.rows = torch.arange(case.batch, device=self.device)
        self.prepare()
        before = copy.deepcopy(self.net.state_dict())
        self.replay = captured(lambda: self.step(self.rows))
        self.net.load_state_dict(before)
        self.total.zero_()

    def prepare(self) -> None:
        """What comes before the capture."""

    def steps(self, order: Tensor) -> None:
        for rows in order.split(self.case.batch):
            self.rows.copy_(rows)
            self.replay()


class Compile(Eager):
    """Forward and loss by torch.compile, which makes CUDA graphs of both directions itself."""

    def __init__(self, case: Network, data: types.Data):
        super().__init__(case, data)
        _need_cuda(self.device)
        self.loss = torch.compile(self.plain_loss, dynamic=False, mode="reduce-overhead")

    def step(self, rows: Tensor) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        super().step(rows)


class CompileGraph(EagerGraph):
    """Forward and loss by torch.compile without graphs, the whole step captured by hand."""

    def prepare(self) -> None:
        self.loss = torch.compile(self.plain_loss, dynamic=False)


def task_of(case: Network, data: types.Data, net: nn.Module | None = None) -> Task:
    """What an engine of this package trains: rows as bytes, scaled as part of the step."""
    device = data.x_train.device
    net = (case.model(device) if net is None else net).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=case.rate)
    task = Task(net, optimizer, "cross_entropy", device, data.x_train, data.y_train, data.scaling)
    task.precision, task.seed = case.precision, SEED
    return task


class Ours:
    """The engine `graph`; without a GPU its calls one by one."""

    kind: type = Graph

    def __init__(self, case: Network, data: types.Data):
        task = task_of(case, data)
        self.case, self.net = case, task.model
        one_by_one = self.kind is Graph and task.device.type != "cuda"
        against = Graph.reasons_on_any_device if one_by_one else self.kind.reasons_against
        if reasons := against(task):
            raise RuntimeError("; ".join(reasons))
        self.engine = self.kind(task)
        self.engine.set_step(0)

    def steps(self, order: Tensor) -> None:
        self.engine.steps(order, self.case.batch)

    def read(self) -> float:
        return self.engine.read()[0] / self.case.batch


class OursNative(Ours):
    """The engine `native`."""

    kind = Native


def native(case: Network, data: types.Data) -> Native:
    """The engine `native`; ends the program where it cannot run."""
    try:
        return OursNative(case, data).engine
    except RuntimeError as error:
        raise SystemExit(f"bench: the native engine cannot run: {error}") from error


WAYS = {
    "graph": Ours,
    "eager": Eager,
    "eager graph": EagerGraph,
    "compile": Compile,
    "compile graph": CompileGraph,
}


class Masked(Eager):
    """PyTorch's loop with this package's masks put in by hand, in the case's precision or fp64."""

    def __init__(self, case, data, dtype=torch.float32, net=None, seed: int = SEED):
        super().__init__(case, data, net, x=data.x_train)
        self.net = self.net.to(dtype)
        self.linears = [m for m in self.net if isinstance(m, nn.Linear)]
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=case.rate)
        self.total, self.number = self.total.to(dtype), 0
        self.dtype, self.seed, self.divisor = dtype, seed, data.scaling.divisor

    def plain_loss(self, x: Tensor, y: Tensor) -> Tensor:
        # The division in the run's own dtype: the inputs' rounding is part of what is compared.
        x = x.to(self.dtype) / self.divisor
        precision = self.case.precision if self.dtype == torch.float32 else "fp32"
        with autocast(self.device, precision):
            *hidden, last = self.linears
            for layer, (linear, p) in enumerate(zip(hidden, self.case.dropout, strict=True)):
                x = F.relu(linear(x))
                if p > 0:
                    stream = self.number * len(self.linears) + layer
                    keep = philox.dropout_mask(self.seed, stream, *x.shape, p, device=x.device)
                    x = torch.where(keep, x / (1 - p), torch.zeros_like(x))
            self.number += 1
            return F.cross_entropy(last(x), y)


class Checker:
    """Holds ways against an fp64 loop over the steps of `order`; a way is back at its initial
    weights afterwards."""

    def __init__(self, case: Network, data: types.Data, order: Tensor):
        self.case, self.data, self.order = case, data, order
        truth = Masked(case, data, torch.float64)
        self.start = flat(truth.net)
        truth.steps(order)
        self.moved = flat(truth.net) - self.start
        self.loss = truth.read()
        self.limits: dict[str, float] = {}

    def _error(self, way) -> float:
        """Of the parameters' updates, relative, in the Frobenius norm."""
        gap = flat(way.net) - self.start - self.moved
        return (gap.norm() / self.moved.norm()).item()

    def _limit(self, precision: str) -> float:
        """Twice the error of PyTorch's loop in this precision."""
        if precision not in self.limits:
            plain = Masked(replace(self.case, precision=precision), self.data)
            plain.steps(self.order)
            self.limits[precision] = max(2 * self._error(plain), FLOOR)
        return self.limits[precision]

    def wrong(self, way) -> str | None:
        """Why a way does not compute the case's steps; None when it does."""
        before = copy.deepcopy(way.net.state_dict())
        way.steps(self.order)
        loss, error = way.read(), self._error(way)
        way.net.load_state_dict(before)
        if not abs(loss - self.loss) <= LOSS_NEAR * abs(self.loss):
            return f"wrong: losses add up to {loss:.4g}, {self.loss:.4g} in fp64"
        own_masks = any(self.case.dropout) and not isinstance(way, Ours)
        limit = self._limit(getattr(way, "precision", self.case.precision))
        if not own_masks and not error <= limit:
            return f"wrong: relative error {error:.1e}, at most {limit:.1e} allowed"
        return None


def compiling(way, call: Callable[[], object]) -> float | None:
    """Seconds that the first call takes longer than the next ones; None for a way that compiles
    nothing. The way is back at its weights afterwards."""
    if not getattr(way, "compiles", False):
        return None
    before, taken = copy.deepcopy(way.net.state_dict()), []
    for _ in range(3):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    way.net.load_state_dict(before)
    way.read()
    return taken[0] - min(taken[1:])


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


def unpack(data_dir: Path | None, folder: Path) -> None:
    """The four files where torchvision wants them, unpacked."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    root = data_dir if data_dir is not None else images.default_folder()
    for path in images.find_files(images.IMAGE_SETS["fashion_mnist"], root):
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        (raw / path.name.removesuffix(".gz")).write_bytes(content)
