"""The native step engine: what it refuses, with the reason, and who runs it then; its op alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedmlp
from fusedmlp.train import TrainError, fit
from fusedmlp.train.console import Quiet
from fusedmlp.train.engines import choose
from fusedmlp.train.engines.native import Native
from fusedmlp.train.optim import EpsilonHatAdam

from .. import made_data
from ..engines import OPTIMIZERS, config, need_native, network, task_of

made_data.need("safetensors", "matplotlib")
need_native()


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
    "fp16": (lambda net: net, {"precision": "fp16"}, "--precision is fp16"),
    "rows": (lambda net: net, {"x": torch.zeros(4, 5)}, "rows must have 12 values"),
    "loader": (lambda net: net, {"x": None}, "come from a loader"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_run_it_refuses_with_the_reason(case):
    change, settings, message = REFUSED[case]
    net = change(network(sizes=(12, 12, 3)))
    task = task_of(net, made_data.blobs(), OPTIMIZERS["sgd"], **settings)
    assert message in "; ".join(Native.reasons_against(task))
    with pytest.raises(TrainError, match="cannot be used"):
        choose("native", task)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.RMSprop(p),
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.Adam(p, decoupled_weight_decay=True),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.AdamW(p, maximize=True),
        lambda p: EpsilonHatAdam(p, maximize=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
        lambda p: torch.optim.SGD(list(p)[:1], lr=0.1),
    ],
    ids=[
        "rmsprop",
        "adam-amsgrad",
        "adam-decoupled",
        "adam-tensor",
        "adamw-amsgrad",
        "adamw-maximize",
        "epsilon_hat-maximize",
        "dampening",
        "some",
    ],
)
def test_other_optimisers_are_refused_and_run_by_autograd(make):
    task = task_of(network(sizes=(12, 16, 3)), made_data.blobs(), make)
    assert Native.reasons_against(task) and choose("auto", task).name == "autograd"


class Notes(Quiet):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)


def test_a_run_that_auto_gives_to_autograd_says_why():
    for settings, wanted in (
        (dict(precision="fp16"), ["it computes in fp32 or bf16, --precision is fp16"]),
        (dict(precision="fp16", engine="autograd"), []),
        ({}, []),
    ):
        notes = Notes()
        net = network(sizes=(12, 8, 3))
        fit(net, made_data.blobs(), config(epochs=1, **settings), progress=notes)
        assert len(notes.said) == len(wanted)
        assert all(why in said for why, said in zip(wanted, notes.said, strict=True))


def _train(**changed) -> list[torch.Tensor]:
    """One epoch of Linear(3, 4) on 64 rows by the op itself; its weight, bias and totals."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(64, 3, generator=generator)
    classes = torch.randint(4, (64,), generator=generator)
    params = [torch.randn(4, 3, generator=generator), torch.zeros(4), torch.empty(0)]
    epochs = changed.pop("epochs", 1)
    args = {
        "x": rows,
        "y": classes,
        "orders": [torch.arange(64).repeat(epochs)],
        "mean": None,
        "std": None,
        "weights": None,
        "lr_scales": [torch.empty(0, dtype=torch.float64)],
        "params": params,
        "m1": [],
        "m2": [],
        "totals": torch.zeros(3 * epochs, dtype=torch.float64),
        "work": torch.empty(1, 1 << 16),
        "ints": [0, 0, 0, 0],
        "numbers": [0.0, 1.0, 0.1, 0.0, 0.1, 0.0, 0.0, 0.0],
        "rule": 0,
        "batch": 16,
        "said_epochs": epochs,
        "momentum": 0.0,
    } | changed
    rule, batch, said = args.pop("rule"), args.pop("batch"), args.pop("said_epochs")
    momentum = args.pop("momentum")
    member = [rule, 0, 0, 0, 1, 1, batch, said], [0.0, momentum, 0.9, 0.999, 1e-8, 0.0]
    torch.ops.fusedmlp.train.native(*args.values(), *member, 1.0, 0, False)
    return [*params[:2], args["totals"]]


def _order_in(t: torch.Tensor) -> list[torch.Tensor]:
    order = t.view(-1).view(torch.int64)[:64]
    order.copy_(torch.arange(64))
    return [order]


_WORK, _TOTALS = torch.empty(1, 1 << 16), torch.zeros(64, dtype=torch.float64)
WRONG = {
    "epochs of an empty order": (
        {"orders": [torch.empty(0, dtype=torch.int64)], "said_epochs": (2**64 + 2) // 3 - 1},
        "equally many rows",
    ),
    "order in work": ({"work": _WORK, "orders": _order_in(_WORK)}, "share memory with work"),
    "order in totals": (
        {"totals": _TOTALS[:3], "orders": _order_in(_TOTALS)},
        "share memory with totals",
    ),
    "a large rule": ({"rule": 2**32}, "rule must be in"),
    "large saves": ({"ints": [0, 2**32, 0, 0]}, "saves must be one that none"),
    "y of a negative slope": (
        {"ints": [2, 1, 0, 0], "numbers": [-0.5, 1.0, *[0.1, 0.0] * 3]},
        "saves must be one that leaky_relu",
    ),
    "mean alone": ({"mean": torch.tensor([100.0])}, "given together"),
    "std alone": ({"std": torch.tensor([100.0])}, "given together"),
    "momentum without memory": ({"momentum": 0.9}, "momentum needs"),
    "adam with one moment": (
        {"rule": 2, "m1": [torch.zeros(4, 3), torch.zeros(4), torch.empty(0)]},
        "needs both moments",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_its_op_refuses_what_it_would_read_or_write_wrongly(case):
    changed, reason = WRONG[case]
    with pytest.raises(RuntimeError, match=reason):
        _train(**changed)


@pytest.mark.parametrize("batch", [10**9, 2**63 - 1])
def test_a_batch_of_more_rows_than_there_are_is_one_of_all_rows(batch):
    adam = [torch.zeros(4, 3), torch.zeros(4), torch.empty(0)]

    def run(batch: int) -> list[torch.Tensor]:
        moments = {name: [t.clone() for t in adam] for name in ("m1", "m2")}
        return _train(rule=2, epochs=3, batch=batch, **moments)

    for got, wanted in zip(run(batch), run(64), strict=True):
        assert torch.equal(got, wanted)
