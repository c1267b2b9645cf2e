"""The native step engine: the trajectory of plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fusedmlp import fuse
from fusedmlp.spec import activations
from fusedmlp.train.data.types import Data, permutation, standardized
from fusedmlp.train.losses import loss_sums
from fusedmlp.train.optim import EpsilonHatAdam

from .. import made_data
from ..engines import (
    NATIVE_OPTIMIZERS,
    OPTIMIZERS,
    SEED,
    assert_near_fp64,
    engine_of,
    need_native,
    network,
)

made_data.need("safetensors", "matplotlib")
need_native()


@pytest.mark.parametrize("dropout", [0.0, (0.2, 0.5)], ids=["plain", "dropout"])
@pytest.mark.parametrize("name", NATIVE_OPTIMIZERS)
def test_parameters_are_as_near_to_fp64_as_plain_pytorchs(name, dropout):
    data = made_data.pictures(rows=400)
    assert_near_fp64(data, NATIVE_OPTIMIZERS[name], dropout=dropout)


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


@pytest.mark.parametrize("name", ["sgd", "adam", "epsilon_hat"])
def test_gradient_clipping_keeps_to_the_trajectory(name):
    for clip in (0.05, 100.0):
        optimizer = NATIVE_OPTIMIZERS[name]
        assert_near_fp64(made_data.pictures(rows=400), optimizer, ends=(1, 50), clip=clip)


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


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "logistic"])
def test_weights_of_rows_keep_to_the_trajectory(loss):
    if loss == "cross_entropy":
        data = made_data.blobs(rows=400)
        settings = {"sizes": (12, 24, 3), "smoothing": 0.1}
    else:
        data = made_data.labels(rows=400, features=24, outputs=3)
        settings = {"sizes": (24, 16, 3), "loss": loss}
    weights = torch.rand(len(data.x_train), generator=torch.Generator().manual_seed(0)) * 10
    weights[::3] = 0.0
    assert_near_fp64(data, OPTIMIZERS["momentum"], ends=(1, 50), weights=weights, **settings)


@pytest.mark.parametrize("outputs", [1, 3, 20], ids=["one", "part", "more"])
def test_logistic_losses_keep_to_the_trajectory(outputs):
    """Of fewer and of more outputs than a vector holds."""
    data = made_data.labels(rows=400, features=24, outputs=outputs)
    sizes, optimizer = (24, 16, outputs), OPTIMIZERS["sgd"]
    assert_near_fp64(data, optimizer, ends=(1, 50), loss="logistic", sizes=sizes)
    engines = []
    for name in ("native", "autograd"):
        net = network(sizes=sizes)
        engines.append(engine_of(name, net, data, optimizer, loss="logistic"))
        engines[-1].steps(permutation(SEED, 0, len(data.x_train)), 64)
    (loss, *rest), (wanted, *others) = (engine.read() for engine in engines)
    assert loss == pytest.approx(wanted, rel=1e-5) and rest == others == [0.0, 300]
    sums = engines[0].evaluate(data.x_test, data.y_test)
    wanted = loss_sums("logistic", net(data.x_test), data.y_test)
    torch.testing.assert_close(sums, wanted, rtol=1e-4, atol=0)


def test_logistic_losses_of_large_outputs_are_those_of_torch():
    x = torch.tensor([[-1e30], [-100.0], [-20.0], [0.0], [20.0], [100.0], [1e30]])
    x, y = x.repeat(2, 1), torch.tensor([0.0, 1.0]).repeat_interleave(7).unsqueeze(1)
    losses = []
    for name in ("native", "autograd"):
        net = nn.Sequential(nn.Linear(1, 1))
        nn.init.ones_(net[0].weight)
        nn.init.zeros_(net[0].bias)
        engine = engine_of(name, net, Data("made", x, y), _still, loss="logistic")
        losses.append([])
        for row in range(len(x)):
            engine.step(torch.tensor([row]))
            losses[-1].append(engine.read()[0])
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def _still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def test_epsilon_hat_is_scikit_learns_formula():
    rate, first, second, eps = 0.1, 0.8, 0.95, 0.5
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64))
    w, m, v = p.detach().clone(), 0.0, 0.0
    optimizer = EpsilonHatAdam([p], lr=rate, betas=(first, second), eps=eps)
    for t in range(1, 20):
        g = torch.randn(50, generator=generator, dtype=torch.float64)
        m, v = first * m + (1 - first) * g, second * v + (1 - second) * g**2
        w -= rate * (1 - second**t) ** 0.5 / (1 - first**t) * m / (v.sqrt() + eps)
        p.grad = g
        optimizer.step()
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-13)
    assert optimizer.param_groups[0]["eps"] == eps


@pytest.mark.parametrize(
    "sizes, batch",
    [
        ((1, 7, 1), 33),
        ((5, 1), 1),
        ((3, 300, 2), 1),
        ((70, 33, 65, 31), 97),
        ((600, 64, 160, 3), 97),
    ],
)
def test_sizes_that_fit_no_tile_agree_with_autograd(sizes, batch):
    """One feature, one class, one row, no hidden layer, and a last batch of few rows, whose
    products read weights where they belong and not in panels."""
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


# Wide enough that a batch is several blocks of rows, each on a thread of its own; 1024 apart is
# where rows would share a set of the cache, 40 and 100 are where masks are drawn for several rows.
_BLOCKS = {
    "relu, dropout": dict(sizes=(1024, 40, 1024, 10), dropout=(0.3, 0.5)),
    "gelu, dropout": dict(sizes=(1000, 100, 512, 10), dropout=(0.5, 0.2), activation="gelu"),
    "a slope a channel": dict(sizes=(1024, 1024, 7)),
    "prelu": dict(sizes=(500, 2048, 10), dropout=0.2, activation="prelu"),
    "tanh, clipped": dict(sizes=(1024, 1024, 10), dropout=0.5, activation="tanh", clip_norm=0.1),
    "all dropped": dict(sizes=(1024, 1024, 10), dropout=1.0),
    "no whole tile": dict(sizes=(1003, 313, 217, 10)),
}


@pytest.mark.parametrize("rule", ["decay", "nesterov"])
@pytest.mark.parametrize("case", _BLOCKS)
def test_batches_of_several_blocks_agree_with_autograd(case, rule):
    settings = dict(_BLOCKS[case])
    clip = settings.pop("clip_norm", 0.0)
    sizes = settings["sizes"]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, sizes[0], generator=generator)
    y = torch.randint(0, sizes[-1], (300,), generator=generator)
    first = network(**settings)
    if case == "a slope a channel":
        channels = nn.PReLU(sizes[1], init=0.1)
        first = fuse(nn.Sequential(nn.Linear(*sizes[:2]), channels, nn.Linear(*sizes[1:])))
    second = copy.deepcopy(first)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # more blocks than threads, and not as many rows on each
    try:
        totals = []
        for net, name in ((first, "native"), (second, "autograd")):
            engine = engine_of(name, net, Data("made", x, y), OPTIMIZERS[rule], clip_norm=clip)
            engine.steps(permutation(SEED, 0, 300), 130)
            totals.append(engine.read())
    finally:
        torch.set_num_threads(before)
    assert totals[0][0] == pytest.approx(totals[1][0], rel=1e-4)
    assert totals[0][1:] == totals[1][1:]
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        error = (a - b).double().square().mean().sqrt() / b.double().square().mean().sqrt()
        assert float(error.detach()) < 1e-4
