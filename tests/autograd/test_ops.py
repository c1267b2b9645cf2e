"""Both ops on every backend: the error budget, corners, strides, determinism, saved tensors."""

import pytest
import torch

import fusedmlp.functional as FF
from fusedmlp.spec import activations, philox

from .. import check_op
from ..check_op import DTYPES, Case

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPS = ("linear_act", "bias_act_dropout")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", check_op.OPS)
def test_the_table_is_right_on_every_backend_and_instruction_set(op, dtype, device):
    who = check_op.runners(op, DTYPES[dtype], device)
    if device == "cpu":  # Triton's interpreter has a test of its own
        who = [runner for runner in who if runner.backend != "triton"]
    if not who:
        pytest.skip(f"no backend has {op} in {dtype} on {device}")
    check_op.assert_right(who, check_op.spread(check_op.table(op, DTYPES[dtype], device)))


INJECTED = {
    "gelu as x * sigmoid(1.702 x)": ("gelu", lambda r, i: r | {"y": _sigmoid_gelu(i)}),
    "bias 1 % off": (
        "relu",
        lambda r, i: check_op.run(_INJECTED_CASE["relu"], "reference", i | {"b": i["b"] * 1.01}),
    ),
    "bias gradient summed in bf16": ("relu", lambda r, i: r | {"db": _bf16_sum(r, i)}),
}
_INJECTED_CASE = {
    act: Case("bias_act_dropout", 509, 0, 77, act, 0.0, torch.bfloat16) for act in ("gelu", "relu")
}


def _sigmoid_gelu(i):
    z = i["x"].float() + i["b"].float()
    return (z * torch.sigmoid(1.702 * z)).bfloat16()


def _bf16_sum(r, i):
    total = torch.zeros(77, dtype=torch.bfloat16)
    for row in r["dx"]:
        total = total + row
    return total


@pytest.mark.parametrize("bug", INJECTED)
def test_the_error_budget_catches_an_injected_bug(bug):
    act, inject = INJECTED[bug]
    case = _INJECTED_CASE[act]
    inputs = case.inputs()
    right = check_op.run(case, "reference", inputs)
    check_op.assert_within_budget(case, right, inputs)
    with pytest.raises(AssertionError, match="share of the error budget"):
        check_op.assert_within_budget(case, inject(right, inputs), inputs)


# --- layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["none", "relu", "gelu", "prelu"])
def test_expanded_input_and_gradient(act, backend, device):
    row = torch.randn(1, 12, device=device)
    slope = torch.rand(12, device=device) if act == "prelu" else None
    for x in (row.expand(5, 12), row[:, :1].expand(5, 12)):
        results = []
        for t in (x, x.contiguous()):
            t = t.detach().requires_grad_()
            y = FF.bias_act_dropout(t, None, act, slope=slope, p=0.3, seed=1, backend=backend)
            results.append((y, *torch.autograd.grad(y.sum(), t)))
        torch.testing.assert_close(*results)


# --- autograd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("act", activations.NAMES)
@pytest.mark.parametrize("op", OPS)
def test_backward_twice_gives_the_same_and_changes_nothing_saved(op, act, backend, device):
    case = Case(op, 9, 10, 13, act, 0.3, torch.float32, device)
    inputs = case.inputs()
    leaves = check_op.leaves_of(inputs)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = check_op.call(case, leaves, backend)
    copies = [t.detach().clone() for t in saved]
    grads = [
        torch.autograd.grad(y, list(leaves.values()), inputs["dy"], retain_graph=True)
        for _ in range(2)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    for t, copy in zip(saved, copies, strict=True):
        assert torch.equal(t.nan_to_num(), copy.nan_to_num())


@pytest.mark.parametrize("act", ["none", "relu", "gelu", "prelu", "tanh"])
@pytest.mark.parametrize("op", OPS)
def test_each_subset_of_inputs_that_needs_gradients(op, act, backend, device):
    case = Case(op, 9, 10, 13, act, 0.3, torch.float32, device)
    inputs = case.inputs()
    full = check_op.run(case, backend, inputs)
    names = [n for n in inputs if n != "dy"]
    for bits in range(1, 2 ** len(names)):
        wanted = [n for i, n in enumerate(names) if bits >> i & 1]
        leaves = {n: inputs[n].detach().requires_grad_(n in wanted) for n in names}
        y = check_op.call(case, leaves, backend)
        grads = torch.autograd.grad(y, [leaves[n] for n in wanted], inputs["dy"])
        for n, g in zip(wanted, grads, strict=True):
            torch.testing.assert_close(g, full[f"d{n}"], msg=f"{wanted} {n}")


@pytest.mark.parametrize("op", OPS)
def test_double_backward_is_that_of_the_oracle(op, backend, device):
    """A gradient penalty through the fused op, for every activation, with dropout."""
    for act in activations.NAMES:
        case = Case(op, 5, 6, 9, act, 0.3, torch.float32, device)
        inputs = case.inputs()
        results = []
        for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
            leaves = check_op.leaves_of(inputs, dtype)
            y = check_op.call(case, leaves, name)
            grads = torch.autograd.grad(
                y, list(leaves.values()), inputs["dy"].to(dtype), create_graph=True
            )
            penalty = y.square().sum() + sum(g.square().sum() for g in grads)
            second = torch.autograd.grad(penalty, list(leaves.values()), allow_unused=True)
            results.append([g.double() for g in second])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4, msg=lambda m, a=act: f"{a}: {m}")


def test_changing_an_output_that_is_saved_raises(backend, device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    y = FF.bias_act_dropout(x, None, "relu", backend=backend)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_fp32_bias_beside_a_16_bit_input(bias_dtype, backend, device):
    x = torch.randn(5, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(8, device=device, dtype=bias_dtype, requires_grad=True)
    y = FF.bias_act_dropout(x, b, "gelu", backend=backend)
    dx, db = torch.autograd.grad(y.sum(), (x, b))
    assert (y.dtype, dx.dtype, db.dtype) == (torch.bfloat16, torch.bfloat16, bias_dtype)


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_backward_uses_the_mask_of_forward(op, dtype, backend, device):
    for act in activations.NAMES:
        case = Case(op, 33, 4, 45, act, 0.5, DTYPES[dtype], device, bias=False)
        inputs = case.inputs() | {"dy": torch.ones(33, 45, dtype=DTYPES[dtype], device=device)}
        keep = philox.dropout_mask(check_op.SEED, check_op.STREAM, 33, 45, 0.5, device=device)
        leaves = check_op.leaves_of(inputs)
        y = check_op.call(case, leaves, backend)
        assert not (y[~keep] != 0).any()
        if op == "bias_act_dropout":
            (dx,) = torch.autograd.grad(y, leaves["x"], inputs["dy"])
            assert not (dx[~keep] != 0).any()
            if act in ("none", "sigmoid"):
                assert (dx[keep] != 0).all()
