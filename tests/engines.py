"""Helpers of the tests of the engines: tasks, and plain PyTorch's own loop as the reference."""

from __future__ import annotations

import copy
import functools
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedmlp.nn import FusedMLP
from fusedmlp.spec import philox
from fusedmlp.train import TrainConfig
from fusedmlp.train.data.types import Data, permutation
from fusedmlp.train.engines import choose, native_op
from fusedmlp.train.engines.graph import Graph
from fusedmlp.train.optim import EpsilonHatAdam
from fusedmlp.train.schedule import Schedule
from fusedmlp.train.task import Task


def need_native() -> None:
    """Skip the calling test module where the engine cannot run."""
    if (reason := native_op.unavailable()) is not None:
        pytest.skip(f"native engine: {reason}", allow_module_level=True)


def config(**settings) -> TrainConfig:
    return TrainConfig(**{"epochs": 3, "batch_size": 32, "device": "cpu", "lr": 0.1} | settings)


SEED, BATCH = 5, 64


def network(sizes=(64, 24, 16, 4), dropout=0.0, seed: int = 0, **arguments) -> FusedMLP:
    torch.manual_seed(seed)
    first, *hidden, last = sizes
    return FusedMLP(first, hidden, last, dropout=dropout, **arguments)


def task_of(net, data: Data, optimizer, loss="cross_entropy", **settings) -> Task:
    task = Task(net.train(), optimizer(net.parameters()), loss, torch.device("cpu"))
    task.x, task.y, task.scaling, task.seed = data.x_train, data.y_train, data.scaling, SEED
    for name, value in settings.items():
        setattr(task, name, value)
    return task


def engine_of(name: str, *arguments, **settings):
    engine = choose(name, task_of(*arguments, **settings))
    engine.set_step(0)
    return engine


def on(device: str, data: Data, optimizer, net=None, kind=Graph, **settings):
    """An engine of that kind on the device, at step 0; Graph's calls run on any device."""
    net = (network(dropout=(0.2, 0.5)) if net is None else net).to(device)
    task = task_of(net, data.to(device), optimizer, **settings)
    task.device = torch.device(device)
    engine = kind(task)
    engine.set_step(0)
    return engine


def orders(data: Data, steps: int, batch: int = BATCH) -> list[torch.Tensor]:
    """The rows of each step, the last of an epoch fewer, over as many epochs as it takes."""
    rows = len(data.x_train)
    epochs = range(-(-steps // -(-rows // batch)))
    return [b for e in epochs for b in permutation(SEED, e, rows).split(batch)][:steps]


def state_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# Drawn once for all loops and seeds of the weights: in plain PyTorch a mask takes a step's time.
mask = functools.lru_cache(maxsize=2000)(philox.dropout_mask)


class Plain:
    """The textbook loop on torch's own modules, with the package's masks, in any dtype."""

    def __init__(
        self,
        net: FusedMLP,
        data: Data,
        optimizer,
        dtype,
        loss="cross_entropy",
        smoothing=0.0,
        clip=0.0,
        scheduler=None,
        weights=None,
    ):
        self.modules = copy.deepcopy(nn.ModuleList(net.children())).to(dtype)
        self.optimizer = optimizer(self.modules.parameters())
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        rows, scaling = data.x_train.to(dtype) / data.scaling.divisor, data.scaling
        if scaling.mean is not None:
            rows = (rows - scaling.mean.to(dtype)) / scaling.std.to(dtype)
        self.x, self.y = rows, data.y_train
        self.y = self.y if loss == "cross_entropy" else self.y.to(dtype)
        self.loss, self.smoothing, self.clip = loss, smoothing, clip
        self.weights = None if weights is None else weights.to(dtype)
        self.layers = sum(isinstance(m, nn.Linear) for m in self.modules)
        self.step = 0

    def forward(self, x):
        layer = -1
        for module in self.modules:
            if isinstance(module, nn.Dropout):
                stream = self.step * self.layers + layer
                keep = mask(SEED, stream, len(x), x.shape[1], module.p)
                x = torch.where(keep, x / (1 - module.p), 0.0)
            else:
                layer += isinstance(module, nn.Linear)
                x = module(x)
        return x

    def batch_loss(self, rows):
        outputs, y = self.forward(self.x[rows]), self.y[rows]
        if self.loss == "mse":
            each = F.mse_loss(outputs, y, reduction="none").mean(1)
        elif self.loss == "logistic":
            each = F.binary_cross_entropy_with_logits(outputs, y, reduction="none").sum(1)
        else:
            smoothing = self.smoothing
            each = F.cross_entropy(outputs, y, reduction="none", label_smoothing=smoothing)
        if self.weights is None:
            return each.mean()
        weights = self.weights[rows]
        return (each * weights).sum() / weights.sum()

    def run(self, batches) -> None:
        for rows in batches:
            loss = self.batch_loss(rows)
            self.optimizer.zero_grad()
            loss.backward()
            if self.clip:
                nn.utils.clip_grad_norm_(self.modules.parameters(), self.clip)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.step += 1


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3, weight_decay=1e-2),
}
# Those of the native engine; epsilon is so large that its place shows.
NATIVE_OPTIMIZERS = OPTIMIZERS | {
    "epsilon_hat": lambda p: EpsilonHatAdam(p, lr=2e-3, weight_decay=1e-2, eps=1e-3)
}


def errors(found: nn.Module, truth: nn.Module) -> tuple[float, float]:
    """(max, RMS) of the difference of all parameters, in fp64."""
    pairs = zip(found.parameters(), truth.parameters(), strict=True)
    gap = torch.cat([(a.double() - b.double()).flatten() for a, b in pairs]).detach()
    return gap.abs().max().item(), gap.square().mean().sqrt().item()


def assert_near_fp64(
    data: Data,
    optimizer,
    ends=(1, 50, 500),
    loss="cross_entropy",
    smoothing=0.0,
    clip=0.0,
    schedule=None,
    scheduler=None,
    make=None,
    weights=None,
    **net,
) -> None:
    """Error after each end at most twice that of PyTorch's own loop in fp32: the middle of 3 seeds,
    as after hundreds of steps either of them may be the lucky one. make: task -> engine, the native
    one where there is none."""
    ratios: dict = {}
    for seed in range(3):
        model = network(seed=seed, **net)
        setting = (loss, smoothing, clip, scheduler, weights)
        truth = Plain(model, data, optimizer, torch.float64, *setting)
        plain = Plain(model, data, optimizer, torch.float32, *setting)
        settings = dict(label_smoothing=smoothing, clip_norm=clip, schedule=schedule or Schedule())
        settings |= dict(row_weights=weights)
        task = task_of(model, data, optimizer, loss, **settings)
        engine = choose("native", task) if make is None else make(task)
        engine.set_step(0)
        batches, done = orders(data, ends[-1]), 0
        for end in ends:
            truth.run(batches[done:end])
            plain.run(batches[done:end])
            for rows in batches[done:end]:
                engine.step(rows)
            done = end
            pairs = zip(
                errors(model, truth.modules), errors(plain.modules, truth.modules), strict=True
            )
            for kind, (found, budget) in zip(("max", "RMS"), pairs, strict=True):
                assert budget > 0
                ratios.setdefault((end, kind), []).append(found / budget)
    middle = {key: statistics.median(values) for key, values in ratios.items()}
    assert all(ratio <= 2 for ratio in middle.values()), middle
