"""fit: the trajectory of plain PyTorch, the seeds, the models and data it takes, its mistakes."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedmlp
from fusedmlp import rng
from fusedmlp.nn import FusedMLP
from fusedmlp.train import (
    TrainConfig,
    TrainError,
    UsageError,
    distributed,
    fit,
    model,
    predict,
    source,
    step,
)
from fusedmlp.train.data import permutation

from . import made_data


def config(**settings) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 32, "device": "cpu", "lr": 0.1} | settings)


def network(seed: int = 0, dropout=0.0, sizes=(12, 16, 3), **arguments) -> FusedMLP:
    torch.manual_seed(seed)
    first, *hidden, last = sizes
    return FusedMLP(first, hidden, last, dropout=dropout, **arguments)


def state_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# the trajectory


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
                keep = rng.dropout_mask(self.seed, stream, len(x), x.shape[1], p)
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
}


def errors(net: nn.Module, truth: nn.Module) -> tuple[float, float]:
    """(max, RMS) of the difference of all parameters, in fp64."""
    pairs = zip(net.parameters(), truth.parameters(), strict=True)
    gap = torch.cat([(a.double() - b.double()).flatten() for a, b in pairs]).detach()
    return gap.abs().max().item(), gap.square().mean().sqrt().item()


@pytest.mark.parametrize("ps", [(0.0, 0.0), (0.2, 0.5)], ids=["plain", "dropout"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_are_as_near_to_fp64_as_plain_pytorchs(name, ps):
    """After 1, 50 and 500 steps: error at most twice that of PyTorch's own loop in fp32."""
    settings, make = OPTIMIZERS[name]
    data, seed = made_data.pictures(rows=400), 5
    net = network(sizes=(64, 24, 16, 4), dropout=ps)
    truth, plain = (Plain(net, data, seed, ps, make, d) for d in (torch.float64, torch.float32))
    engine = engine_for(net, data, config(seed=seed, **settings))
    batches = batches_of(seed, len(data.x_train), 32, 500)
    for start, end in ((0, 1), (1, 50), (50, 500)):
        for loop in (truth, plain):
            loop.run(batches[start:end])
        for rows in batches[start:end]:
            engine.step(rows)
        budget, found = errors(plain.linears, truth.linears), errors(net, truth.linears)
        floor = torch.finfo(torch.float32).eps
        assert found[0] <= 2 * budget[0] + floor and found[1] <= 2 * budget[1] + floor, end


def engine_for(net: FusedMLP, data, settings: TrainConfig):
    """The autograd engine on all of the data, before its first step."""
    cpu = torch.device("cpu")
    data = source.on_device(data, net, cpu)
    task = step.Task(
        net.train(), model.optimizer_for(net, settings, "cross_entropy"), "cross_entropy", cpu
    )
    task.x, task.y, task.scaling, task.seed = (
        data.x_train,
        data.y_train,
        data.scaling,
        settings.seed,
    )
    engine = step.choose("autograd", task)
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
        return fit(model.build(settings, data), data, settings).model

    assert state_equal(trained(1, 3), trained(1, 77))
    assert not state_equal(trained(1, 3), trained(2, 3))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_global_generator_is_left_as_it_was(dropout):
    settings = config(dropout=(dropout,), hidden=(16,))
    before = torch.get_rng_state()
    data = made_data.blobs()
    fit(model.build(settings, data), data, settings)
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
    normal = model.build(settings, data)
    weights = torch.cat([m.weight.flatten() for m in normal if isinstance(m, nn.Linear)])
    assert abs(weights.std().item() - 0.02) < 1e-3
    assert all((m.bias == 0).all() for m in normal if isinstance(m, nn.Linear))
    default = model.build(settings.replace(init="default", init_std=0.01), data)
    bound = 1 / 8  # of nn.Linear: 1 / sqrt(64)
    assert 0.9 * bound < default[0].weight.abs().max().item() <= bound


def test_the_mask_of_a_step_is_that_of_its_global_step_and_layer():
    """Seed = run seed, stream = global step x layers + layer: seen through the gradient."""
    net = network(sizes=(12, 16, 8, 3), dropout=0.5)
    for p in net.parameters():
        p.data.fill_(0.1)
    task = step.Task(
        net, torch.optim.SGD(net.parameters(), lr=0.0), "cross_entropy", torch.device("cpu")
    )
    task.x, task.y, task.seed = torch.ones(5, 12), torch.zeros(5, dtype=torch.long), 42
    engine = step.choose("auto", task)
    engine.set_step(7)
    engine.step(torch.arange(5))
    first = rng.dropout_mask(42, 7 * 3, 5, 16, 0.5)
    alive = net[0].bias.grad != 0  # a hidden unit that all rows drop gets no gradient
    assert torch.equal(alive, first.any(0))
    engine.step(torch.arange(5))
    assert engine.state.tolist() == [42, 9 * 3]


# models and data


def test_a_users_tensors_and_model():
    data = made_data.blobs()
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    given = (data.x_train, data.y_train, data.x_test, data.y_test)
    result = fit(net, given, config(epochs=8))
    assert result.model is net and len(result.history) == 8
    assert result.history[-1]["test_accuracy"] > 0.9
    assert result.folder is None and result.paths == {}


def test_a_fused_model_of_the_users_own():
    data = made_data.blobs()
    net = fusedmlp.fuse(
        nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
    )
    assert (
        fit(net, (data.x_train, data.y_train), config(epochs=8)).history[-1]["train_accuracy"] > 0.9
    )


def test_regression_with_one_column_and_flat_targets():
    data = made_data.line()
    for y in (data.y_train, data.y_train.flatten()):
        net = network(sizes=(3, 16, 1))
        result = fit(net, (data.x_train, y), config(epochs=30, lr=0.05))
        assert result.history[-1]["train_accuracy"] is None
        assert result.history[-1]["train_loss"] < 0.05


def test_a_model_that_returns_flat_outputs_is_not_broadcast():
    """(B,) against (B, 1) would silently average over all pairs."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x):
            return self.linear(x).flatten()

    data = made_data.line()
    result = fit(Flat(), (data.x_train, data.y_train), config(epochs=40))
    assert result.history[-1]["train_loss"] < 0.02


def test_a_standardized_target_is_learned_whatever_its_size():
    data = made_data.line()
    y = 1e6 * data.y_train + 3e7
    with pytest.raises(TrainError, match="no longer finite.*--standardize"):
        fit(network(sizes=(3, 16, 1)), (data.x_train, y), config(epochs=20))
    result = fit(network(sizes=(3, 16, 1)), (data.x_train, y), config(epochs=20, standardize=True))
    assert result.history[-1]["train_loss"] < 0.05


def test_validation_rows_are_not_trained_on():
    data = made_data.blobs()
    result = fit(network(), (data.x_train, data.y_train), config(val_split=0.5))
    assert result.history[-1]["val_loss"] is not None
    assert result.history[-1]["test_loss"] is None


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_any_batch_size_works(batch):
    result = fit(network(), made_data.blobs(rows=40), config(batch_size=batch, epochs=1))
    assert result.summary["epochs"] == 1


def test_uint8_rows_stay_uint8_and_are_scaled():
    data = made_data.pictures()
    result = fit(
        network(sizes=(64, 16, 4)), (data.x_train, data.y_train), config(epochs=10, lr=0.5)
    )
    assert result.history[-1]["train_accuracy"] > 0.9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bit_arithmetic_keeps_fp32_weights_and_learns(precision):
    net = network(dropout=0.1)
    result = fit(net, made_data.blobs(), config(epochs=10, precision=precision))
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert result.history[-1]["test_accuracy"] > 0.9


def test_an_fp64_model_is_trained_in_fp64():
    net = network().double()
    fit(net, made_data.blobs(), config())
    assert all(p.dtype == torch.float64 for p in net.parameters())


def test_the_backend_asked_for_is_used_and_the_setting_put_back():
    from fusedmlp import dispatch

    before = dispatch.explicit(None)
    result = fit(network(dropout=0.5), made_data.blobs(), config(backend="reference"))
    assert result.summary["backend"] == "reference"
    assert dispatch.explicit(None) == before


# loaders


def _loader(data, **arguments) -> DataLoader:
    return DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=32, **arguments)


def test_a_loader_trains_as_the_tensors_do():
    data = made_data.blobs()
    test = DataLoader(TensorDataset(data.x_test, data.y_test), batch_size=16)
    result = fit(network(dropout=0.1), (_loader(data, shuffle=True), test), config(epochs=8))
    assert result.history[-1]["test_accuracy"] > 0.9
    again = fit(network(dropout=0.1), (_loader(data, shuffle=True), test), config(epochs=8))
    assert state_equal(result.model, again.model)


def test_any_iterable_of_batches_will_do():
    data = made_data.blobs()

    class Batches:
        def __iter__(self):
            yield from zip(data.x_train.split(32), data.y_train.split(32), strict=True)

    assert len(fit(network(), Batches(), config()).history) == 2


# mistakes


def _blob_tensors(**changes):
    data = made_data.blobs()
    parts = {"x": data.x_train, "y": data.y_train}
    for name, change in changes.items():
        parts[name] = change(parts[name])
    return parts["x"], parts["y"]


MISTAKES = {
    "other_rows": (lambda: _blob_tensors(y=lambda y: y[:-1]), TrainError, "one target a row"),
    "no_rows": (lambda: _blob_tensors(x=lambda x: x[:0], y=lambda y: y[:0]), TrainError, "one row"),
    "nan": (lambda: _blob_tensors(x=lambda x: x / 0 * 0), TrainError, "finite"),
    "class_too_large": (
        lambda: _blob_tensors(y=lambda y: y + 5),
        TrainError,
        "at least 8 outputs for classes 0 to 7, got 3",
    ),
    "negative_class": (lambda: _blob_tensors(y=lambda y: y - 1), TrainError, "classes from 0 on"),
    "other_width": (lambda: _blob_tensors(x=lambda x: x[:, :5]), TrainError, "cannot take a row"),
    "not_data": (lambda: 3, TypeError, "data must be"),
    "empty_loader": (lambda: [[]], TrainError, "at least one batch"),
    "loader_of_one": (lambda: DataLoader(torch.ones(8, 12)), TypeError, r"\(x, y\) batches"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_the_data_is_named(case):
    make, error, message = MISTAKES[case]
    with pytest.raises(error, match=message):
        fit(network(), make(), config())


SETTINGS = {
    "dropout_count": dict(hidden=(8, 8), dropout=(0.1, 0.2, 0.3)),
    "dropout_range": dict(dropout=(1.5,)),
    "dropout_nan": dict(dropout=(float("nan"),)),
    "width": dict(hidden=(0,)),
    "lr": dict(lr=-1.0),
    "lr_nan": dict(lr=float("nan")),
    "epochs": dict(epochs=0),
    "batch": dict(batch_size=0),
    "val_split": dict(val_split=1.0),
    "seed": dict(seed=2**63),
    "activation": dict(activation="swish"),
    "momentum_of_adamw": dict(optimizer="adamw", momentum=0.9),
    "std_of_default": dict(init="default", init_std=0.5),
    "tf32_on_cpu": dict(precision="tf32", device="cpu"),
    "target_of_images": dict(target="price"),
    "overwrite_what": dict(overwrite=True),
    "resume_and_out": dict(resume="a", out="b"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_cannot_be_is_a_usage_error(case):
    with pytest.raises(UsageError):
        TrainConfig(**SETTINGS[case]).check()


def test_a_batch_smaller_than_the_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "current", lambda: distributed.World(1, 4))
    with pytest.raises(UsageError, match="--batch-size must be at least .*processes, 4, got 3"):
        fit(network(), made_data.blobs(), config(batch_size=3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(TrainError, match="--device cuda was asked for, but .*--device cpu"):
        fit(network(), made_data.blobs(), config(device="cuda"))


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(TrainError, match="no longer finite in epoch 1.*smaller --lr than 1e"):
        fit(network(), made_data.blobs(), config(lr=1e30))


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
