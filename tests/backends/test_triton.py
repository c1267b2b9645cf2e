"""The Triton kernels: in the interpreter where there is no GPU, else on the device.

The promises of test_ops.py, kept by this backend, and those that only it makes: tiles, splits along
K, descriptors, dgrad_act and cross_entropy. bf16 products are upcast in the interpreter, which
cannot multiply bf16; on a GPU they are not.
"""

import pytest
import torch
import torch.nn.functional as F

import fusedmlp.functional as FF
from fusedmlp.backends import reference
from fusedmlp.spec import activations, philox
from fusedmlp.spec.budget import excess
from fusedmlp.spec.layers import Epilogue

from .. import check_op, interpreter
from ..autograd.test_corners import (  # noqa: F401  the same promises, with this file's `backend`
    test_a_dropped_element_is_plus_zero_with_zero_gradient,
    test_corners_are_those_of_torch,
    test_empty_sizes,
    test_eval_and_p_0_are_no_dropout_and_take_no_seed,
    test_not_even_an_infinite_gradient_passes_a_relu_that_is_off,
)
from ..autograd.test_ops import (  # noqa: F401
    test_a_state_may_be_a_view,
    test_backward_twice_gives_the_same_and_changes_nothing_saved,
    test_expanded_input_and_gradient,
    test_fp32_bias_beside_a_16_bit_input,
    test_ops_called_directly_refuse_with_the_same_words,
)
from ..check_op import DTYPES, SEED, STREAM
from ..conftest import _skip_unless_usable

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # The interpreter computes both sides of a selection, also the one that overflows.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@pytest.fixture
def backend(device, monkeypatch) -> str:
    _skip_unless_usable("triton", device)
    if device == "cpu":
        if reason := interpreter.unusable():
            pytest.skip(reason)
        from fusedmlp.backends.triton import tiles

        # The interpreter runs one program after the other: fewer and larger ones.
        monkeypatch.setattr(tiles, "_SMALL_TILE", 4096)
        interpreter.repair(monkeypatch)
    return "triton"


@pytest.fixture
def kernels(backend):
    from fusedmlp.backends import triton

    return triton


def _layer(m, k, n, dtype, device, act="gelu", p=0.3):
    """Arguments of linear_act_fwd on random tensors."""
    g = torch.Generator().manual_seed(1)
    x, w, b = (torch.randn(*shape, generator=g) for shape in ((m, k), (n, k), (n,)))
    x, w, b = (t.to(device, dtype) for t in (x, w / max(k, 1) ** 0.5, b))
    slope = torch.rand(n, generator=g).to(device, dtype) if act == "prelu" else None
    state = torch.tensor([SEED, STREAM], device=device)
    threshold, scale = philox.threshold_and_scale(p)
    return x, w, b, slope, state, activations.IDS[act], 0.01, threshold, scale, 3, 11


def _assert_within_budget(got, function, args):
    """Each result of a kernel against `function`, of the reference, on the same arguments."""
    double = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in args]
    dtype = args[0].dtype
    used = [
        excess(g.to(dtype), plain.to(dtype), truth, dtype)
        for g, plain, truth in zip(got, function(*args), function(*double), strict=True)
    ]
    assert all(u <= 1 for u in used), f"share of the error budget used: {used}"


def _assert_same_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


TILES = {"16x16x16": (16, 16, 16), "64x32x32": (64, 32, 32), "32x64x16": (32, 64, 16)}


def _tile(name, **fields):
    from fusedmlp.backends.triton import tiles

    return tiles.Tile(*TILES[name], 4, 2, **fields)


def _run(args, tile, keep_preact=True):
    from fusedmlp.backends.triton import linear_act

    x, w, *e = args
    return linear_act.run(x, w, Epilogue(*e), keep_preact=keep_preact, tile=tile)


def _linear_act(backend):
    """linear_act_fwd of a backend, with the values of the epilogue one by one."""
    return lambda x, w, *e: backend.linear_act_fwd(x, w, Epilogue(*e))


# --- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("act", activations.NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["linear_act", "bias_act_dropout"])
def test_the_table_is_right(op, dtype, act, backend, device):
    found = check_op.spread(check_op.table(op, DTYPES[dtype], device), pairs=False)
    check_op.assert_right([check_op.Runner(backend)], [c for c in found if c.act == act])


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("p", [2.0**-32, 0.1, 0.5, 1 - 2.0**-32])
def test_the_mask_does_not_depend_on_the_tile(p, name, kernels, device):
    """Bits of the specification from each tile shape, with stream, layer and row offset."""
    for m, n, offset in ((67, 75, 2**32 - 67), (1, 8, 0), (130, 10, 5)):
        x, w, _, *rest, layer, _ = _layer(m, 8, n, torch.float32, device, "none", p)
        far = torch.full((n,), 1e3, device=device)  # so that no kept element is 0
        y, _ = _run((x, w, far, *rest, layer, offset), _tile(name), keep_preact=False)
        mask = philox.dropout_mask(SEED, STREAM + layer, m, n, p, row_offset=offset)
        assert torch.equal(y.cpu() != 0, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(67, 75), (3, 1031), (130, 10), (5, 7, 9)])
def test_dropout_alone_draws_the_bits_of_the_specification(shape, dtype, backend, device):
    ones = torch.ones(shape, dtype=DTYPES[dtype], device=device)
    for seed, stream in ((0, 0), (-1, -1), (SEED, STREAM), (2**63 - 1, -(2**63))):
        y = FF.dropout(ones, 0.3, seed=seed, stream=stream, row_offset=5, backend=backend)
        mask = philox.dropout_mask(seed, stream, ones[..., 0].numel(), shape[-1], 0.3, row_offset=5)
        assert torch.equal(y.cpu() != 0, mask.view(shape))


# --- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "variant",
    [dict(), dict(splits=3), dict(descriptors=True), dict(descriptors=True, splits=2)],
    ids=["pointers", "split", "descriptors", "split descriptors"],
)
@pytest.mark.parametrize("name", TILES)
def test_every_kind_of_tile_is_within_the_error_budget(name, variant, dtype, kernels, device):
    # Rows of 120 elements start at multiples of 16 bytes: descriptors can be made of them.
    args = _layer(67, 120, 43, DTYPES[dtype], device)
    _assert_within_budget(_run(args, _tile(name, **variant)), _linear_act(reference), args)


def test_a_split_along_k_gives_the_same_bits_twice(kernels, device):
    args = _layer(10, 301, 9, torch.float32, device)
    first, second = (_run(args, _tile("16x16x16", splits=5)) for _ in range(2))
    _assert_same_bits(first, second)
    _assert_within_budget(first, _linear_act(reference), args)


@pytest.mark.parametrize("descriptors", [False, True])
def test_operands_may_have_any_strides(descriptors, kernels, device):
    """Transposed, every second element, a part of wider rows, three dimensions, expanded."""
    x, w, *rest = _layer(40, 24, 32, torch.float32, device)
    tile = _tile("32x64x16", descriptors=descriptors)
    expected = _run((x, w, *rest), tile)
    for x_, w_ in (
        (x.t().contiguous().t(), w),
        (x, w.t().contiguous().t()),
        (torch.stack((x, x), -1)[..., 0], torch.stack((w, w), -1)[..., 1]),
        (torch.cat((x, x), 1)[:, :24], torch.cat((w, w), 1)[:, 24:]),
        (x.view(5, 8, 24).transpose(0, 1).contiguous().transpose(0, 1), w),
    ):
        _assert_same_bits(_run((x_, w_, *rest), tile), expected)
    row = x[:1].expand(40, 24)
    _assert_same_bits(_run((row, w, *rest), tile), _run((row.contiguous(), w, *rest), tile))


def test_fp32_products_obey_torchs_setting(kernels):
    from fusedmlp.backends.triton import gemm

    operands = torch.zeros(4, 8), torch.zeros(4, 8)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert gemm.Product(*operands, "linear_act").constants["PRECISION"] == setting
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_large_fp32_product_takes_the_librarys_gemm(kernels, device, monkeypatch):
    from fusedmlp.backends.triton import tiles

    monkeypatch.setattr(tiles, "LARGEST_SLOW_PRODUCT", 0)
    args = _layer(19, 20, 21, torch.float32, device)
    _assert_within_budget(_linear_act(kernels)(*args), _linear_act(reference), args)


# --- dgrad_act ----------------------------------------------------------------------------------


def _dgrad_act(kernels, *args, tile=None):
    dz, w, saved, *e, saves, need_db, need_dslope = args
    return kernels.dgrad_act(dz, w, saved, Epilogue(*e), saves, need_db, need_dslope, tile)


def _dgrad_act_reference(dz, w, saved, *rest):
    *e, saves, need_db, need_dslope = rest
    return reference.bias_act_dropout_bwd(dz @ w, saved, Epilogue(*e), saves, need_db, need_dslope)


def _dgrad_arguments(m, k, n, dtype, device, act, p, slopes=None):
    """Arguments of dgrad_act: a layer of k units before one of n."""
    z, w, b, slope, state, *numbers = _layer(m, k, k, dtype, device, act, p)
    slope = None if slope is None else slope[:slopes]
    y = reference.bias_act_dropout_fwd(z, Epilogue(b, slope, state, *numbers))
    saves = activations.saves(numbers[0], 0.01, dtype, p > 0)
    saved = {0: None, 1: y, 2: z}[saves]
    g = torch.Generator().manual_seed(5)
    dz, w = torch.randn(m, n, generator=g), torch.randn(n, k, generator=g) / n**0.5
    dz, w = dz.to(device, dtype), w.to(device, dtype)
    return dz, w, saved, b, slope, state, *numbers, saves, True, slope is not None


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("act", activations.NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dgrad_act_is_the_gemm_and_the_backward_epilogue(dtype, act, p, kernels, device):
    # So many columns that the error of the yardstick's column sums is not small by luck.
    args = _dgrad_arguments(67, 45, 27, DTYPES[dtype], device, act, p)
    _assert_within_budget(_dgrad_act(kernels, *args), _dgrad_act_reference, args)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("slopes", [1, None])
def test_dgrad_act_sums_over_several_tiles(slopes, descriptors, kernels, device):
    args = _dgrad_arguments(150, 72, 40, torch.float32, device, "prelu", 0.3, slopes)
    got = _dgrad_act(kernels, *args, tile=_tile("64x32x32", descriptors=descriptors))
    _assert_within_budget(got, _dgrad_act_reference, args)


def test_dgrad_act_of_an_empty_batch(kernels, device):
    args = _dgrad_arguments(0, 13, 27, torch.float32, device, "prelu", 0.3)
    dz, db, dslope = _dgrad_act(kernels, *args)
    assert dz.shape == (0, 13) and not db.any() and not dslope.any()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_gradient_stays_none_where_a_square_overflowed(dtype, p, backend, device):
    """As behind a clamp. The derivative 2 z is finite there, though it cannot be read off y."""
    x = torch.tensor([[1e20, 1e38, 3.0, -1e20, 0.0]] * 4, dtype=DTYPES[dtype], device=device)
    dy = torch.zeros_like(x)
    dy[:, 2] = 0.5
    x.requires_grad_()
    y = FF.bias_act_dropout(x, None, "relu_squared", p=p, seed=5, backend=backend)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.isinf().any()
    kept = philox.dropout_mask(5, 0, 4, 5, p)[:, 2].to(device)
    torch.testing.assert_close(dx[kept, 2], torch.full_like(dx[kept, 2], 3.0 / (1 - p)))
    dx[:, 2] = 0
    assert (dx == 0).all()


# --- cross entropy ------------------------------------------------------------------------------


def _cross_entropy_by_torch(logits, target, smoothing, ignore_index, grad_scale):
    z = logits.detach().requires_grad_()
    loss = F.cross_entropy(
        z, target, label_smoothing=smoothing, ignore_index=ignore_index, reduction="none"
    )
    (dz,) = torch.autograd.grad(loss, z, torch.full_like(loss, grad_scale))
    return loss.detach(), dz


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "c"), [(1, 2), (67, 10), (5, 1000), (3, 5003)])
def test_cross_entropy_and_its_gradient(m, c, dtype, smoothing, kernels, device):
    g = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(c, m, generator=g)).to(device, DTYPES[dtype]).t()
    target = torch.randint(c, (m,), generator=g).to(device)
    target[m // 2 :: 7] = -1 if m > 1 else 0
    args = logits, target, smoothing, -1, 1 / m
    losses, dlogits = kernels.cross_entropy(*args)
    (true_losses, truth), (_, plain) = (
        _cross_entropy_by_torch(t, *args[1:]) for t in (logits.double(), logits)
    )
    assert excess(dlogits, plain, truth, dlogits.dtype) <= 1
    # The losses are fp32 whatever the logits are; F.cross_entropy of fp32 logits is the yardstick.
    fp32_losses, _ = _cross_entropy_by_torch(logits.float(), *args[1:])
    assert excess(losses, fp32_losses, true_losses, torch.float32) <= 1


def test_cross_entropy_of_infinite_logits_and_of_a_target_that_does_not_exist(kernels, device):
    inf = float("inf")
    logits = torch.tensor([[1.0, -inf, 2.0], [1.0, 2.0, 3.0], [-inf, -inf, 0.0]], device=device)
    target = torch.tensor([0, 3, 2], device=device)
    losses, dlogits = kernels.cross_entropy(logits, target)
    expected, gradient = _cross_entropy_by_torch(logits[::2], target[::2], 0.0, -100, 1.0)
    torch.testing.assert_close(losses[::2], expected)
    torch.testing.assert_close(dlogits[::2], gradient)
    assert losses[1].isnan() and dlogits[1].isnan().all()
    # A first tile of columns that holds nothing but -inf.
    wide = torch.full((1, 5000), -inf, device=device)
    wide[0, 4999] = 1.0
    losses, _ = kernels.cross_entropy(wide, torch.tensor([4999], device=device))
    assert losses.item() == 0
