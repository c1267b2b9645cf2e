"""Both ops on every backend: the error budget, corners, strides, determinism, saved tensors;
and what a call of an op by itself is refused for."""

import pytest
import torch

import fusedmlp
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


def _direct(op, backend):
    return getattr(getattr(torch.ops.fusedmlp, op), backend)


X, W, B = torch.randn(4, 5), torch.randn(6, 5), torch.randn(6)
STATE = torch.tensor([1, 2])
# id, alpha, threshold, scale, layer, row_offset
GOOD = (1, 0.01, 2**31, 2.0, 0, 0)
DIRECT = {
    "weight": (
        "linear_act_infer",
        (X, W.t(), B, None, STATE, *GOOD),
        r"linear_act: weight must be \(N, K\) with K = 5",
    ),
    "bias": (
        "linear_act_fwd",
        (X, W, B[:2], None, STATE, *GOOD),
        r"linear_act: bias must be \(N,\) with N = 6",
    ),
    "bias elementwise": (
        "bias_act_dropout_fwd",
        (X, B, None, STATE, *GOOD),
        r"bias_act_dropout: bias must be \(N,\) with N = 5",
    ),
    "act": (
        "bias_act_dropout_fwd",
        (X, None, None, STATE, 99, *GOOD[1:]),
        r"act must be an id in \[0, 12\), got 99",
    ),
    "no state": (
        "bias_act_dropout_fwd",
        (X, None, None, None, *GOOD),
        r"state must be an int64 tensor \(seed, stream\), got None",
    ),
    "state shape": (
        "bias_act_dropout_fwd",
        (X, None, None, STATE[:1], *GOOD),
        r"state must be an int64 tensor \(seed, stream\) of shape \(2,\)",
    ),
    "threshold": (
        "bias_act_dropout_fwd",
        (X, None, None, STATE, 1, 0.01, 2**33, *GOOD[3:]),
        r"threshold must be in \[0, 2\^32\], got 8589934592",
    ),
    "row_offset": (
        "bias_act_dropout_fwd",
        (X, None, None, STATE, *GOOD[:-1], -1),
        "row_offset must be >= 0, got -1",
    ),
    "slope": (
        "bias_act_dropout_fwd",
        (X, None, torch.ones(3), STATE, 3, *GOOD[1:]),
        r"slope must have 1 or N = 5 elements for prelu, got \(3,\)",
    ),
    "saved": (
        "bias_act_dropout_bwd",
        (X, X[:2], None, None, STATE, *GOOD, 1, False, False),
        r"saved must be \(4, 5\) like dy, got \(2, 5\)",
    ),
    "need_db": (
        "bias_act_dropout_bwd",
        (X, X, None, None, STATE, *GOOD, 1, True, False),
        "bias must be given where its gradient is asked for",
    ),
    "need_dslope": (
        "bias_act_dropout_bwd",
        (X, X, None, torch.ones(1), STATE, *GOOD, 1, False, True),
        "slope must be of prelu where its gradient is asked for, got relu",
    ),
    "nothing saved": (
        "bias_act_dropout_bwd",
        (X, None, None, None, STATE, *GOOD, 0, False, False),
        "saves must be one that relu can be differentiated from, got 0",
    ),
    "y of gelu": (
        "bias_act_dropout_bwd",
        (X, X, None, None, STATE, 8, *GOOD[1:], 1, False, False),
        "saves must be one that gelu can be differentiated from, got 1",
    ),
    "y of a negative slope": (
        "bias_act_dropout_bwd",
        (X, X, None, None, STATE, 2, -0.5, *GOOD[2:], 1, False, False),
        "saves must be one that leaky_relu can be differentiated from, got 1",
    ),
    "saved dtype": (
        "bias_act_dropout_bwd",
        (X, X.half(), None, None, STATE, *GOOD, 1, False, False),
        "saved must be torch.float32 like dy, got torch.float16",
    ),
    "scale": (
        "bias_act_dropout_fwd",
        (X, None, None, STATE, *GOOD[:3], float("inf"), 0, 0),
        "scale must be finite, got inf",
    ),
    "sparse state": (
        "bias_act_dropout_fwd",
        (X, None, None, STATE.to_sparse(), *GOOD),
        r"must be (a )?dense \(strided\)",
    ),
    "sparse weight of an mlp": (
        "mlp_fwd",
        (X, [W.to_sparse()], None, [1, 0, 0, 1], [0.0, 1.0], 0, False),
        r"must be (a )?dense \(strided\)",
    ),
    "bits of an mlp": (
        "mlp_fwd",
        (X, [W], None, [1, 0, 0, -1], [0.0, 1.0], 0, False),
        "and the tensors that they name must be given for each layer",
    ),
    "slope of an mlp": (
        "mlp_fwd",
        (X, [W, torch.ones(1)], None, [1, 0, 0, 5], [0.0, 1.0], 0, False),
        "a slope must be of prelu, got act 1 in layer 0",
    ),
    "integer": (
        "bias_act_dropout_fwd",
        (X.int(), None, None, STATE, *GOOD),
        "input must be one of",
    ),
}


def _on(device, a):
    if isinstance(a, list):
        return [_on(device, one) for one in a]
    return a.to(device) if isinstance(a, torch.Tensor) else a


@pytest.mark.parametrize("wrong", DIRECT)
def test_ops_called_directly_refuse_with_the_same_words(wrong, backend, device):
    op, args, message = DIRECT[wrong]
    args = [_on(device, a) for a in args]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        _direct(op, backend)(*args)


def test_a_state_may_be_a_view(backend, device):
    """Of another step than 1, where the two numbers do not lie side by side."""
    view = torch.tensor([1, 0, 2, 0], device=device)[::2]
    x = X.to(device)
    by_scope, by_op = [], []
    for state in (view, STATE.to(device)):
        with fusedmlp.dropout_state(state):
            by_scope.append(FF.bias_act_dropout(x, None, "relu", p=0.5, backend=backend))
        args = x, None, None, state, 1, 0.0, 1 << 31, 2.0, 0, 0
        by_op.append(_direct("bias_act_dropout_fwd", backend)(*args))
    for got in by_scope[:1] + by_op:
        assert torch.equal(got, by_scope[1])
