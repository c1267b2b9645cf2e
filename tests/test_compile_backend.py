"""Traced models under torch.compile, and fusing as its graph pass."""

import pytest
import torch
import torch._dynamo
from torch import nn

import fusedmlp
from fusedmlp import functional, fuse
from fusedmlp.spec import activations

from .class_nets import Functional, Net


def _outputs_and_gradients(model, x, parameters):
    torch.manual_seed(3)
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), parameters)]


def test_compiled_with_the_masks_of_eager():
    fused, x = fuse(Functional(), trace=True), torch.randn(9, 6)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with fusedmlp.use_backend("reference"):
        for mode in (True, False):
            fused.train(mode)
            want, got = (
                _outputs_and_gradients(m, x, [*fused.parameters()]) for m in (fused, compiled)
            )
            torch.testing.assert_close(got, want)
        fused.train()
        fused.p = 1.0
        torch.testing.assert_close(compiled(x), fused(x))


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_the_compile_backend_gives_what_fuse_gives(then, backend, device, monkeypatch):
    run, ran = functional.run_linear_act, []
    monkeypatch.setattr(functional, "run_linear_act", lambda *a: ran.append(a[2].act) or run(*a))
    net, x = Net(), torch.randn(8, 784, device=device)
    fused, leaves = fuse(net, trace=True), [*net.parameters()]
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=fusedmlp.compile_backend, options={"then": then})
    want, got = (_outputs_and_gradients(m, x, leaves) for m in (fused, compiled))
    torch.testing.assert_close(got, want)
    assert torch.equal(got[0] == 0, want[0] == 0)
    for row_offset in (0, 3):
        with fusedmlp.dropout_state(7, 40, row_offset):
            got = compiled(x)
        with fusedmlp.dropout_state(7, 40, row_offset):
            torch.testing.assert_close(got, fused(x))
    assert not torch.equal(compiled(x), compiled(x))
    net.eval(), fused.eval()
    ran.clear()
    torch.testing.assert_close(compiled(x), fused(x))
    assert set(ran) == {activations.RELU}  # one call for each group, more where it is traced


def test_the_compile_backend_fuses_prelu_and_dropout_by_itself():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 8), nn.PReLU(8), nn.Dropout(0.2))
    fused, x = fuse(net), torch.randn(5, 6, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=fusedmlp.compile_backend, options={"then": "eager"})
    with fusedmlp.use_backend("reference"):
        leaves = [*net.parameters(), x]
        want, got = (_outputs_and_gradients(m, x, leaves) for m in (fused, compiled))
    torch.testing.assert_close(got, want)


def test_the_compile_backend_leaves_a_graph_without_groups_to_the_other():
    torch._dynamo.reset()
    f = torch.compile(
        lambda x: x.sin() + 1, backend=fusedmlp.compile_backend, options={"then": "aot_eager"}
    )
    x = torch.randn(4)
    torch.testing.assert_close(f(x), x.sin() + 1)


def test_options_that_the_other_backend_does_not_take_are_refused():
    torch._dynamo.reset()
    f = torch.compile(
        torch.sin, backend=fusedmlp.compile_backend, options={"then": "eager", "max_autotune": True}
    )
    with pytest.raises(Exception, match="mode and options must be left out with 'eager'"):
        f(torch.randn(3))
