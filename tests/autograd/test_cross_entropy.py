"""cross_entropy: F.cross_entropy's values, gradients, corners and shapes, on every backend."""

import pytest
import torch
import torch.nn.functional as F

import fusedmlp
import fusedmlp.functional as FF
from fusedmlp import ops
from fusedmlp.backends import registry
from fusedmlp.spec.budget import excess

from .. import interpreter
from ..check_op import DTYPES
from ..conftest import _skip_unless_usable

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # The interpreter computes both sides of a selection, also the one that overflows.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@pytest.fixture(params=["reference", "native", "triton", None], ids=str)
def loss_backend(request, device, monkeypatch) -> str | None:
    """A backend by name, or None for automatic choice."""
    name = request.param
    if name is not None:
        _skip_unless_usable(name, device)
        reasons = registry._BY_NAME[name].reasons_against(device, torch.float32, "cross_entropy")
        if reasons:
            pytest.skip(f"{name} on {device}: {'; '.join(reasons)}")
    if name == "triton" and device == "cpu":
        if reason := interpreter.unusable():
            pytest.skip(reason)
        interpreter.repair(monkeypatch)
    return name


def _case(m, c, dtype, device, ignored=True):
    g = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(m, c, generator=g)).to(device, dtype)
    target = torch.randint(c, (m,), generator=g)
    if ignored and m > 2:
        target[m // 2 :: 7] = -1
    return logits, target.to(device)


def _with_gradient(function, logits, target, **options):
    z = logits.detach().requires_grad_()
    loss = function(z, target, **options)
    (dz,) = torch.autograd.grad(loss, z, torch.full_like(loss, 0.7))
    return loss.detach(), dz


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "c"), [(1, 2), (67, 10), (5, 1000)])
def test_loss_and_gradient_are_those_of_torch(
    m, c, dtype, smoothing, reduction, loss_backend, device
):
    logits, target = _case(m, c, DTYPES[dtype], device)
    options = dict(label_smoothing=smoothing, ignore_index=-1, reduction=reduction)
    loss, dz = _with_gradient(
        lambda *a, **o: FF.cross_entropy(*a, **o, backend=loss_backend), logits, target, **options
    )
    true_loss, truth = _with_gradient(F.cross_entropy, logits.double(), target, **options)
    plain_loss, plain = _with_gradient(F.cross_entropy, logits, target, **options)
    assert loss.shape == plain_loss.shape
    assert excess(dz, plain, truth, logits.dtype) <= 1
    assert excess(loss, plain_loss, true_loss, logits.dtype) <= 1


@pytest.mark.parametrize(
    ("shape", "target"),
    [((4,), ()), ((3, 4), (3,)), ((2, 4, 3), (2, 3)), ((2, 4, 3, 5), (2, 3, 5))],
)
def test_shapes_of_torch(shape, target, loss_backend, device):
    logits, target = torch.randn(shape, device=device), torch.randint(4, target, device=device)
    for reduction in ("mean", "none"):
        ours = _with_gradient(
            lambda *a, r=reduction: FF.cross_entropy(*a, reduction=r, backend=loss_backend),
            logits,
            target,
        )
        theirs = _with_gradient(
            lambda *a, r=reduction: F.cross_entropy(*a, reduction=r), logits, target
        )
        torch.testing.assert_close(ours, theirs)


def test_corners_are_those_of_torch(loss_backend, device):
    inf = float("inf")
    cases = {
        "infinite": ([[1.0, -inf, 2.0], [-inf, -inf, 0.0]], [0, 2]),
        "huge": ([[1e30, 0.0], [-1e30, 1.0]], [1, 1]),
        "nan": ([[float("nan"), 1.0]], [1]),
        "one class": ([[3.0], [2.0]], [0, 0]),
        "all ignored": ([[3.0, 1.0]], [-100]),
        "no rows": (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
    }
    for name, (logits, target) in cases.items():
        logits = torch.as_tensor(logits, device=device)
        target = torch.as_tensor(target, device=device)
        for reduction in ("mean", "sum", "none"):
            ours = _with_gradient(
                lambda *a, r=reduction: FF.cross_entropy(*a, reduction=r, backend=loss_backend),
                logits,
                target,
            )
            theirs = _with_gradient(
                lambda *a, r=reduction: F.cross_entropy(*a, reduction=r), logits, target
            )
            torch.testing.assert_close(
                ours, theirs, equal_nan=True, msg=lambda m, n=name, r=reduction: f"{n} {r}: {m}"
            )


def test_any_strides_of_logits_and_target(loss_backend, device):
    logits, target = _case(9, 6, torch.float32, device)
    expected = FF.cross_entropy(logits, target, ignore_index=-1, backend=loss_backend)
    wide = torch.stack((target, target), 1)[:, 1]
    for x in (logits.t().contiguous().t(), torch.cat((logits, logits), 1)[:, 6:]):
        got = FF.cross_entropy(x, wide, ignore_index=-1, backend=loss_backend)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_second_derivatives(smoothing, device):
    logits, target = _case(5, 4, torch.float64, device)

    def mean(z):
        return FF.cross_entropy(
            z, target, label_smoothing=smoothing, ignore_index=-1, backend="reference"
        )

    z = logits.requires_grad_()
    assert torch.autograd.gradcheck(mean, z)
    assert torch.autograd.gradgradcheck(mean, z)


def test_a_gradient_penalty_is_that_of_torch(loss_backend, device):
    logits, target = _case(9, 6, torch.float32, device)

    def second(function):
        z = logits.detach().requires_grad_()
        (dz,) = torch.autograd.grad(function(z), z, create_graph=True)
        return torch.autograd.grad(dz.square().sum(), z)[0]

    torch.testing.assert_close(
        second(lambda z: FF.cross_entropy(z, target, ignore_index=-1, backend=loss_backend)),
        second(lambda z: F.cross_entropy(z, target, ignore_index=-1)),
    )


@pytest.mark.parametrize("wrong", [4, -1])
def test_a_target_that_is_no_class(wrong, loss_backend, device):
    logits, target = torch.randn(3, 4, device=device), torch.tensor([0, wrong, 1], device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"must be in \[0, C\) with C = 4.*got {wrong}$"):
            FF.cross_entropy(logits, target, backend=loss_backend)
    if loss_backend is None:
        return
    op = ops.BY_BACKEND[loss_backend].cross_entropy
    losses, dlogits = op(logits, target, 0.0, -100, 1.0)
    assert losses.isnan().tolist() == [False, True, False]
    assert dlogits.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [*DTYPES, "fp64"])
def test_schema_and_fake(dtype, loss_backend, device):
    if loss_backend is None or (dtype == "fp64" and loss_backend != "reference"):
        pytest.skip("this backend has no such op")
    dtype = DTYPES.get(dtype, torch.float64)
    args = *_case(9, 6, dtype, device), 0.1, -1, 0.5
    op = ops.BY_BACKEND[loss_backend].cross_entropy
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    # The factor of the gradient is the op's alone: the public function leaves it at 1.
    _, whole = op(*args[:-1], 1.0)
    torch.testing.assert_close(op(*args)[1], whole * 0.5)


@pytest.mark.parametrize("name", ["reference", None], ids=str)
def test_compiled_without_a_break_it_gives_the_same(name, device):
    logits, target = _case(9, 6, torch.float32, device)

    def mean(z):
        return FF.cross_entropy(z, target, label_smoothing=0.1, ignore_index=-1, backend=name)

    results = []
    for function in (mean, torch.compile(mean, fullgraph=True)):
        z = logits.detach().requires_grad_()
        loss = function(z)
        results.append((loss.detach(), *torch.autograd.grad(loss, z)))
    torch.testing.assert_close(*results)


def test_under_autocast_the_loss_is_fp32(loss_backend, device):
    logits, target = _case(9, 6, torch.bfloat16, device)
    with torch.autocast(device, torch.bfloat16):
        loss = FF.cross_entropy(logits, target, ignore_index=-1, backend=loss_backend)
        expected = F.cross_entropy(logits, target, ignore_index=-1)
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_inside_transforms(device):
    logits, target = _case(9, 6, torch.float32, device, ignored=False)
    z = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(F.cross_entropy(z, target), z)
    got = torch.func.grad(lambda x: FF.cross_entropy(x, target))(logits)
    torch.testing.assert_close(got, want)
    with pytest.raises(fusedmlp.BackendError, match="(?s)inside torch.func transforms"):
        torch.func.grad(lambda x: FF.cross_entropy(x, target, backend="triton"))(logits)


def test_wrong_arguments_are_named():
    x, t = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for error, message, arguments, options in (
        (TypeError, "input must be a torch.Tensor, got list", ([1.0], t), {}),
        (TypeError, "target must be a torch.Tensor, got int", (x, 1), {}),
        (TypeError, "target must be int64 class numbers, got torch.float32", (x, x), {}),
        (TypeError, "input must be one of .*, got torch.int64", (t, t), {}),
        (ValueError, r"target must be \(M,\) with M = 3", (x, t[:2]), {}),
        (ValueError, "with at least one class", (x[:, :0], t), {}),
        (ValueError, r"label_smoothing must be in \[0, 1\], got 2", (x, t), {"label_smoothing": 2}),
        (TypeError, "ignore_index must be an int", (x, t), {"ignore_index": 0.5}),
        (ValueError, "reduction must be one of mean, sum, none", (x, t), {"reduction": "max"}),
        (ValueError, "unknown backend 'cuda'", (x, t), {"backend": "cuda"}),
    ):
        with pytest.raises(error, match=f"(?s)(cross_entropy|backend): .*{message}"):
            FF.cross_entropy(*arguments, **options)


def test_a_backend_without_it_is_refused_with_the_reason(device):
    _skip_unless_usable("native", device)
    if not registry._BY_NAME["native"].reasons_against(device, torch.float32, "cross_entropy"):
        pytest.skip(f"native has it for {device} tensors")
    with pytest.raises(fusedmlp.BackendError, match="has no cross_entropy for cpu tensors"):
        FF.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), backend="native")
