"""The native step engine: what it refuses, with the reason, and who runs it then."""

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
