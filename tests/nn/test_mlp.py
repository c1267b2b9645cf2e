"""The op mlp: a whole network's forward and backward in one call each, and modules on it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedmlp
from fusedmlp.autograd.mlp import Mlp, Net
from fusedmlp.backends import choice, registry
from fusedmlp.ops import BY_BACKEND
from fusedmlp.spec import activations, philox
from fusedmlp.spec import layers as nets
from fusedmlp.spec.budget import excess

STATE = torch.tensor([5, 7])
ACTS = range(len(activations.NAMES))
DIMS = {
    "small": (37, (20, 33, 64, 10)),
    "one": (1, (1, 1, 1)),
    "row": (1, (300, 65, 7)),
    "few": (5, (784, 40, 3)),
    "tall": (1031, (5, 8, 4)),
}


def network(rows, dims, act, p, dtype=torch.float32, biases=None, seed=0):
    """x, params, ints, numbers of random layers, the last without activation and dropout."""
    g = torch.Generator().manual_seed(seed)
    params, ints, numbers = [], [], []
    for i, (k, n) in enumerate(zip(dims, dims[1:], strict=False)):
        last = i == len(dims) - 2
        a = activations.NONE if last else act
        threshold, scale = philox.threshold_and_scale(p) if p and not last else (0, 1.0)
        has = nets.W | (nets.B if biases is None or biases[i] else 0)
        params.append(torch.randn(n, k, generator=g) / k**0.5)
        if has & nets.B:
            params.append(torch.randn(n, generator=g))
        if a == activations.PRELU:
            has |= nets.SLOPE
            params.append(torch.rand(1 if i else n, generator=g))
        ints += [a, threshold, i, has]
        numbers += [0.01, scale]
    x = torch.randn(rows, dims[0], generator=g)
    return x.to(dtype), [t.to(dtype) for t in params], ints, numbers


def run(backend, net, needs=None, need_dx=True, row_offset=3):
    """The outputs and gradients of the op, dy being the sine of y."""
    x, params, ints, numbers = net
    ops, state = BY_BACKEND[backend], STATE.to(x.device)
    count = len(ints) // nets.INTS
    out = ops.mlp_fwd(x, params, state, ints, numbers, row_offset, True)
    (alone,) = ops.mlp_fwd(x, params, state, ints, numbers, row_offset, False)
    assert torch.equal(alone, out[count - 1])
    needs = nets.bits_of(ints) if needs is None else needs
    grads = ops.mlp_bwd(
        alone.sin(), x, params, state, out[:count], out[count:], ints, numbers, row_offset, needs,
        need_dx,
    )  # fmt: skip
    return [alone, *grads]


def plain(net, row_offset=3):
    """The same by PyTorch's own functions and autograd, with the same masks."""
    x, params, ints, numbers = net
    leaves = [t.detach().clone().requires_grad_() for t in (x, *params)]
    y = leaves[0]
    for w, e in nets.unpack(leaves[1:], ints, numbers, STATE, row_offset):
        y = F.linear(y, w, e.bias)
        if e.act == activations.PRELU:
            y = F.prelu(y, e.slope)
        elif e.act != activations.NONE:
            y = activations.TABLE[e.act].forward(y, e.alpha)
        if e.threshold:
            keep = philox.keep_mask(STATE, e.stream_offset, *y.shape, e.threshold, row_offset)
            y = torch.where(keep, y * e.scale, 0.0)
    return [y.detach(), *torch.autograd.grad(y, leaves, y.detach().sin())]


@pytest.mark.parametrize("shape", DIMS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("act", ACTS, ids=activations.NAMES)
def test_within_the_error_budget(act, p, shape, backend):
    if act == activations.PRELU and shape == "tall":
        pytest.skip("F.prelu's slopes belong to dimension 1, as here, but it wants one a channel")
    rows, dims = DIMS[shape]
    # Several networks together: the error of a short bias alone is a matter of luck.
    seeds = range(2 if rows > 1000 else 32)
    nets_ = [network(rows, dims, act, p, seed=seed) for seed in seeds]
    precise = [network(rows, dims, act, p, torch.float64, seed=seed) for seed in seeds]
    ours, theirs = [run(backend, net) for net in nets_], [plain(net) for net in nets_]
    truths = [plain(net) for net in precise]
    names = ["y", "dx", *[f"d{i}" for i in range(len(nets_[0][1]))]]
    for name, got, want, true in zip(
        names, *(zip(*each, strict=True) for each in (ours, theirs, truths)), strict=True
    ):
        assert excess(*map(torch.stack, (got, want, true)), torch.float32) <= 1, name


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_the_masks_are_those_of_the_reference(p):
    net = network(65, (9, 130, 33, 5), activations.RELU, p)
    a, b = (
        BY_BACKEND[name].mlp_fwd(net[0], net[1], STATE, *net[2:], 11, True)
        for name in ("reference", "native")
    )
    for ours, theirs in zip(a[:2], b[:2], strict=True):
        assert torch.equal(ours == 0, theirs == 0)


@pytest.mark.parametrize("shape", [(256, (784, 256, 10)), (3, (64, 700, 10)), (4096, (16, 32, 4))])
def test_the_bits_do_not_depend_on_the_number_of_threads(shape):
    net = network(*shape, activations.GELU, 0.5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run("native", net))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("need_dx", [False, True])
@pytest.mark.parametrize("needs", [[3, 3, 3], [0, 3, 3], [0, 0, 1], [2, 0, 3], [0, 0, 0]], ids=str)
def test_gradients_that_are_not_needed_have_no_elements(needs, need_dx, backend):
    net = network(37, (20, 33, 64, 10), activations.TANH, 0.5)
    whole, some = run(backend, net), run(backend, net, needs, need_dx)
    wanted = [True, need_dx, *nets.needed(net[2], needs)]
    for a, b, is_wanted in zip(whole, some, wanted, strict=True):
        assert torch.equal(a, b) if is_wanted else b.numel() == 0


def test_layers_without_bias_odd_strides_and_leading_dimensions(backend):
    x, params, ints, numbers = network(24, (6, 9, 5), activations.SILU, 0.5, biases=[False, True])
    want = run(backend, (x, params, ints, numbers))
    strided = [t.t().contiguous().t() if t.dim() == 2 else t for t in params]
    x_strided = torch.stack([x, x])[1].t().contiguous().t().reshape(2, 12, 6)
    got = run(backend, (x_strided, strided, ints, numbers))
    assert got[0].shape == (2, 12, 5) and got[1].shape == (2, 12, 6)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape))


def test_a_slope_that_is_negative_in_double_alone_reads_z(backend):
    """1e-60 below 0 is -0 in fp32: what is kept must not depend on which of them is asked."""
    net = nn.Sequential(nn.Linear(6, 9), nn.LeakyReLU(-1e-60), nn.Dropout(0.5))
    x, params, ints, numbers = network(5, (6, 9, 4), activations.LEAKY_RELU, 0.5)
    numbers[0] = net[1].negative_slope
    out = BY_BACKEND[backend].mlp_fwd(x, params, STATE, ints, numbers, 0, True)
    assert len(out) == 3
    fusedmlp.fuse(net)(x).sum().backward()


def test_an_empty_batch_has_gradients_of_zero(backend):
    _, params, ints, numbers = network(4, (6, 9, 5), activations.GELU, 0.5)
    y, dx, *grads = run(backend, (torch.randn(0, 6), params, ints, numbers))
    assert y.shape == (0, 5) and dx.shape == (0, 6)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, params, strict=True))


@pytest.mark.parametrize("act", [activations.RELU, activations.GELU, activations.PRELU])
def test_opcheck(act, backend):
    x, params, ints, numbers = network(5, (6, 9, 5), act, 0.5)
    ops, rest = BY_BACKEND[backend], (ints, numbers, 0)
    torch.library.opcheck(ops.mlp_fwd, (x, params, STATE, *rest, True))
    torch.library.opcheck(ops.mlp_fwd, (x, params, STATE, *rest, False))
    out = ops.mlp_fwd(x, params, STATE, *rest, True)
    args = (out[1].sin(), x, params, STATE, out[:2], out[2:], *rest, [3, 1], True)
    torch.library.opcheck(ops.mlp_bwd, args)


BAD = {
    "no layer": (dict(ints=[], numbers=[], params=[]), "must be given for each layer"),
    "one number": (dict(numbers=[0.01]), "must be given for each layer"),
    "one tensor": (dict(params=[torch.ones(5, 6)]), "must be given for each layer"),
    "no weight": (dict(ints=[1, 0, 0, 2], numbers=[0.01, 1.0]), "must be given for each layer"),
    "width": (dict(x=torch.ones(4, 7)), "weight"),
    "0-D": (dict(x=torch.ones(())), "input must be"),
    "act": (dict(ints=[99, 0, 0, 3, 0, 0, 1, 3]), "act must be an id"),
    "threshold": (dict(ints=[1, 1 << 33, 0, 3, 0, 0, 1, 3]), "threshold must be in"),
    "state": (dict(state=None), "state must be an int64 tensor"),
    "row offset": (dict(row_offset=-1), "row_offset must be >= 0"),
    "integers": (dict(x=torch.ones(4, 6, dtype=torch.int32)), "must be one of float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case, backend):
    x, params, ints, numbers = network(4, (6, 9, 5), activations.RELU, 0.5)
    change, message = BAD[case]
    args = dict(x=x, params=params, state=STATE, ints=ints, numbers=numbers, row_offset=0)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        BY_BACKEND[backend].mlp_fwd(*(args | change).values(), True)


def test_other_dtypes_are_refused_by_the_kernels_of_the_cpu():
    net = network(4, (6, 9, 5), activations.RELU, 0.0, torch.bfloat16)
    with pytest.raises(RuntimeError, match="must be torch.float32 on the CPU, got torch.bfloat16"):
        run("native", net)


# Modules.


def dropout_net(act=nn.ReLU):
    return nn.Sequential(
        nn.Linear(6, 16), act(), nn.Dropout(0.5), nn.Linear(16, 9), act(), nn.Linear(9, 3)
    )


def on_mlp(net):
    """The net fused, and proof that its forward is one op."""
    if registry.BACKENDS[0].reasons_against("cpu", torch.float32):
        pytest.skip("the extension is not built")
    fused = fusedmlp.fuse(net)
    with fusedmlp.use_backend("native"):
        y = fused(torch.randn(4, 6))
    assert "Mlp" in type(y.grad_fn).__name__
    return fused


def test_a_net_that_drops_is_one_node():
    y = on_mlp(dropout_net())(torch.randn(4, 6))
    assert {type(node).__name__ for node, _ in y.grad_fn.next_functions if node} == {
        "AccumulateGrad"
    }


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.GELU, nn.PReLU])
def test_gradients_of_gradients_are_those_of_plain_pytorch(act):
    net = dropout_net(act)
    net[2].p = 0.0
    fused = on_mlp(net)
    x = torch.randn(4, 6, requires_grad=True)
    second = []
    for model in (net, fused):
        with fusedmlp.use_backend("native"):
            y = model(x)
        (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), [x, *net.parameters()][:-1]))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_shared_weight_has_the_gradients_of_both_layers():
    shared = nn.Linear(6, 6)
    net = nn.Sequential(shared, nn.GELU(), shared, nn.Dropout(0.0), nn.Linear(6, 3))
    fused, x = on_mlp(net), torch.randn(4, 6)
    results = []
    for model in (net, fused):
        grads = torch.autograd.grad(model(x).sin().sum(), net.parameters(), create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), net.parameters())
        results.append([*grads, *again])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", [[0], [0, 3], [3], [5], [0, 3, 5]], ids=str)
def test_frozen_layers_get_no_gradient_and_keep_nothing(frozen):
    net = dropout_net(nn.GELU)
    fused, x = on_mlp(net), torch.randn(4, 6)
    for i in frozen:
        net[i].requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with fusedmlp.dropout_state(1):
            y = fused(x)
    if len(frozen) == 3:
        assert not y.requires_grad and not kept
        return
    ours = torch.autograd.grad(y.sin().sum(), [t for t in net.parameters() if t.requires_grad])
    with fusedmlp.dropout_state(1), fusedmlp.use_backend("reference"):
        y = fused(x)
    theirs = torch.autograd.grad(y.sin().sum(), [t for t in net.parameters() if t.requires_grad])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    if 0 in frozen:
        known = {t.data_ptr() for t in net.parameters()}
        made = sum(t.nbytes for t in kept if t.data_ptr() not in known and t.dtype != torch.int64)
        layers = (16, 9, 9) if frozen == [0] else (9,)
        assert made == 4 * 4 * sum(layers)


def test_a_bias_alone_may_be_trained():
    net = dropout_net()
    fused, x = on_mlp(net), torch.randn(4, 6)
    net.requires_grad_(False)
    net[3].bias.requires_grad_()
    with fusedmlp.dropout_state(1):
        fused(x).sin().sum().backward()
    got, net[3].bias.grad = net[3].bias.grad, None
    with fusedmlp.dropout_state(1), fusedmlp.use_backend("reference"):
        fused(x).sin().sum().backward()
    torch.testing.assert_close(got, net[3].bias.grad)


def test_changes_between_forward_and_backward_are_found():
    fused, x = on_mlp(dropout_net()), torch.randn(4, 6)
    state = torch.tensor([1, 0])
    with fusedmlp.dropout_state(state):
        y = fused(x)
    state[1] += 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = fused(x)
    with torch.no_grad():
        fused[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_may_run_twice_and_under_autocast():
    fused, x = on_mlp(dropout_net()), torch.randn(4, 6)
    y = fused(x)
    first = torch.autograd.grad(y.sum(), fused.parameters(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        second = torch.autograd.grad(y.sum(), fused.parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("change", ["weight", "attribute", "dtype", "bias", "shape of input"])
def test_what_is_put_in_the_place_of_a_parameter_is_seen(change):
    net, x = dropout_net(), torch.randn(4, 6)
    net[2].p = 0.25
    fused = on_mlp(net)
    if change == "weight":
        net[0].weight = nn.Parameter(torch.randn(16, 6))
    elif change == "attribute":
        weight = net[3].weight.detach().clone()
        del net[3].weight
        net[3].weight = weight
    elif change == "dtype":
        net.bfloat16()
        x = x.bfloat16()
    elif change == "bias":
        net[3].bias = None
    else:
        x = torch.randn(2, 3, 6)
    with fusedmlp.dropout_state(1):
        got = fused(x)
    with fusedmlp.dropout_state(1), fusedmlp.use_backend("reference"):
        want = fused(x)
    torch.testing.assert_close(got, want)


def test_modules_on_any_backend_with_the_op(backend, monkeypatch):
    """What nn does with the op, on a backend that is not chosen for it."""
    monkeypatch.setattr(choice, "has_mlp", lambda name, device, dtype: True)
    fused, x = fusedmlp.fuse(dropout_net(nn.Tanh)), torch.randn(4, 6)
    with fusedmlp.use_backend(backend), fusedmlp.dropout_state(1):
        y = fused(x)
    assert type(y.grad_fn).__name__ == f"{Mlp.__name__}Backward"
    got = torch.autograd.grad(y.sum(), fused.parameters())
    monkeypatch.undo()
    with fusedmlp.use_backend("reference"), fusedmlp.dropout_state(1):
        want = torch.autograd.grad(fused(x).sum(), fused.parameters())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_net_of_one_kind_is_told_what_it_keeps():
    net = Net("reference", [activations.GELU, 0, 0, 3], [0.0, 1.0], torch.empty(0))
    assert not net.keeps_y and net.count == 1 and net.needs == [3]
