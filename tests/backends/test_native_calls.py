"""What the native ops take and what they refuse, called directly on CPU tensors."""

import pytest
import torch
import torch.nn.functional as F

from .. import check_op
from ..native import NATIVE, bwd, fwd, needs_native, numbers

pytestmark = needs_native
DTYPES = check_op.DTYPES


def test_no_part_of_an_op_is_differentiated():
    """Called directly on tensors that require gradients, the GEMM inside is not recorded.

    What is recorded is PyTorch's own warning that the op has no derivative.
    """
    x = torch.randn(4, 5, requires_grad=True)
    w, b = torch.randn(6, 5, requires_grad=True), torch.randn(6, requires_grad=True)
    for act in ("none", "gelu"):
        y = NATIVE.linear_act_infer(x, w, b, None, None, *numbers(act))
        assert y.grad_fn.name() == "torch::autograd::WarnNotImplemented"


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_act_takes_any_strides(dtype):
    dtype = DTYPES[dtype]
    base, wide = torch.randn(4, 6, 5, 3).to(dtype), torch.randn(12, 20).to(dtype)
    b = torch.randn(24).to(dtype)[::2]
    views = {
        "offset": base[1:, 2:, :, 1],
        "transposed": base[0, :, :, 0].t().contiguous().t(),
        "expanded": base[:1, :1, :, 0].expand(3, 2, 5),
        "vector": base[0, 0, :, 1],
        "4-D": base.permute(3, 1, 0, 2),
    }
    for name, x in views.items():
        for w in (wide[:, 3:8], wide.t()[4:9].t(), wide[:, ::4]):
            got = NATIVE.linear_act_infer(x, w, b, None, None, *numbers("tanh"))
            plain = torch.tanh(F.linear(x, w, b))
            truth = torch.tanh(F.linear(x.double(), w.double(), b.double()))
            assert check_op.excess(got, plain, truth, dtype) <= 1, name
            assert got.is_contiguous()


def test_bare_linear_is_linear():
    for dtype in DTYPES.values():
        x, w, b = (
            torch.randn(7, 33).to(dtype),
            torch.randn(9, 33).to(dtype),
            torch.randn(9).to(dtype),
        )
        for bias in (None, b):
            got = NATIVE.linear_act_infer(x, w, bias, None, None, *numbers())
            torch.testing.assert_close(got, F.linear(x, w, bias))


def test_forward_and_backward_take_any_strides():
    state = torch.tensor([8, 9])
    x, dy = torch.randn(6, 10, 4)[:, :, ::2].transpose(1, 2), torch.ones(1).expand(6, 2, 10)
    b, slope = torch.randn(20)[::2], torch.rand(30)[::3]
    y = fwd(x, b, "prelu", slope, state, p=0.4)
    assert torch.equal(
        y, fwd(x.contiguous(), b.contiguous(), "prelu", slope.contiguous(), state, p=0.4)
    )
    got = bwd(dy, x, b, "prelu", slope, state, p=0.4)
    want = bwd(
        dy.contiguous(), x.contiguous(), b.contiguous(), "prelu", slope.contiguous(), state, p=0.4
    )
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (2, 0, 3), ()])
def test_sizes_of_nothing(shape):
    x = torch.randn(shape)
    n = shape[-1] if shape else 1
    b = torch.randn(n) if shape else None
    assert fwd(x, b, "relu").shape == x.shape
    dz, db, _ = bwd(torch.randn(shape), x, b, "relu")
    assert dz.shape == x.shape
    if b is not None:
        assert torch.equal(db, torch.zeros(n))


def test_no_inputs_leaves_the_bias():
    b = torch.randn(5)
    y, h = NATIVE.linear_act_fwd(
        torch.empty(3, 0), torch.empty(5, 0), b, None, None, *numbers("gelu")
    )
    assert torch.equal(h, torch.zeros(3, 5))
    torch.testing.assert_close(y, F.gelu(b).expand(3, 5))


X, W, B = torch.randn(512, 256), torch.randn(10, 256), torch.randn(256)
STATE = torch.tensor([1, 2])
BAD_CALLS = {
    r"bias must be \(N,\) with N = 256 to match input \(512, 256\), got \(255,\)": dict(b=B[:255]),
    r"input must be one of float32, float16, bfloat16, got torch.float64": dict(x=X.double()),
    r"bias must be torch.float32 or torch.float32 .*got torch.float16": dict(b=B.half()),
    r"input must be \(\.\.\., N\) to add a bias, got a 0-D tensor": dict(x=X[0, 0]),
    r"act must be an id in \[0, 12\), got 12": dict(act=12),
    r"act must be an id in \[0, 12\), got -1": dict(act=-1),
    r"prelu needs slope, a tensor of 1 or N = 256 elements": dict(act=3),
    r"slope must have 1 or N = 256 elements for prelu, got \(2,\)": dict(act=3, slope=B[:2]),
    r"threshold must be in \[0, 2\^32\], got -1": dict(threshold=-1),
    r"threshold must be in \[0, 2\^32\], got 4294967297": dict(threshold=2**32 + 1),
    r"state must be an int64 tensor \(seed, stream\), got None": dict(threshold=1, state=None),
    r"state must be an int64 tensor .* got torch.int64 \(3,\)": dict(
        threshold=1, state=STATE.repeat(2)[:3]
    ),
    r"state must be an int64 tensor .* got torch.int32 \(2,\)": dict(
        threshold=1, state=STATE.int()
    ),
    r"row_offset must be >= 0, got -1": dict(threshold=1, row_offset=-1),
    r"rows \+ row_offset must be at most 2\^32 for dropout, got 512 \+ 4294967295": dict(
        threshold=1, row_offset=2**32 - 1
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_of_the_op_are_refused(message):
    args = dict(
        x=X,
        b=B,
        slope=None,
        state=STATE,
        act=1,
        alpha=0.0,
        threshold=0,
        scale=1.0,
        layer=0,
        row_offset=0,
    )
    with pytest.raises(RuntimeError, match="bias_act_dropout: " + message):
        NATIVE.bias_act_dropout_fwd(*(args | BAD_CALLS[message]).values())


@pytest.mark.parametrize(
    "x, w, b, message",
    [
        (X, W[:, :5], None, r"weight must be \(N, K\) with K = 256 .*\(512, 256\), got \(10, 5\)"),
        (X, W.half(), None, "weight must be torch.float32 like input, got torch.float16"),
        (X, W, B, r"bias must be \(N,\) with N = 10 to match weight \(10, 256\), got \(256,\)"),
        (X[0, 0], W, None, r"input must be \(\.\.\., K\), got a 0-D tensor"),
    ],
)
def test_bad_calls_of_linear_act_are_refused(x, w, b, message):
    with pytest.raises(RuntimeError, match="linear_act: " + message):
        NATIVE.linear_act_infer(x, w, b, None, None, *numbers("relu"))


@pytest.mark.parametrize(
    "saved, act, saves, message",
    [
        (X[:5], "relu", 1, r"saved must be \(512, 256\) like dy, got \(5, 256\)"),
        (None, "relu", 1, r"saved must be \(512, 256\) like dy, got None"),
        (X.half(), "relu", 1, "saved must be torch.float32 like dy, got torch.float16"),
        (X, "gelu", 1, "saves must be one that gelu can be differentiated from, got 1"),
        (X, "relu", 3, "saves must be 0, 1 or 2, got 3"),
    ],
)
def test_bad_calls_of_backward_are_refused(saved, act, saves, message):
    with pytest.raises(RuntimeError, match="bias_act_dropout: " + message):
        bwd(X, saved, None, act, saves=saves)
