"""Tensors that are more than dense numbers: layouts, views with a flag, classes of their own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import fusedmlp
import fusedmlp.functional as FF
from fusedmlp import FusedDropout, FusedLinear, fuse


class Mine(torch.Tensor):
    """A subclass with torch functions of its own: all that PyTorch computes stays in it."""


def _inference(x):
    with torch.inference_mode():
        return x.clone()


KINDS = {
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "negative": torch._neg_view,
    "imaginary": lambda x: torch.complex(x, x).conj().imag,
    "zeros": lambda x: torch._efficientzerotensor(x.shape),
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand(4, -1),
    "complex": lambda x: torch.complex(x, x),
    "subclass": lambda x: x.as_subclass(Mine),
    "inference": _inference,
}
NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)),
    "layer": lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU()),
    "no linear": lambda: nn.Sequential(nn.GELU(), nn.Dropout(0.0)),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(1.0)),
}


def _result(f, x):
    """(class, layout, dtype, values), or the class of the error."""
    try:
        y = f(x)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return type(error).__mro__[-4:]
    if y.is_meta or y.is_nested:
        return type(y), y.layout, y.dtype, str(y.shape) if y.is_meta else len(y.unbind())
    dense = y.to_dense() if y.layout != torch.strided else y
    return type(y), y.layout, y.dtype, dense.detach().as_subclass(torch.Tensor).clone()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", NETS)
def test_a_container_gives_what_its_modules_give(net, kind):
    """Also after a dense input of the same shape, and a dense input after it."""
    plain = NETS[net]()
    fused, x = fuse(plain), torch.randn(4, 8)
    odd = KINDS[kind](x)
    for given in (x, odd, x, odd):
        got, want = _result(fused, given), _result(plain, given)
        assert got[:3] == want[:3]
        if isinstance(want[-1], torch.Tensor):
            torch.testing.assert_close(got[-1], want[-1])
        else:
            assert got == want


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "csr", "mkldnn", "nested", "complex"])
def test_ops_by_themselves_name_what_they_do_not_take(kind):
    x, layer = torch.randn(4, 8), FusedLinear(8, 3, activation="gelu")
    odd = KINDS[kind](x)
    for f in (
        layer,
        FusedDropout(0.5),
        lambda x: FF.linear_act(x, layer.weight, layer.bias, "gelu"),
        lambda x: FF.bias_act_dropout(x, None, "gelu"),
        lambda x: FF.dropout(x),
    ):
        f(x)
        with pytest.raises(TypeError, match="input must be"):
            f(odd)


def _per_sample(module, x):
    module = copy.deepcopy(module)
    module(x)  # records a program, or a route, for plain weights
    call_for_per_sample_grads(module)(x).square().sum().backward()
    return [p.grad_sample for p in module.parameters()]


@pytest.mark.parametrize("net", ["mlp", "layer"])
def test_per_sample_gradients_are_those_of_the_modules(net):
    """They put tensors of a class that knows only PyTorch's functions in the place of weights."""
    plain, x = NETS[net](), torch.randn(4, 8)
    torch.testing.assert_close(_per_sample(fuse(plain), x), _per_sample(plain, x))


def test_per_sample_gradients_of_a_layer():
    layer, x = FusedLinear(8, 3, activation="relu"), torch.randn(4, 8)
    plain = nn.Sequential(nn.Linear(8, 3), nn.ReLU())
    plain[0].weight, plain[0].bias = layer.weight, layer.bias
    torch.testing.assert_close(_per_sample(layer, x), _per_sample(plain, x))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_subclass_of_tensor_stays_one_and_runs_its_own_functions(p):
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    x, w = torch.randn(4, 8), torch.randn(3, 8)
    layer = FusedLinear(8, 3, activation="relu", dropout=p)
    for f in (
        lambda x, w: FF.linear_act(x, w, None, "relu", p=p),
        lambda x, w: FF.bias_act_dropout(x, None, "relu", p=p),
        lambda x, w: layer(x),
    ):
        want = f(x, w)
        for odd in ((x.as_subclass(Watched), w), (x, w.as_subclass(Watched))):
            seen.clear()
            got = f(*odd)
            torch.testing.assert_close(got.as_subclass(torch.Tensor), want)
            if type(odd[0]) is Watched:
                assert type(got) is Watched
                assert {"linear_act", "bias_act_dropout", "relu"} & set(seen)
                assert not any("fusedmlp" in name for name in seen)


def test_a_named_kernel_backend_refuses_a_subclass():
    if fusedmlp.backends.registry._BY_NAME["native"].reasons_against("cpu", torch.float32):
        pytest.skip("native cannot run here")
    x = torch.randn(4, 8).as_subclass(Mine)
    for f in (FusedLinear(8, 3), lambda x: FF.dropout(x), fuse(NETS["layer"]())):
        with fusedmlp.use_backend("native"), pytest.raises(fusedmlp.BackendError):
            f(x)
