"""The native step engine: the trajectory of plain PyTorch, exact repeats, and what it refuses."""

from __future__ import annotations

import copy
import functools
import os
import signal
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedmlp
from fusedmlp import activations, rng
from fusedmlp.nn import FusedMLP
from fusedmlp.train import TrainConfig, TrainError, fit, native_op
from fusedmlp.train.data import Data, permutation, standardized
from fusedmlp.train.native_step import Native
from fusedmlp.train.progress import Quiet
from fusedmlp.train.step import Task, choose

from . import made_data

made_data.need("safetensors", "matplotlib")
if (_reason := native_op.unavailable()) is not None:
    pytest.skip(f"native engine: {_reason}", allow_module_level=True)

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


def orders(data: Data, steps: int, batch: int = BATCH) -> list[torch.Tensor]:
    """The rows of each step, the last of an epoch fewer, over as many epochs as it takes."""
    rows = len(data.x_train)
    epochs = range(-(-steps // -(-rows // batch)))
    return [b for e in epochs for b in permutation(SEED, e, rows).split(batch)][:steps]


def state_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# the trajectory

# Drawn once for all loops and seeds of the weights: in plain PyTorch a mask takes a step's time.
mask = functools.lru_cache(maxsize=2000)(rng.dropout_mask)


class Plain:
    """The textbook loop on torch's own modules, with the package's masks, in any dtype."""

    def __init__(self, net: FusedMLP, data: Data, optimizer, dtype, loss, smoothing, clip):
        self.modules = copy.deepcopy(nn.ModuleList(net.children())).to(dtype)
        self.optimizer = optimizer(self.modules.parameters())
        rows, scaling = data.x_train.to(dtype) / data.scaling.divisor, data.scaling
        if scaling.mean is not None:
            rows = (rows - scaling.mean.to(dtype)) / scaling.std.to(dtype)
        self.x, self.y = rows, data.y_train
        self.y = self.y if loss == "cross_entropy" else self.y.to(dtype)
        self.loss, self.smoothing, self.clip = loss, smoothing, clip
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

    def run(self, batches) -> None:
        for rows in batches:
            outputs = self.forward(self.x[rows])
            if self.loss == "mse":
                loss = F.mse_loss(outputs, self.y[rows])
            else:
                loss = F.cross_entropy(outputs, self.y[rows], label_smoothing=self.smoothing)
            self.optimizer.zero_grad()
            loss.backward()
            if self.clip:
                nn.utils.clip_grad_norm_(self.modules.parameters(), self.clip)
            self.optimizer.step()
            self.step += 1


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1),
}


def errors(found: nn.Module, truth: nn.Module) -> tuple[float, float]:
    """(max, RMS) of the difference of all parameters, in fp64."""
    pairs = zip(found.parameters(), truth.parameters(), strict=True)
    gap = torch.cat([(a.double() - b.double()).flatten() for a, b in pairs]).detach()
    return gap.abs().max().item(), gap.square().mean().sqrt().item()


def assert_near_fp64(
    data: Data, optimizer, ends=(1, 50, 500), loss="cross_entropy", smoothing=0.0, clip=0.0, **net
) -> None:
    """Error after each end at most twice that of PyTorch's own loop in fp32: the middle of 3 seeds,
    as after hundreds of steps either of them may be the lucky one."""
    ratios: dict = {}
    for seed in range(3):
        model = network(seed=seed, **net)
        setting = (loss, smoothing, clip)
        truth = Plain(model, data, optimizer, torch.float64, *setting)
        plain = Plain(model, data, optimizer, torch.float32, *setting)
        engine = engine_of(
            "native", model, data, optimizer, loss, label_smoothing=smoothing, clip_norm=clip
        )
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


@pytest.mark.parametrize("dropout", [0.0, (0.2, 0.5)], ids=["plain", "dropout"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_are_as_near_to_fp64_as_plain_pytorchs(name, dropout):
    assert_near_fp64(made_data.pictures(rows=400), OPTIMIZERS[name], dropout=dropout)


@pytest.mark.parametrize("activation", sorted(set(activations.NAMES) - {"relu"}))
def test_every_activation_keeps_to_the_trajectory(activation):
    module = network(activation=activation)[1]
    if type(module).__name__ == "ReLUSquared":
        optimizer = OPTIMIZERS["sgd"]
    else:
        optimizer = OPTIMIZERS["momentum"]
    data = made_data.pictures(rows=400)
    assert_near_fp64(data, optimizer, ends=(1, 50), activation=activation, dropout=(0.0, 0.5))


def test_label_smoothing_keeps_to_the_trajectory():
    assert_near_fp64(made_data.pictures(rows=400), OPTIMIZERS["momentum"], smoothing=0.1)


def test_gradient_clipping_keeps_to_the_trajectory():
    for clip in (0.05, 100.0):
        assert_near_fp64(made_data.pictures(rows=400), OPTIMIZERS["sgd"], ends=(1, 50), clip=clip)


def test_standardised_images_and_tables_keep_to_the_trajectory():
    for data, sizes in (
        (made_data.pictures(rows=400), (64, 24, 4)),
        (made_data.blobs(rows=400), (12, 24, 3)),
    ):
        assert_near_fp64(standardized(data), OPTIMIZERS["adamw"], ends=(1, 50), sizes=sizes)


def test_mean_squared_error_keeps_to_the_trajectory():
    data = standardized(made_data.line(rows=400))
    optimizer = OPTIMIZERS["sgd"]
    assert_near_fp64(data, optimizer, loss="mse", sizes=(3, 16, 1), activation="tanh")


@pytest.mark.parametrize(
    "sizes, batch", [((1, 7, 1), 33), ((5, 1), 1), ((3, 300, 2), 1), ((70, 33, 65, 31), 97)]
)
def test_sizes_that_fit_no_tile_agree_with_autograd(sizes, batch):
    """One feature, one class, one row, no hidden layer, and a last batch that is smaller."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, sizes[0], generator=generator)
    y = torch.randint(0, sizes[-1], (200,), generator=generator)
    data = Data("made", x, y)
    first = network(sizes=sizes)
    second = copy.deepcopy(first)
    for net, name in ((first, "native"), (second, "autograd")):
        engine = engine_of(name, net, data, OPTIMIZERS["nesterov"])
        engine.steps(permutation(SEED, 0, 200)[:199], batch)
        assert engine.read()[2] == 199
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# repeats


def _trained(data: Data, optimizer, calls: int, dropout=0.5):
    net = network(dropout=dropout)
    engine = engine_of("native", net, data, optimizer)
    order = torch.cat([permutation(SEED, e, len(data.x_train)) for e in range(6)])
    for part in order.split(len(order) // calls // BATCH * BATCH):
        engine.steps(part, BATCH)
    return net, engine


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_bits_are_the_same_however_often_and_in_however_many_calls(name):
    data = made_data.pictures(rows=512)
    nets = [_trained(data, OPTIMIZERS[name], calls)[0] for calls in (1, 1, 5)]
    assert state_equal(nets[0], nets[1]) and state_equal(nets[0], nets[2])


def test_bits_do_not_depend_on_the_number_of_threads():
    data, before = made_data.pictures(rows=1024, side=28), torch.get_num_threads()
    nets = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            net = network(sizes=(784, 300, 130, 4), dropout=0.5)
            engine = engine_of("native", net, data, OPTIMIZERS["momentum"])
            engine.steps(permutation(SEED, 0, len(data.x_train)), 256)
            nets.append(net)
    finally:
        torch.set_num_threads(before)
    assert state_equal(nets[0], nets[1]) and state_equal(nets[0], nets[2])


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
@pytest.mark.parametrize("after", ["native", "autograd"])
def test_a_run_goes_on_from_the_optimisers_state_dict(name, after):
    """With native to the bit; with autograd within what two orders of summing differ by."""
    data, optimizer = made_data.pictures(rows=400), OPTIMIZERS[name]
    batches = orders(data, 20)
    whole, half = network(dropout=0.5), network(dropout=0.5)
    engine = engine_of("native", whole, data, optimizer)
    first = engine_of("native", half, data, optimizer)
    for rows in batches:
        engine.step(rows)
    for rows in batches[:10]:
        first.step(rows)
    first.sync()
    again = network(seed=9, dropout=0.5)
    again.load_state_dict(half.state_dict())
    second = engine_of(after, again, data, optimizer)
    second.task.optimizer.load_state_dict(copy.deepcopy(first.task.optimizer.state_dict()))
    second.set_step(10)
    for rows in batches[10:]:
        second.step(rows)
    if after == "native":
        assert state_equal(whole, again)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimisers_state_is_what_torch_would_hold(name):
    data, states = made_data.pictures(rows=400), []
    for engine in ("native", "autograd"):
        made = engine_of(engine, network(), data, OPTIMIZERS[name])
        made.steps(permutation(SEED, 0, 300), BATCH)
        made.sync()
        states.append(made.task.optimizer.state_dict())
    assert states[0]["param_groups"] == states[1]["param_groups"]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=1e-3, atol=1e-6)


# the trainer


def config(**settings) -> TrainConfig:
    return TrainConfig(**{"epochs": 3, "batch_size": 32, "device": "cpu", "lr": 0.1} | settings)


def test_auto_takes_it_and_history_is_that_of_autograd():
    data = made_data.blobs()
    results = [
        fit(network(sizes=(12, 16, 3), dropout=0.5), data, config(engine=engine))
        for engine in ("auto", "autograd")
    ]
    assert [r.summary["engine"] for r in results] == ["native", "autograd"]
    for row, other in zip(*(r.history for r in results), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert row["train_accuracy"] == pytest.approx(other["train_accuracy"], abs=0.02)


class StopAt(Quiet):
    """Asks for an end, as Ctrl-C does, once that many steps are done."""

    def __init__(self, step: int):
        self.step = step

    def steps(self, position, steps):
        if position.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("settings", [dict(momentum=0.9), dict(optimizer="adamw", lr=0.01)])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, settings):
    settings = config(engine="native", epochs=4, batch_size=1, **settings)
    data = made_data.blobs()
    whole = fit(network(sizes=(12, 16, 3), dropout=0.3), data, settings)
    out = settings.replace(out=tmp_path / "run")
    first = fit(network(sizes=(12, 16, 3), dropout=0.3), data, out, progress=StopAt(200))
    assert first.interrupted and not state_equal(first.model, whole.model)
    resumed = settings.replace(resume=tmp_path / "run")
    second = fit(network(sizes=(12, 16, 3), dropout=0.3, seed=9), data, resumed)
    assert state_equal(second.model, whole.model)
    assert [row["train_loss"] for row in second.history] == [
        row["train_loss"] for row in whole.history
    ]


def test_smoothing_and_clipping_of_the_config_reach_both_engines():
    data, flags = made_data.blobs(), dict(label_smoothing=0.2, clip_norm=0.1)
    losses = []
    for settings in (
        dict(engine="native"),
        flags | dict(engine="native"),
        flags | dict(engine="autograd"),
    ):
        result = fit(network(sizes=(12, 16, 3)), data, config(**settings))
        losses.append(result.history[-1]["train_loss"])
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)
    assert losses[1] > 1.1 * losses[0]


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(TrainError, match="no longer finite in epoch 1.*smaller --lr"):
        fit(network(sizes=(12, 16, 3)), made_data.blobs(), config(lr=1e30, engine="native"))


def test_a_label_or_a_row_out_of_range_harms_nothing():
    data, net = made_data.blobs(), network(sizes=(12, 16, 3))
    engine = engine_of("native", net, data, OPTIMIZERS["sgd"])
    before = copy.deepcopy(net)
    with pytest.raises((ValueError, RuntimeError), match="order must hold rows of the data"):
        engine.step(torch.tensor([0, 10_000]))
    assert state_equal(net, before)
    data.y_train[0] = 3
    engine.step(torch.tensor([0]))
    assert engine.read()[0] != engine.read()[0]


# what it refuses


def _frozen(net):
    net[0].weight.requires_grad_(False)
    return net


def _shared(net):
    net[2].weight = net[0].weight
    return net


def _hooked(net):
    net[1].register_forward_hook(lambda *_: None)
    return net


def _normed(net):
    return fusedmlp.FusedSequential(net[0], nn.BatchNorm1d(12), *list(net)[1:])


def _plain(net):
    return nn.Sequential(net[0], nn.ReLU(), nn.Dropout(0.5), net[2])


REFUSED = {
    "frozen": (_frozen, {}, "0.weight is frozen"),
    "shared": (_shared, {}, "parameters share memory"),
    "hooked": (_hooked, {}, "it has hooks"),
    "normed": (_normed, {}, "BatchNorm1d"),
    "masks_of_torch": (_plain, {}, "fusedmlp.fuse"),
    "fp64": (lambda net: net.double(), {}, "must be fp32"),
    "bf16": (lambda net: net, {"precision": "bf16"}, "--precision is bf16"),
    "rows": (lambda net: net, {"x": torch.zeros(4, 5)}, "rows must have 12 values"),
    "loader": (lambda net: net, {"x": None}, "come from a loader"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_run_it_refuses_with_the_reason(case):
    change, settings, message = REFUSED[case]
    net = change(network(sizes=(12, 12, 3)))
    task = task_of(net, made_data.blobs(), OPTIMIZERS["sgd"], **settings)
    assert message in "; ".join(Native.refuses(task))
    with pytest.raises(TrainError, match="cannot be used"):
        choose("native", task)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
        lambda p: torch.optim.SGD(list(p)[:1], lr=0.1),
    ],
    ids=["adam", "amsgrad", "dampening", "some"],
)
def test_other_optimisers_are_refused_and_run_by_autograd(make):
    task = task_of(network(sizes=(12, 16, 3)), made_data.blobs(), make)
    assert Native.refuses(task) and choose("auto", task).name == "autograd"
