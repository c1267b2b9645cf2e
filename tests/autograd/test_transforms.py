"""FusedSequential inside what PyTorch wraps around it: compile, export, torch.func, ..."""

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import fusedmlp
from fusedmlp import FusedSequential, fuse
from fusedmlp.backends import registry

from ..nets import SEED, by_hand, in_state, mlp, on_backend  # noqa: F401


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part", ["whole", "inner"])
def test_checkpointing_recomputes_the_same_masks(part, reentrant, backend):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    torch.manual_seed(2)
    inner = fuse(mlp())
    plain = FusedSequential(nn.Linear(6, 6), nn.Dropout(0.5), Checkpointed(inner)[0])
    again = FusedSequential(plain[0], plain[1], Checkpointed(inner))
    outer = Checkpointed(plain) if part == "whole" else again

    def run(f):
        """Separate containers draw separate seeds, so `plain` has to call inner as `again` does."""
        torch.manual_seed(2)
        x = torch.ones(4, 6, requires_grad=True)
        f.zero_grad()
        y = f(x)
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for p in f.parameters())]

    plain[2] = nn.Sequential(inner)
    torch.testing.assert_close(run(outer), run(plain))


def test_double_backward(backend):
    net = fuse(mlp(act=nn.Tanh)).double() if backend == "reference" else fuse(mlp(act=nn.Tanh))
    x = torch.randn(4, 6, dtype=net[0].weight.dtype, requires_grad=True)
    grad = [
        torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0]
        for f in (lambda t: in_state(net, t), lambda t: by_hand(net, t))
    ]
    leaves = [x, net[0].weight]
    torch.testing.assert_close(
        torch.autograd.grad(grad[0].square().sum(), leaves),
        torch.autograd.grad(grad[1].square().sum(), leaves),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_with_the_masks_of_eager(compiler, backend):
    net = nn.Sequential(
        mlp(act=nn.ReLU), nn.BatchNorm1d(3), nn.Linear(3, 8), nn.PReLU(), nn.Dropout(0.3)
    )
    net = fuse(net)
    x = torch.randn(8, 6, requires_grad=True)

    def run(f):
        torch.manual_seed(3)
        y = f(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=compiler, fullgraph=True)
    got, want = run(compiled), run(net)
    assert torch.equal(got[0] == 0, want[0] == 0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    net.eval()
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_exported_with_any_batch_size(training, strict, backend):
    net, batch = fuse(mlp()).train(training), torch.export.Dim("batch")
    shapes = ({0: batch},)
    program = torch.export.export(net, (torch.randn(4, 6),), strict=strict, dynamic_shapes=shapes)
    x = torch.randn(9, 6)
    torch.manual_seed(1)
    got = program.module()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, net(x))


def test_under_autocast(backend, device):
    net, x = fuse(mlp()), torch.randn(4, 6)
    with torch.autocast(device, dtype=torch.bfloat16):
        got, want = in_state(net, x), by_hand(net, x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
    got.float().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32


def test_autocast_of_a_slope_alone_is_left_to_the_module():
    net = fuse(nn.Sequential(nn.PReLU(), nn.Dropout(0.5)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(torch.randn(4, 6)).dtype == nn.PReLU()(torch.randn(4, 6)).dtype


@pytest.mark.parametrize("named", [None, "reference"])
def test_torch_func(named):
    net, x = fuse(mlp()), torch.randn(4, 6)
    params = dict(net.named_parameters())
    with fusedmlp.use_backend(named), fusedmlp.dropout_state(SEED):
        got = grad(lambda p: functional_call(net, p, (x,)).sum())(params)
        want = torch.autograd.grad(net(x).sum(), list(params.values()))
        torch.testing.assert_close(tuple(got.values()), want)
        params, _ = stack_module_state([net, fuse(mlp())])
        both = vmap(lambda p: functional_call(net, p, (x,)))(params)
        torch.testing.assert_close(both[0], net(x))


def test_torch_func_obeys_randomness():
    net, x = fuse(nn.Sequential(nn.Dropout(0.5))), torch.ones(2, 1, 64)
    same = vmap(net, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = vmap(net, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="random"):
        vmap(net)(x)


def test_a_named_kernel_backend_refuses_torch_func():
    net = fuse(mlp())
    if registry._BY_NAME["native"].reasons_against("cpu", torch.float32):
        pytest.skip("native cannot run here")
    with fusedmlp.use_backend("native"), pytest.raises(fusedmlp.BackendError, match="torch.func"):
        vmap(net.eval())(torch.randn(4, 1, 6))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_derivatives():
    net, x, dx = fuse(mlp(act=nn.Tanh)), torch.randn(4, 6), torch.randn(4, 6)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(in_state(net, forward_ad.make_dual(x, dx))).tangent
        want = forward_ad.unpack_dual(by_hand(net, forward_ad.make_dual(x, dx))).tangent
    torch.testing.assert_close(got, want)


def test_traced_by_fx_as_its_modules():
    net, x = fuse(mlp()).eval(), torch.randn(4, 6)
    graph = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(graph(x), net(x))
    assert {str(node.target) for node in graph.graph.nodes} >= {"0", "1", "2"}
