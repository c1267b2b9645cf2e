"""FlopCounterMode counts for the ops what it counts for plain PyTorch."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fusedmlp
from fusedmlp import FusedLinear, FusedMLP, functional, fuse, ops, unfuse
from fusedmlp.autograd.mlp import Net
from fusedmlp.backends import registry

from .nets import on_backend, ops_called  # noqa: F401

ROUTES = ["eager", "reference", "native"]
_HAS_NATIVE = not registry._BY_NAME["native"].reasons_against("cpu", torch.float32)


def count(f) -> int:
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def forward_and_backward(module, x):
    """FLOPs of a forward without gradients, and of one with and its backward."""

    def step():
        module(x).sum().backward()

    with torch.no_grad():
        inference = count(lambda: module(x))
    return inference, count(step)


def using(route):
    """Runs on plain PyTorch, which automatic choice takes for these sizes, or on a backend."""
    if route == "eager":
        return contextlib.nullcontext()
    if route == "native" and not _HAS_NATIVE:
        pytest.skip("the extension is not built")
    return fusedmlp.use_backend(route)


def test_every_op_has_a_formula():
    assert {getattr(torch.ops.fusedmlp, op) for op in ops.SCHEMAS} <= flop_registry.keys()


def test_the_example_that_counted_nothing(backend):
    layer, x = FusedLinear(512, 512, activation="relu"), torch.randn(64, 512)
    assert forward_and_backward(layer, x)[0] == 2 * 64 * 512 * 512


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("needs_dx", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: FusedLinear(6, 9, activation="gelu", dropout=0.5),
        lambda: FusedLinear(6, 9, False),
        lambda: nn.Sequential(FusedLinear(6, 9, activation="prelu"), FusedLinear(9, 4)),
        lambda: fuse(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4), nn.Tanh())),
        lambda: FusedMLP(6, [9, 8], 3, dropout=0.5),
    ],
    ids=["linear", "bare", "two", "sequential", "mlp"],
)
def test_modules_count_as_plain_ones(make, needs_dx, route):
    module = make()
    for shape in [(5, 6), (2, 3, 6)]:
        x = torch.randn(shape, requires_grad=needs_dx)
        want = forward_and_backward(unfuse(module), x)
        with using(route):
            assert forward_and_backward(module, x) == want and want[0] > 0


@pytest.mark.parametrize("route", ROUTES)
def test_functions_count_as_plain_ones(route):
    x, w, b = torch.randn(5, 6), nn.Parameter(torch.randn(9, 6)), nn.Parameter(torch.randn(9))

    def fused(x):
        y = functional.linear_act(x, w, b, "relu", p=0.5)
        y = functional.dropout(functional.bias_act_dropout(y, b, "gelu"))
        # The native backend has no kernel of this for a CPU.
        backend = "reference" if route == "native" else None
        return functional.cross_entropy(y, torch.arange(5) % 9, backend=backend)

    want = forward_and_backward(lambda x: nn.functional.linear(x, w, b).relu(), x)
    with using(route):
        assert forward_and_backward(fused, x) == want


# Inside the counter a FusedSequential runs its modules, since the counter registers global hooks:
# the ops of whole networks are called by themselves.

FROZEN = [
    (),
    ("0.weight",),
    ("0.weight", "0.bias"),
    ("2.weight",),
    ("0.weight", "0.bias", "1.weight", "2.weight"),
]


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda names: ",".join(names) or "nothing")
@pytest.mark.parametrize("needs_dx", [False, True])
def test_the_op_of_a_network_counts_as_its_layers(frozen, needs_dx, backend):
    plain = nn.Sequential(nn.Linear(6, 9), nn.PReLU(), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 3))
    for name in frozen:
        plain.get_parameter(name).requires_grad_(False)
    x = torch.randn(5, 6, requires_grad=needs_dx)
    parameters = [plain[0].weight, plain[0].bias, plain[1].weight]
    parameters += [t for m in (plain[2], plain[4]) for t in m.parameters()]
    act = fusedmlp.spec.activations.IDS
    ints = [act["prelu"], 0, 0, 7, act["gelu"], 0, 1, 3, act["none"], 0, 2, 3]
    net = Net(backend, ints, [0.0, 1.0] * 3, x)

    def fused(x):
        with_graph = torch.is_grad_enabled()
        run = net.train if with_graph else net.infer
        return run(x, None, 0, parameters)

    want = forward_and_backward(plain, x)
    got = ops_called(lambda: fused(x).sum().backward())
    assert got == {"fusedmlp::mlp_fwd", "fusedmlp::mlp_bwd"}
    assert forward_and_backward(fused, x) == want


@pytest.mark.parametrize("first", ["fusedmlp", "torch.utils.flop_counter"])
def test_the_order_of_the_imports_does_not_matter(first):
    code = (
        f"import {first}, fusedmlp, torch;"
        "from torch.utils.flop_counter import FlopCounterMode, flop_registry;"
        "import importlib, torch.utils.flop_counter as counter;"
        "print(torch.ops.fusedmlp.linear_act_fwd in flop_registry);"
        "print(torch.ops.fusedmlp.mlp_bwd in counter.flop_registry)"
    )
    root = str(Path(__file__).parent.parent)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert out.stdout.split() == ["True", "True"], out.stdout
