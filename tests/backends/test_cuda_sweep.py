"""All 47 CUDA kernels of each target on the PTX machine, with all that the host code can choose.

Every dtype, activation, dropout or none, width of accesses, kind of bias and of slope, and what
backward reads; masks bit for bit, values within the error budget. And so that nothing is left out
by accident: which kernels ran, and how much of their code.
"""

from itertools import count

import pytest
import torch

from fusedmlp.spec import activations, philox

from ..check_op import DTYPES, SEED, STREAM, Case
from ..ptx import launchers, library
from . import test_cuda_kernels as kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        library.cannot_build() is not None, reason=f"no PTX: {library.cannot_build()}"
    ),
]


def shifted(t):
    """The same values, one element past a multiple of 16 bytes."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


def vector(t, kind):
    """A bias or slope as the host may get it: of x's dtype, in fp32, at an odd address."""
    t = t.float() if kind.startswith("fp32") else t
    return shifted(t) if kind.endswith("shifted") else t


VECTORS = ("own", "fp32", "own shifted", "fp32 shifted")


def assert_masked(p, y):
    assert not p or (y[~philox.dropout_mask(SEED, STREAM, *y.shape, p)] == 0).all()


def elementwise(dtype):
    turn = count()
    for act in activations.NAMES:
        for n in (24, 29):
            for p in (0.0, 0.3):
                i = next(turn)
                case = Case("bias_act_dropout", (9, 150)[i % 2], 0, n, act, p, dtype,
                            bias=i % 5 > 0, slope_elements=i % 2)  # fmt: skip
                inputs = case.inputs()
                run_elementwise(case, inputs, i)


def run_elementwise(case, inputs, i):
    # Rows of whole vectors that begin at an odd address take single elements.
    odd = i % 3 == 2
    x, dy = (shifted(inputs[name]) if odd else inputs[name] for name in ("x", "dy"))
    b, slope = inputs.get("b"), inputs.get("slope")
    b = None if b is None else vector(b, VECTORS[i % 4])
    slope = None if slope is None else vector(slope, VECTORS[(i + 1) % 4])
    numbers = kernels.numbers(case.act, case.p, layer=0, row_offset=0)
    y = launchers.bias_act_dropout_fwd(x, b, slope, kernels.STATE, *numbers)
    assert_masked(case.p, y)
    act = activations.IDS[case.act]
    usual = activations.saves(act, 0.01, case.dtype, case.p > 0)
    for saves in {usual, 2} if act else {usual}:
        saved = {0: None, 1: y, 2: x}[saves]
        wanted = saves, b is not None, slope is not None
        dz, db, dslope = launchers.bias_act_dropout_bwd(
            dy, saved, b, slope, kernels.STATE, *numbers, *wanted
        )
        assert_masked(case.p, dz)
        got = {"y": y, "dx": dz, "db": db.to(case.dtype), "dslope": dslope.to(case.dtype)}
        got = {name: t for name, t in got.items() if t.numel()}
        kernels.assert_within_budget(case, inputs, **got)


def products(dtype):
    turn = count()
    for tile in ("small", "medium", "large"):
        for act in activations.NAMES:
            i = next(turn)
            m, k, n = ((37, 53, 29), (70, 264, 72))[i // 2 % 2]
            p = (0.0, 0.3)[i % 2]
            case = Case("linear_act", m, k, n, act, p, dtype, bias=i % 5 > 0)
            inputs = case.inputs()
            b, slope = inputs.get("b"), inputs.get("slope")
            y, _ = launchers.linear_act_fwd(
                kernels.aligned(inputs["x"], pad=8),
                kernels.aligned(inputs["w"]),
                None if b is None else vector(b, VECTORS[i % 4]),
                None if slope is None else vector(slope, VECTORS[(i + 1) % 4]),
                kernels.STATE,
                *kernels.numbers(act, p, layer=0, row_offset=0),
                want_h=i % 3 == 0,
                tile=tile,
            )
            assert_masked(p, y)
            kernels.assert_within_budget(case, inputs, y=y)


def losses(dtype):
    x = (3 * torch.randn(13, 33)).to(dtype)
    target = torch.randint(33, (13,))
    target[-1] = -100
    leaf = x.float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        leaf, target, label_smoothing=0.1, reduction="none"
    )
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    got, dx = launchers.cross_entropy(x, target, 0.1)
    torch.testing.assert_close(got, expected.detach())
    torch.testing.assert_close(dx, gradient.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def column():
    """One column, or one slope of many blocks: the second stage has a kernel of its own for it."""
    for n in (1, 40):
        case = Case("bias_act_dropout", 1500, 0, n, "prelu", 0.3, torch.float32, slope_elements=1)
        inputs = case.inputs()
        kernels.assert_within_budget(case, inputs, **kernels.run_elementwise(case, inputs))


@pytest.mark.parametrize("arch", library.ARCHS)
def test_every_kernel_is_right_in_all_that_the_host_code_can_choose(arch):
    launchers.set_machine(arch)
    machine = launchers.chosen().machine
    machine.codes.clear()
    for dtype in DTYPES.values():
        elementwise(dtype)
        losses(dtype)
        if dtype != torch.float32:
            products(dtype)
    column()
    launchers.set_machine()
    assert len(machine.kernels) == 47 and machine.codes.keys() == machine.kernels.keys()
    ran = machine.instructions_run()
    least = min(ran, key=lambda name: ran[name])
    # The rest: a thread's second group of the forward, which takes 2 million elements (there is a
    # test of such sizes), indices that 64 bits do not divide by a product, and values such as NaN.
    assert ran[least] > 0.3 and sum(ran.values()) / len(ran) > 0.6, (least, ran)
    for code in machine.codes.values():  # the rest of the opcodes is known too
        for block in code.kernel.blocks:
            code.function(block.index)
    print(f"sm_{arch}: {sum(ran.values()) / len(ran):.3f} of the instructions of a kernel ran")
