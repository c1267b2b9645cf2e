"""fit: the trajectory of plain PyTorch, the seeds, the models and data it takes, its mistakes."""

from __future__ import annotations

import functools
import os
import signal
import statistics
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedmlp.nn import FusedMLP
from fusedmlp.spec import philox
from fusedmlp.train import TrainConfig, build, engines, fit, predict
from fusedmlp.train.data import inputs
from fusedmlp.train.data.types import permutation
from fusedmlp.train.process import seed_generators
from fusedmlp.train.task import Task

from .. import made_data


def config(**settings) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 32, "device": "cpu", "lr": 0.1} | settings)


def network(seed: int = 0, dropout=0.0, sizes=(12, 16, 3), **arguments) -> FusedMLP:
    torch.manual_seed(seed)
    first, *hidden, last = sizes
    return FusedMLP(first, hidden, last, dropout=dropout, **arguments)


def state_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# the trajectory


@functools.lru_cache(maxsize=2000)
def mask(*arguments) -> torch.Tensor:
    """For the runs in fp64 and fp32, which have the same ones."""
    return philox.dropout_mask(*arguments)


class Plain:
    """The textbook loop over nn.Linear, with the package's masks, in any dtype."""

    def __init__(self, net: FusedMLP, data, seed: int, ps, optimizer, dtype):
        self.linears = nn.ModuleList(copied(m, dtype) for m in net if isinstance(m, nn.Linear))
        self.ps, self.seed, self.step = ps, seed, 0
        self.optimizer = optimizer(self.linears.parameters())
        self.x, self.y = data.scaling(data.x_train).to(dtype), data.y_train

    def forward(self, x):
        for layer, (linear, p) in enumerate(zip(self.linears, self.ps, strict=False)):
            x = F.relu(linear(x))
            if p > 0:
                stream = self.step * len(self.linears) + layer
                keep = mask(self.seed, stream, len(x), x.shape[1], p)
                x = torch.where(keep, x / (1 - p), torch.zeros_like(x))
        return self.linears[-1](x)

    def run(self, batches) -> None:
        for rows in batches:
            loss = F.cross_entropy(self.forward(self.x[rows]), self.y[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1


def copied(linear: nn.Linear, dtype) -> nn.Linear:
    again = nn.Linear(linear.in_features, linear.out_features, dtype=dtype)
    again.load_state_dict(linear.state_dict())
    return again


def batches_of(seed: int, rows: int, batch: int, steps: int) -> list[torch.Tensor]:
    """The rows of each step, over as many epochs as the steps take."""
    per_epoch = -(-rows // batch)
    epochs = range(-(-steps // per_epoch))
    return [b for epoch in epochs for b in permutation(seed, epoch, rows).split(batch)][:steps]


OPTIMIZERS = {
    "sgd": (dict(), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        dict(momentum=0.9, weight_decay=1e-3, lr=0.05),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    ),
    "adamw": (
        dict(optimizer="adamw", lr=2e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1),
    ),
    "adam": (
        dict(optimizer="adam", lr=2e-3, weight_decay=1e-2),
        lambda p: torch.optim.Adam(p, lr=2e-3, weight_decay=1e-2),
    ),
}


def errors(net: nn.Module, truth: nn.Module) -> tuple[float, float]:
    """(max, RMS) of the difference of all parameters, in fp64."""
    pairs = zip(net.parameters(), truth.parameters(), strict=True)
    gap = torch.cat([(a.double() - b.double()).flatten() for a, b in pairs]).detach()
    return gap.abs().max().item(), gap.square().mean().sqrt().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, ps",
    [("sgd", (0.0, 0.0)), *((name, (0.2, 0.5)) for name in OPTIMIZERS)],
    ids=["sgd", *(f"{name}-dropout" for name in OPTIMIZERS)],
)
def test_parameters_are_as_near_to_fp64_as_plain_pytorchs(name, ps):
    """After 1, 50 and 500 steps: max and RMS error at most twice that of PyTorch's loop in fp32.

    Medians over seeds: one hidden unit that a rounding puts on the other side of 0 decides the
    ratio of two single runs.
    """
    settings, make = OPTIMIZERS[name]
    data, ends = made_data.pictures(rows=400), (1, 50, 500)
    ratios: dict[tuple, list[float]] = {}
    for seed in range(5):
        net = network(seed, sizes=(64, 24, 16, 4), dropout=ps)
        truth, plain = (Plain(net, data, seed, ps, make, d) for d in (torch.float64, torch.float32))
        engine = engine_for(net, data, config(seed=seed, **{"weight_decay": 0.0} | settings))
        batches = batches_of(seed, len(data.x_train), 32, 500)
        for start, end in zip((0, *ends), ends, strict=False):
            for loop in (truth, plain):
                loop.run(batches[start:end])
            for rows in batches[start:end]:
                engine.step(rows)
            pairs = zip(
                errors(net, truth.linears), errors(plain.linears, truth.linears), strict=True
            )
            for kind, (found, budget) in zip(("max", "RMS"), pairs, strict=True):
                ratios.setdefault((end, kind), []).append(found / budget)
    middle = {key: statistics.median(values) for key, values in ratios.items()}
    assert all(ratio <= 2 for ratio in middle.values()), middle


def engine_for(net: FusedMLP, data, settings: TrainConfig):
    """The autograd engine on all of the data, before its first step."""
    cpu = torch.device("cpu")
    data = inputs.on_device(data, net, cpu)
    task = Task(
        net.train(), build.optimizer_for(net, settings, "cross_entropy"), "cross_entropy", cpu
    )
    task.x, task.y, task.scaling, task.seed = (
        data.x_train,
        data.y_train,
        data.scaling,
        settings.seed,
    )
    engine = engines.choose("autograd", task)
    engine.set_step(0)
    return engine


def test_fit_takes_the_steps_of_the_textbook_loop():
    data, seed, net = made_data.blobs(), 3, network()
    truth, plain = (
        Plain(net, data, seed, (0.0,), OPTIMIZERS["sgd"][1], d)
        for d in (torch.float64, torch.float32)
    )
    for loop in (truth, plain):
        loop.run(batches_of(seed, len(data.x_train), 32, 3 * -(-len(data.x_train) // 32)))
    result = fit(net, data, config(seed=seed, epochs=3))
    budget, found = errors(plain.linears, truth.linears), errors(net, truth.linears)
    assert found[0] <= 2 * budget[0] and found[1] <= 2 * budget[1]
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_history_is_what_evaluation_by_hand_finds():
    data, net = made_data.blobs(), network()
    last = fit(net, data, config(val_split=0.0)).history[-1]
    with torch.no_grad():
        outputs = net.eval()(data.x_test)
    assert last["test_loss"] == pytest.approx(
        F.cross_entropy(outputs, data.y_test).item(), rel=1e-5
    )
    assert last["test_accuracy"] == pytest.approx(
        (outputs.argmax(1) == data.y_test).float().mean().item()
    )
    assert last["val_loss"] is None


# seeds


def test_the_seed_alone_decides_weights_order_and_masks():
    """Neither the global generators, nor anything else that ran before, changes a run."""

    def trained(seed, noise):
        torch.manual_seed(noise)
        torch.rand(noise)
        settings = config(seed=seed, dropout=(0.5,), hidden=(16,), init="default")
        data = made_data.blobs()
        return fit(build.build_network(settings, data), data, settings).model

    assert state_equal(trained(1, 3), trained(1, 77))
    assert not state_equal(trained(1, 3), trained(2, 3))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_global_generator_is_left_as_it_was(dropout):
    settings = config(dropout=(dropout,), hidden=(16,))
    before = torch.get_rng_state()
    data = made_data.blobs()
    fit(build.build_network(settings, data), data, settings)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_users_model_with_plain_dropout_repeats_too():
    def trained():
        net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3))
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p))
        return fit(net, made_data.blobs(), config()).model

    first = trained()
    torch.rand(100)
    assert state_equal(first, trained())


def test_initial_weights_are_what_init_says():
    data = made_data.pictures()
    settings = TrainConfig(hidden=(400,), init_std=0.02, seed=9)
    normal = build.build_network(settings, data)
    weights = torch.cat([m.weight.flatten() for m in normal if isinstance(m, nn.Linear)])
    assert abs(weights.std().item() - 0.02) < 1e-3
    assert all((m.bias == 0).all() for m in normal if isinstance(m, nn.Linear))
    default = build.build_network(settings.replace(init="default", init_std=None), data)
    bound = 1 / 8  # of nn.Linear: 1 / sqrt(64)
    assert 0.9 * bound < default[0].weight.abs().max().item() <= bound


def test_seeding_gives_torchs_numbers_and_queues_nothing_for_other_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("of every GPU"))
    with torch.random.fork_rng(devices=[]):
        seed_generators(11, torch.device("cpu"))
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(11)))


def test_the_mask_of_a_step_is_that_of_its_global_step_and_layer():
    """Seed = run seed, stream = global step x layers + layer: seen through the gradient."""
    net = network(sizes=(12, 16, 8, 3), dropout=0.5)
    for p in net.parameters():
        p.data.fill_(0.1)
    task = Task(
        net, torch.optim.SGD(net.parameters(), lr=0.0), "cross_entropy", torch.device("cpu")
    )
    task.x, task.y, task.seed = torch.ones(5, 12), torch.zeros(5, dtype=torch.long), 42
    engine = engines.choose("autograd", task)
    engine.set_step(7)
    engine.step(torch.arange(5))
    first = philox.dropout_mask(42, 7 * 3, 5, 16, 0.5)
    alive = net[0].bias.grad != 0  # a hidden unit that all rows drop gets no gradient
    assert torch.equal(alive, first.any(0))
    engine.step(torch.arange(5))
    assert engine.state.tolist() == [42, 9 * 3]


# interruption


class Interrupt(nn.Module):
    """Sends this process Ctrl-C in a given forward pass."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.count = at, 0

    def forward(self, x):
        self.count += self.training
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return x


def test_ctrl_c_ends_after_the_step_and_puts_the_handler_back():
    before = signal.getsignal(signal.SIGINT)
    net = nn.Sequential(Interrupt(8), network())
    result = fit(net, made_data.blobs(), config(epochs=500))
    assert result.interrupted and len(result.history) < 400
    assert signal.getsignal(signal.SIGINT) is before


def test_fit_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(
        target=lambda: found.append(fit(network(), made_data.blobs(), config()))
    )
    thread.start()
    thread.join()
    assert len(found[0].history) == 2


def test_predict_leaves_the_mode_and_scales_rows():
    data = made_data.pictures()
    net = network(sizes=(64, 16, 4), dropout=0.5).train()
    outputs = predict(net, data.x_test, data.scaling)
    assert net.training and not outputs.requires_grad
    torch.testing.assert_close(outputs, net.eval()(data.x_test / 255))
