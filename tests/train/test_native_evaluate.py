"""The native step engine's own test of held-out rows: what the model itself says of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedmlp.spec import activations
from fusedmlp.train import RunOptions, TrainError, build, fit, loop, run_folder
from fusedmlp.train.console import Quiet
from fusedmlp.train.data.types import Data, Scaling, standardized
from fusedmlp.train.engines import native_evaluate
from fusedmlp.train.losses import loss_sums

from .. import made_data
from ..engines import OPTIMIZERS, config, engine_of, need_native, network

made_data.need("safetensors", "matplotlib")
need_native()

CASES = {
    "bytes": (lambda: made_data.pictures(rows=2000), (64, 24, 16, 4)),
    "standardised bytes": (lambda: standardized(made_data.pictures()), (64, 7, 4)),
    "table": (lambda: standardized(made_data.blobs(rows=1300)), (12, 33, 3)),
    "no hidden layer": (made_data.blobs, (12, 3)),
    "deep": (made_data.blobs, (12, 5, 70, 1, 9, 40, 3)),
    "regression": (made_data.line, (3, 16, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_accuracy_are_those_of_the_model(case):
    make, sizes = CASES[case]
    data = make()
    loss = "cross_entropy" if data.is_classes else "mse"
    net = network(sizes=sizes, dropout=0.5)
    # Training mode, and smoothing of the training loss: neither has a part in a test.
    engine = engine_of("native", net, data, OPTIMIZERS["sgd"], loss, label_smoothing=0.3)
    sums = engine.evaluate(data.x_test, data.y_test)
    wanted = loss_sums(loss, build.predict(net, data.x_test, data.scaling), data.y_test)
    torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=0)
    assert sums[1:].tolist() == wanted[1:].tolist()
    again = engine.evaluate(data.x_test, data.y_test)
    assert torch.equal(sums, again) and net.training


@pytest.mark.parametrize("activation", activations.NAMES)
def test_every_activation_is_that_of_the_model(activation):
    data = made_data.blobs(rows=800)
    net = network(sizes=(12, 20, 9, 3), activation=activation)
    engine = engine_of("native", net, data, OPTIMIZERS["sgd"])
    sums = engine.evaluate(data.x_test, data.y_test)
    wanted = loss_sums("cross_entropy", build.predict(net, data.x_test, data.scaling), data.y_test)
    torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("divisor", [255.0, 3.0, 127.5, 0.1, 1e-36, 3e38, -7.0])
def test_bytes_are_divided_as_pytorch_does(divisor):
    """A network that returns its input has no error at all against the quotient."""
    x = torch.arange(256, dtype=torch.uint8).repeat(5).unsqueeze(1)
    data = Data("made", x, x / divisor, scaling=Scaling(divisor))
    net = network(sizes=(1, 1))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.zero_()
    engine = engine_of("native", net, data, OPTIMIZERS["sgd"], "mse")
    assert engine.evaluate(data.x_train, data.y_train).tolist() == [0.0, 0.0, len(x)]


def test_it_changes_nothing_but_what_it_returns():
    data = made_data.blobs()
    net = network(sizes=(12, 16, 3), dropout=0.5)
    engine = engine_of("native", net, data, OPTIMIZERS["adamw"])
    engine.steps(torch.arange(100), 32)
    before = [p.detach().clone() for p in net.parameters()]
    engine.evaluate(data.x_test, data.y_test)
    assert all(map(torch.equal, before, net.parameters()))
    assert engine.read()[2] == 100 and engine.number == 4


def test_rows_that_it_does_not_take_are_left_to_the_model():
    data = made_data.blobs()
    net = network(sizes=(12, 16, 3))
    engine = engine_of("native", net, data, OPTIMIZERS["sgd"])
    assert engine.evaluate(data.x_test.double(), data.y_test) is None
    assert engine.evaluate(data.x_test.t().contiguous().t(), data.y_test) is None
    result = fit(
        net,
        (data.x_train, data.y_train, data.x_test.double(), data.y_test),
        config(engine="native"),
    )
    assert result.history[-1]["test_accuracy"] > 0.9


def test_a_run_does_not_call_the_model_for_its_tests(monkeypatch):
    calls = []
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: calls.append(1) or (0.0, 0.0))
    result = fit(network(sizes=(12, 16, 3)), made_data.blobs(), config(engine="native"))
    assert not calls and result.history[-1]["test_accuracy"] > 0.5
    fit(network(sizes=(12, 16, 3)), made_data.blobs(), config(engine="autograd"))
    assert len(calls) == 3


class Spoil(Quiet):
    """Makes a weight NaN after the third epoch, before its checkpoint is due."""

    def start(self, run):
        self.run = run

    def epoch(self, row):
        if row["epoch"] == 3:
            nn.init.constant_(self.run.task.model[0].weight, float("nan"))


def test_the_last_good_checkpoint_is_kept_when_the_loss_runs_away(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    settings, out = config(engine="native", epochs=5), RunOptions(out=tmp_path / "run")
    with pytest.raises(TrainError, match="no longer finite.*last good checkpoint"):
        fit(network(sizes=(12, 16, 3)), made_data.blobs(), settings, out, progress=Spoil())
    held = run_folder.load_checkpoint(tmp_path / "run")
    assert held["position"]["epoch"] == 2
    assert all(torch.isfinite(t).all() for t in held["model"].values())


def test_many_networks_are_evaluated_as_each_alone():
    data = made_data.blobs(rows=900)
    nets = [
        network(sizes=sizes, activation=act, dropout=0.4, seed=n)
        for n, (sizes, act) in enumerate(
            [((12, 3), "relu"), ((12, 40, 3), "prelu"), ((12, 7, 7, 7, 3), "gelu")]
        )
    ]
    rows = len(data.x_train)
    parts = [(torch.arange(n, rows, 2), torch.arange(n + 5)) for n in range(3)]
    sums = native_evaluate.evaluate(nets, data.x_train, data.y_train, parts, loss="cross_entropy")
    assert sums.shape == (3, 2, 3) and all(net.training for net in nets)
    for net, of_net, mine in zip(nets, parts, sums, strict=True):
        engine = engine_of("native", net, data, OPTIMIZERS["sgd"])
        for chosen, found in zip(of_net, mine, strict=True):
            alone = engine.evaluate(data.x_train[chosen], data.y_train[chosen])
            assert torch.equal(found, alone)
    one = native_evaluate.evaluate(
        nets[:1], data.x_train, data.y_train, parts[:1], loss="cross_entropy"
    )
    assert torch.equal(one[0], sums[0])


def test_many_networks_of_which_one_is_of_other_modules_are_left_to_the_caller():
    data = made_data.blobs()
    plain, odd = network(sizes=(12, 3)), nn.Sequential(nn.Linear(12, 3), nn.BatchNorm1d(3))
    rows = [(torch.arange(9),)] * 2

    def sums_of(models, x=data.x_train):
        return native_evaluate.evaluate(models, x, data.y_train, rows, loss="cross_entropy")

    assert sums_of([plain, plain]) is not None
    assert sums_of([plain, odd]) is None
    assert sums_of([plain, network(sizes=(11, 3))]) is None
    assert sums_of([plain, network(sizes=(12, 3)).double()]) is None
    assert sums_of([plain, plain], data.x_train.double()) is None
