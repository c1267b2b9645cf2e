"""The native step engine: exact repeats, continuations, and its place in the trainer."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch

from fusedmlp.train import RunOptions, TrainError, fit
from fusedmlp.train.console import Quiet
from fusedmlp.train.data.types import Data, permutation

from .. import made_data
from ..engines import (
    BATCH,
    NATIVE_OPTIMIZERS,
    OPTIMIZERS,
    SEED,
    config,
    engine_of,
    need_native,
    network,
    orders,
    state_equal,
)

made_data.need("safetensors", "matplotlib")
need_native()


def _trained(data: Data, optimizer, calls: int, dropout=0.5):
    net = network(dropout=dropout)
    engine = engine_of("native", net, data, optimizer)
    order = torch.cat([permutation(SEED, e, len(data.x_train)) for e in range(6)])
    for part in order.split(len(order) // calls // BATCH * BATCH):
        engine.steps(part, BATCH)
    return net, engine


@pytest.mark.parametrize("name", ["nesterov", "adamw", "adam", "epsilon_hat"])
def test_bits_are_the_same_however_often_and_in_however_many_calls(name):
    data = made_data.pictures(rows=512)
    nets = [_trained(data, NATIVE_OPTIMIZERS[name], calls)[0] for calls in (1, 1, 5)]
    assert state_equal(nets[0], nets[1]) and state_equal(nets[0], nets[2])


@pytest.mark.parametrize("batch, rows", [(1100, 1105), (1100, 1120), (256, 400), (40, 71)])
def test_a_last_batch_has_the_same_bits_in_a_call_of_its_own(batch, rows):
    """Few rows and many are multiplied and summed in other ways; who asks must not decide which."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 1024, generator=generator)
    data = Data("made", x, torch.randint(0, 10, (rows,), generator=generator))
    nets = []
    for cut in (rows, batch):
        net = network(sizes=(1024, 300, 1024, 10), dropout=0.5)
        engine = engine_of("native", net, data, OPTIMIZERS["momentum"])
        for part in permutation(SEED, 0, rows).split(cut):
            engine.steps(part, batch)
        nets.append(net)
    assert state_equal(*nets)


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


@pytest.mark.parametrize("name", ["nesterov", "adamw", "adam", "epsilon_hat"])
@pytest.mark.parametrize(
    "before, after", [("native", "native"), ("native", "autograd"), ("autograd", "native")]
)
def test_a_run_goes_on_from_the_optimisers_state_dict(name, before, after):
    """With native to the bit; with autograd within what two orders of summing differ by."""
    data, optimizer = made_data.pictures(rows=400), NATIVE_OPTIMIZERS[name]
    batches = orders(data, 20)
    whole, half = network(dropout=0.5), network(dropout=0.5)
    engine = engine_of("native", whole, data, optimizer)
    first = engine_of(before, half, data, optimizer)
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
    if before == after:
        assert state_equal(whole, again)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NATIVE_OPTIMIZERS)
def test_the_optimisers_state_is_what_torch_would_hold(name):
    data, states = made_data.pictures(rows=400), []
    for engine in ("native", "autograd"):
        made = engine_of(engine, network(), data, NATIVE_OPTIMIZERS[name])
        made.steps(permutation(SEED, 0, 300), BATCH)
        made.sync()
        states.append(made.task.optimizer.state_dict())
    assert states[0]["param_groups"] == states[1]["param_groups"]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=1e-3, atol=1e-6)


# the trainer


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


@pytest.mark.parametrize(
    "settings",
    [dict(momentum=0.9), *(dict(optimizer=name, lr=0.01) for name in ("adam", "adamw"))],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, settings):
    settings = config(engine="native", epochs=4, batch_size=1, **settings)
    data = made_data.blobs()
    whole = fit(network(sizes=(12, 16, 3), dropout=0.3), data, settings)
    net, out = network(sizes=(12, 16, 3), dropout=0.3), RunOptions(out=tmp_path / "run")
    first = fit(net, data, settings, out, progress=StopAt(200))
    assert first.interrupted and not state_equal(first.model, whole.model)
    net, out = network(sizes=(12, 16, 3), dropout=0.3, seed=9), RunOptions(resume=tmp_path / "run")
    second = fit(net, data, settings, out)
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
