"""What is kept between forward and backward, by formula: a mask never, one tensor at most."""

import pytest
import torch
import torch.nn.functional as F

import fusedmlp.functional as FF
from bench import saved_bytes
from fusedmlp.spec import activations

from ..check_op import DTYPES, Case, call, leaves_of

M, K, N = 48, 40, 56
STATE_BYTES = 16


def _saved(case: Case, backend: str) -> tuple[int, int]:
    """(bytes saved that are neither an input nor the output, bytes of the saved output)."""
    leaves = leaves_of(case.inputs())
    inputs = {t.untyped_storage().data_ptr() for t in leaves.values()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(case, leaves, backend)
    output = kept.pop(y.untyped_storage().data_ptr(), 0)
    return sum(size for ptr, size in kept.items() if ptr not in inputs), output


def _formula(case: Case) -> tuple[int, int]:
    """design: none and dropout alone nothing; y where it serves, else z; with dropout the state."""
    tensor = M * N * torch.finfo(case.dtype).bits // 8
    kept_y = ["relu", "leaky_relu", "softplus", "elu"]
    kept_y += ["relu_squared"] if case.dtype != torch.float16 else []
    kept_y += ["sigmoid", "tanh"] if case.p == 0 else []
    state = STATE_BYTES if case.p > 0 else 0
    if case.act == "none":
        return state, 0
    if case.act in kept_y:
        return state, tensor
    # z of bias_act_dropout is its input, which is there anyway.
    return state + (tensor if case.op == "linear_act" else 0), 0


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", activations.NAMES)
@pytest.mark.parametrize("op", ["linear_act", "bias_act_dropout"])
def test_saved_bytes_are_those_of_the_formula(op, act, dtype, p, backend, device):
    case = Case(op, M, K, N, act, p, DTYPES[dtype], device)
    assert _saved(case, backend) == _formula(case)


def test_nothing_is_kept_without_gradients(backend, device):
    w = torch.randn(N, K, device=device, requires_grad=True)
    x = torch.randn(M, K, device=device)
    with torch.no_grad():
        assert FF.linear_act(x, w, None, "gelu", p=0.5, backend=backend).grad_fn is None


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_frozen_weights_keep_no_input(act, backend, device):
    """As F.linear: x is for the weight's gradient; for gelu also for a second derivative."""
    x = torch.randn(M, K, device=device, requires_grad=True)
    w = torch.randn(N, K, device=device)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        FF.linear_act(x, w, None, act, backend=backend)
    assert (x.untyped_storage().data_ptr() in kept) == (act == "gelu")


# --- bench.saved_bytes, which measures it for docs/kernels.md


def test_saved_bytes_counts_each_storage_once():
    x = torch.randn(8, 16, requires_grad=True)
    assert saved_bytes.saved_bytes(lambda x: x.tanh(), x) == 8 * 16 * 4
    # tanh's output is saved by tanh, and twice by the product of it with itself
    assert saved_bytes.saved_bytes(lambda x: x.tanh() * x.tanh(), x) == 2 * 8 * 16 * 4

    def squared(x):
        y = x.tanh()
        return y * y

    assert saved_bytes.saved_bytes(squared, x) == 8 * 16 * 4
    assert saved_bytes.count(lambda x: x * x, x) == saved_bytes.SavedBytes(8 * 16 * 4, 0)


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@pytest.mark.parametrize("act", ["relu", "gelu", "tanh"])
def test_saved_bytes_of_fake_tensors_are_those_of_real_ones(act, fused):
    layer = saved_bytes._layer(act, 0.5, fused)
    m, k, n = saved_bytes.M, saved_bytes.K, saved_bytes.N
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((m, k), (n, k), (n,)))
    w_next = torch.randn(10, n, requires_grad=True)
    real = saved_bytes.saved_bytes(
        lambda x, w, b, w_next: F.linear(layer(x, w, b, None), w_next), x, w, b, w_next
    )
    assert real == saved_bytes.of_layer(act, 0.5, torch.float32, "cpu", fused)
