"""Any shape, stride, seed and place: what holds for all of them, on examples of hypothesis."""

import pytest
import torch

import fusedmlp.functional as FF
from fusedmlp.backends import registry
from fusedmlp.spec import activations, philox

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _strided(t: torch.Tensor, kind: str) -> torch.Tensor:
    """The values of t (contiguous) in another memory layout."""
    if kind == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        return torch.stack((t, t + 1), -1)[..., 0]
    if kind == "offset":
        return torch.cat((t.new_ones(1), t.reshape(-1)))[1:].view(t.shape)
    return t


KINDS = st.sampled_from(["contiguous", "transposed", "sliced", "offset"])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=0, max_size=3),
    st.integers(1, 19),
    st.integers(1, 19),
    KINDS,
    KINDS,
    KINDS,
    st.sampled_from(activations.NAMES),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from(["reference", "native"]),
)
def test_any_shape_and_stride(leading, k, n, kx, kw, kdy, act, p, name):
    if registry._BY_NAME[name].reasons_against("cpu", torch.float32):
        name = "reference"
    g = torch.Generator().manual_seed(3)
    x = torch.randn(*leading, k, generator=g)
    w, b = torch.randn(n, k, generator=g), torch.randn(n, generator=g)
    slope = torch.rand(n, generator=g) if act == "prelu" else None
    dy = torch.randn(*leading, n, generator=g)

    def run(x, w, dy):
        x, w, b_ = (t.detach().requires_grad_() for t in (x, w, b))
        s = slope if slope is None else slope.detach().requires_grad_()
        y = FF.linear_act(x, w, b_, act, slope=s, p=p, seed=2, backend=name)
        leaves = [t for t in (x, w, b_, s) if t is not None]
        first = [y, *torch.autograd.grad(y, leaves, dy)]
        e = FF.bias_act_dropout(x, None, act if s is None else "relu", p=p, seed=2, backend=name)
        return [*first, e, *torch.autograd.grad(e, x, x.detach())]

    expected = run(x, w, dy)
    got = run(_strided(x, kx), _strided(w, kw), _strided(dy, kdy))
    torch.testing.assert_close(got, expected)
    assert got[0].is_contiguous() and got[0].shape == (*leading, n)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([2.0**-32, 0.001, 0.1, 0.5, 0.9, 1 - 2.0**-32]),
    st.integers(0, 2**32 - 70),
    st.integers(1, 3),
)
def test_native_masks_are_those_of_the_specification(seed, stream, m, n, p, row_offset, threads):
    if reasons := registry._BY_NAME["native"].reasons_against("cpu", torch.float32):
        pytest.skip("; ".join(reasons))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = FF.dropout(
            torch.ones(m, n), p, seed=seed, stream=stream, row_offset=row_offset, backend="native"
        )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y != 0, philox.dropout_mask(seed, stream, m, n, p, row_offset=row_offset))


def _scalar_window(seed: int, stream: int, row: int, column: int) -> int:
    """docs/dropout.md in Python integers, written apart from philox.py."""
    low = 0xFFFFFFFF
    c = [column // 8, row, stream & low, (stream >> 32) & low]
    k = [seed & low, (seed >> 32) & low]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    i = column % 8 // 2
    return c[i] if column % 2 == 0 else (c[i] >> 16 | c[(i + 1) % 4] << 16) & low


_INT64 = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=60, deadline=None)
@given(_INT64, _INT64, st.integers(0, 2**32 - 4), st.integers(0, 40))
def test_windows_are_those_of_the_specification(seed, stream, row_offset, columns):
    state = torch.tensor([seed, stream])
    got = philox.windows(state, 0, 3, columns, row_offset)
    expected = [
        [_scalar_window(seed, stream, row_offset + r, c) for c in range(columns)] for r in range(3)
    ]
    assert got.tolist() == expected
