"""What PyTorch wraps around the ops: opcheck, compile, checkpoint, autocast, export, torch.func."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fusedmlp
import fusedmlp.functional as FF
from fusedmlp.spec import activations, philox

NUMBERS = (0.01, 2**31, 2.0, 1, 3)  # alpha, threshold, scale, layer, row_offset
OPCHECK = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def _overload(op, backend):
    return getattr(getattr(torch.ops.fusedmlp, op), backend)


@pytest.mark.parametrize("act", ["relu", "prelu", "gelu"])
def test_opcheck(act, backend, device):
    x, w = torch.randn(5, 6, device=device), torch.randn(9, 6, device=device)
    b, h = torch.randn(9, device=device), torch.randn(5, 9, device=device)
    slope = torch.rand(9, device=device) if act == "prelu" else None
    state, id_ = torch.tensor([1, 2], device=device), activations.IDS[act]
    saves = activations.saves(id_, 0.01, torch.float32, True)
    rest = (slope, state, id_, *NUMBERS)
    for op, args in (
        ("linear_act_fwd", (x, w, b, *rest)),
        ("linear_act_infer", (x, w, b, *rest)),
        ("bias_act_dropout_fwd", (h, b, *rest)),
        ("bias_act_dropout_bwd", (h, h.relu(), b, *rest, saves, True, act == "prelu")),
        ("bias_act_dropout_bwd", (h, h.relu(), None, *rest, saves, False, False)),
    ):
        torch.library.opcheck(_overload(op, backend), args, test_utils=OPCHECK)


def test_opcheck_draw_seed(device):
    op = torch.ops.fusedmlp.draw_seed.default
    torch.library.opcheck(op, (torch.ones(1, device=device),), test_utils=OPCHECK[:2])
    assert torch.Tag.nondeterministic_seeded in op.tags


def _net(x, w1, b1, w2, b2, act, slope, backend):
    h = FF.linear_act(x, w1, b1, act, slope=slope, p=0.5, backend=backend)
    return FF.dropout(FF.linear_act(h, w2, b2, "none", backend=backend), 0.25, backend=backend)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("act", ["relu", "prelu"])
def test_compiled_in_one_graph_with_the_masks_of_eager(act, compiler, backend, device):
    leaves = [torch.randn(*s, device=device) for s in ((8, 6), (9, 6), (9,), (4, 9), (4,))]
    slope = torch.rand(9, device=device) if act == "prelu" else None
    leaves = [t.requires_grad_() for t in leaves]

    def run(f):
        torch.manual_seed(3)
        y = f(*leaves, act, slope, backend)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    torch._dynamo.reset()
    compiled = torch.compile(_net, backend=compiler, fullgraph=True)
    for got, want in zip(run(compiled), run(_net), strict=True):
        assert torch.equal(got == 0, want == 0)
        torch.testing.assert_close(got, want)
    torch.manual_seed(4)
    a, b = compiled(*leaves, act, slope, backend), compiled(*leaves, act, slope, backend)
    assert not torch.equal(a == 0, b == 0)


def test_one_compilation_serves_five_batch_sizes(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    w = torch.randn(9, 6, device=device, requires_grad=True)
    f = torch.compile(
        lambda x: FF.linear_act(x, w, None, "gelu", p=0.5),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    f(torch.randn(2, 6, device=device))
    first = counter.frame_count
    for m in (3, 8, 17, 300):
        assert f(torch.randn(m, 6, device=device)).shape == (m, 9)
    assert counter.frame_count == first


def test_a_state_tensor_that_advances_does_not_recompile(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    state = torch.tensor([5, 0], device=device)
    x = torch.ones(16, 32, device=device)

    def f(x):
        with fusedmlp.dropout_state(state):
            return FF.dropout(x, 0.5)

    compiled = torch.compile(f, backend=counter)
    for step in range(5):
        assert torch.equal(
            compiled(x) != 0, philox.dropout_mask(5, step, 16, 32, 0.5, device=device)
        )
        state[1] += 1
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(reentrant, backend, device):
    x = torch.randn(9, 6, device=device, requires_grad=True)
    w = torch.randn(12, 6, device=device, requires_grad=True)

    def block(x):
        return FF.linear_act(x, w, None, "gelu", p=0.5, backend=backend)

    results = []
    for wrap in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        y = wrap(x)
        results.append(
            [y, *torch.autograd.grad(y.sum(), (x, w))]
            if not reentrant
            else [y, *_backward(y, x, w)]
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def _backward(y, *leaves):
    for t in leaves:
        t.grad = None
    y.sum().backward()
    return [t.grad.clone() for t in leaves]


def test_autocast_casts_as_linear_does(backend, device):
    x = torch.randn(5, 8, device=device, requires_grad=True)
    w = torch.randn(6, 8, device=device, requires_grad=True)
    b = torch.randn(6, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = FF.linear_act(x, w, b, "relu", backend=backend)
        plain = F.relu(F.linear(x, w, b))
        inside = torch.autograd.grad(y.sum(), (x, w, b), retain_graph=True)
        kept = FF.bias_act_dropout(x, None, "relu", backend=backend)
    assert y.dtype == plain.dtype == torch.bfloat16 and kept.dtype == torch.float32
    torch.testing.assert_close(y, plain, rtol=2e-2, atol=2e-2)
    outside = torch.autograd.grad(y.sum(), (x, w, b))
    assert [g.dtype for g in outside] == [torch.float32] * 3
    for a, b in zip(inside, outside, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_fp64_alone(device):
    x, w = (torch.randn(4, 4, dtype=torch.float64, device=device) for _ in range(2))
    with torch.autocast(device, torch.bfloat16):
        assert FF.linear_act(x, w, None, "relu").dtype == torch.float64


def test_functorch_transforms_give_the_gradients_of_autograd(device):
    x, w = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)

    def f(x, w):
        return FF.linear_act(x, w, None, "gelu", p=0.4, seed=2).square().sum()

    leaves = [t.clone().requires_grad_() for t in (x, w)]
    want = torch.autograd.grad(f(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(f, (0, 1))(x, w), want)
    torch.testing.assert_close(torch.func.jacrev(f, (0, 1))(x, w), want)
    (value, tangent) = torch.func.jvp(lambda x: f(x, w), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, want[0].sum())
    rows = torch.func.vmap(lambda r: FF.linear_act(r, w, None, "gelu", p=0.4, seed=2))(x)
    first = FF.linear_act(x[:1], w, None, "gelu", p=0.4, seed=2)
    torch.testing.assert_close(rows[:1], first)


def test_vmap_obeys_its_randomness_argument(device):
    x = torch.ones(6, 64, device=device)
    f = torch.func.vmap(lambda r: FF.dropout(r, 0.5), randomness="different")
    assert len({tuple(r.tolist()) for r in f(x)}) == 6
    same = torch.func.vmap(lambda r: FF.dropout(r, 0.5), randomness="same")(x)
    assert (same == same[0]).all()
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda r: FF.dropout(r, 0.5))(x)


def test_a_named_kernel_backend_is_refused_inside_transforms(backend, device):
    if backend == "reference":
        pytest.skip("reference is the backend that runs inside transforms")
    with pytest.raises(fusedmlp.BackendError, match="(?s)inside torch.func transforms"):
        torch.func.grad(lambda x: FF.dropout(x, backend=backend).sum())(torch.ones(3))


def test_exported_program_gives_the_same(backend, device):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(9, 6, device=device))

        def forward(self, x):
            return FF.linear_act(
                x, self.w, None, "silu", p=0.5, training=self.training, backend=backend
            )

    net, x = Net().eval(), torch.randn(4, 6, device=device)
    batch = torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    for m in (4, 33):
        x = torch.randn(m, 6, device=device)
        torch.testing.assert_close(program.module()(x), net(x))
