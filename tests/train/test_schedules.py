"""Learning-rate schedules: torch's own values, in every engine, through a stop in the middle."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from fusedmlp.train import RunOptions, TrainConfig, UsageError, fit, run_folder
from fusedmlp.train.console import Quiet
from fusedmlp.train.loop import Result
from fusedmlp.train.schedule import Schedule

from .. import made_data
from ..engines import NATIVE_OPTIMIZERS, assert_near_fp64, config, native_op, network, state_equal

made_data.need("safetensors", "matplotlib")

STEPS, WARMUP = 120, 25


def torchs(kind: str, warmup: int, steps: int):
    """optimizer -> the scheduler of torch that schedule.py names for this."""

    def make(optimizer):
        rest = steps - warmup
        after = {
            "constant": lambda: lr_scheduler.ConstantLR(optimizer, factor=1.0),
            "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, T_max=rest),
            "linear": lambda: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=rest),
        }[kind]
        if warmup == 0:
            return after()
        first = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
        return lr_scheduler.SequentialLR(optimizer, [first, after()], milestones=[warmup])

    def quiet(optimizer):
        with warnings.catch_warnings():
            # SequentialLR itself calls its parts in a way that they deprecate.
            warnings.simplefilter("ignore")
            return make(optimizer)

    return quiet


@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
def test_every_factor_is_that_of_torchs_own_scheduler(kind, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torchs(kind, warmup, STEPS)(optimizer)
    wanted = []
    for _ in range(STEPS):
        wanted.append(optimizer.param_groups[0]["lr"] / 0.3)
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
    found = Schedule(kind, STEPS, warmup).factors(0, STEPS)
    # torch multiplies its way along, from step to step, in double.
    torch.testing.assert_close(found, torch.tensor(wanted).double(), rtol=1e-6, atol=1e-7)
    assert found.min() > 0 and found.max() == 1


@pytest.mark.skipif(native_op.unavailable() is not None, reason="needs the native engine")
@pytest.mark.parametrize("kind, warmup", [("cosine", WARMUP), ("linear", 0), ("constant", WARMUP)])
@pytest.mark.parametrize("name", ["nesterov", "adamw", "adam", "epsilon_hat"])
def test_the_native_engine_keeps_to_plain_pytorchs_trajectory(name, kind, warmup):
    assert_near_fp64(
        made_data.pictures(rows=400),
        NATIVE_OPTIMIZERS[name],
        ends=(1, STEPS),
        schedule=Schedule(kind, STEPS, warmup),
        scheduler=torchs(kind, warmup, STEPS),
        dropout=(0.2, 0.5),
    )


def trained(engine: str, **settings) -> Result:
    net = network(sizes=(12, 16, 3), dropout=0.3)
    return fit(net, made_data.blobs(), config(engine=engine, **settings))


@pytest.mark.skipif(native_op.unavailable() is not None, reason="needs the native engine")
@pytest.mark.parametrize("optimizer", [dict(momentum=0.9), dict(optimizer="adamw", lr=0.01)])
def test_engines_agree_and_the_flags_do_something(optimizer):
    flags = dict(lr_schedule="cosine", warmup_epochs=0.5)
    results = [trained(engine, **flags, **optimizer) for engine in ("native", "autograd")]
    for a, b in zip(*(r.model.parameters() for r in results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    other = trained("native", **optimizer)
    assert not state_equal(results[0].model, other.model)


class StopAt(Quiet):
    """Asks for an end once that many steps are done."""

    def __init__(self, step: int):
        self.step = step

    def start(self, run):
        self.run = run

    def steps(self, position, steps):
        self.run.stop.asked |= position.global_step >= self.step


@pytest.mark.parametrize("engine", ["native", "autograd"])
def test_a_run_goes_on_in_the_middle_of_a_schedule_to_the_same_bits(tmp_path, engine):
    if engine == "native" and native_op.unavailable() is not None:
        pytest.skip("needs the native engine")
    settings = config(
        engine=engine,
        batch_size=1,
        epochs=2,
        optimizer="adamw",
        lr=0.01,
        lr_schedule="cosine",
        warmup_epochs=0.3,
    )
    data = made_data.blobs()
    whole = fit(network(sizes=(12, 16, 3), dropout=0.3), data, settings)
    out = tmp_path / "run"
    stop = StopAt(100)
    first = fit(
        network(sizes=(12, 16, 3), dropout=0.3), data, settings, RunOptions(out=out), progress=stop
    )
    assert first.interrupted and not state_equal(first.model, whole.model)
    # The checkpoint holds the rate that the schedule multiplies, not that of the last step.
    assert run_folder.load_checkpoint(out)["optimizer"]["param_groups"][0]["lr"] == 0.01
    again = network(sizes=(12, 16, 3), dropout=0.3, seed=9)
    second = fit(again, data, settings, RunOptions(resume=out))
    assert state_equal(second.model, whole.model)


def test_a_resumed_schedule_keeps_its_end(tmp_path):
    data, out = made_data.blobs(), tmp_path / "run"
    settings = config(epochs=2, lr_schedule="linear")
    fit(network(sizes=(12, 16, 3)), data, settings, RunOptions(out=out))
    with pytest.raises(UsageError, match="--epochs must stay 2 as in the run, got 5"):
        fit(network(sizes=(12, 16, 3)), data, settings.replace(epochs=5), RunOptions(resume=out))
    with pytest.raises(UsageError, match="has done its 2 epochs; its --lr-schedule linear has end"):
        fit(network(sizes=(12, 16, 3)), data, settings, RunOptions(resume=out))
    with pytest.raises(UsageError, match="--lr-schedule must stay linear"):
        fit(
            network(sizes=(12, 16, 3)),
            data,
            config(epochs=2, lr_schedule="cosine"),
            RunOptions(resume=out),
        )


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(warmup_epochs=-1.0), "--warmup-epochs must be a number of at least 0"),
        (dict(warmup_epochs=4.0, epochs=3), "--warmup-epochs must be at most --epochs, 3, got 4"),
        (dict(lr_schedule="step"), "--lr-schedule must be one of constant, cosine, linear"),
    ],
)
def test_settings_that_cannot_be_are_usage_errors(settings, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**settings).check()


def test_a_warm_up_longer_than_the_default_epochs_is_a_usage_error():
    with pytest.raises(UsageError, match="--warmup-epochs must be at most --epochs, 10, got 11"):
        fit(network(sizes=(12, 16, 3)), made_data.blobs(), TrainConfig(warmup_epochs=11.0))


def test_a_loader_needs_a_length_for_a_schedule():
    data = made_data.blobs()
    loader = DataLoader(TensorDataset(data.x_train, data.y_train), 60)
    result = fit(network(sizes=(12, 16, 3)), loader, config(lr_schedule="cosine"))
    assert len(result.history) == 3

    class Endless:
        def __iter__(self):
            return iter(loader)

    with pytest.raises(UsageError, match="a loader that has a length"):
        fit(network(sizes=(12, 16, 3)), Endless(), config(lr_schedule="cosine"))
