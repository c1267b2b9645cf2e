"""Bad input: each argument wrong in each way, and the words of the error."""

import fractions

import numpy as np
import pytest
import torch
from torch import nn

import fusedmlp
import fusedmlp.functional as FF
from fusedmlp import BackendError, FusedDropout, FusedLinear
from fusedmlp.backends import registry
from fusedmlp.spec import activations, philox

X, W, B = torch.randn(4, 5), torch.randn(6, 5), torch.randn(6)

# what is wrong -> (exception, what the message says, keyword arguments over the good ones)
LINEAR = {
    "weight shape": (
        ValueError,
        r"linear_act: weight must be \(N, K\) with K = 5 to match input "
        r"\(4, 5\), got \(5, 6\)",
        dict(weight=W.t()),
    ),
    "weight 1-D": (ValueError, r"weight must be \(N, K\).*got \(5,\)", dict(weight=W[0])),
    "weight dtype": (
        TypeError,
        "weight must be torch.float32 like input, got torch.float16",
        dict(weight=W.half()),
    ),
    "weight device": (
        ValueError,
        "weight must be on cpu like input, got meta",
        dict(weight=W.to("meta")),
    ),
    "weight sparse": (TypeError, "weight must be a dense", dict(weight=W.to_sparse())),
    "bias shape": (
        ValueError,
        r"bias must be \(N,\) with N = 6 to match weight \(6, 5\), "
        r"got \(5,\)",
        dict(bias=B[:5]),
    ),
    "bias dtype": (TypeError, "bias must be torch.float32", dict(bias=B.half())),
    "bias number": (TypeError, "bias must be a torch.Tensor, got float", dict(bias=1.0)),
    "input list": (TypeError, "input must be a torch.Tensor, got list", dict(input=[1.0])),
    "input 0-D": (ValueError, r"input must be \(\.\.\., K\)", dict(input=X[0, 0])),
    "input integer": (TypeError, "input must be one of .*got torch.int64", dict(input=X.long())),
    "input bool": (TypeError, "got torch.bool", dict(input=X > 0)),
    "input complex": (TypeError, "got torch.complex64", dict(input=X.cfloat())),
    "input quantised": (
        TypeError,
        "got torch.quint8",
        dict(input=torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)),
    ),
    "input sparse": (
        TypeError,
        "input must be a dense .* got layout torch.sparse_coo",
        dict(input=X.to_sparse()),
    ),
    "activation unknown": (
        ValueError,
        "unknown activation 'swish'; known: none, relu",
        dict(activation="swish"),
    ),
    "activation type": (
        TypeError,
        "activation must be a name, got builtin_function_or_method",
        dict(activation=torch.relu),
    ),
    "p above 1": (ValueError, r"p must be in \[0, 1\], got 1.5", dict(p=1.5)),
    "p below 0": (ValueError, r"p must be in \[0, 1\], got -0.1", dict(p=-0.1)),
    "p NaN": (ValueError, r"p must be in \[0, 1\], got nan", dict(p=float("nan"))),
    "p a string": (TypeError, "p must be a number in .*got str", dict(p="0.5")),
    "p a bool": (TypeError, "got bool", dict(p=True)),
    "p wrong in eval": (ValueError, r"p must be in \[0, 1\]", dict(p=2, training=False)),
    "seed too large": (
        ValueError,
        r"seed must be in \[-2\^63, 2\^63\), got 9223372036854775808",
        dict(p=0.5, seed=2**63),
    ),
    "seed float": (TypeError, "seed must be an int, got float", dict(p=0.5, seed=1.0)),
    "stream too small": (
        ValueError,
        r"stream must be in",
        dict(p=0.5, seed=1, stream=-(2**63) - 1),
    ),
    "row_offset negative": (
        ValueError,
        "row_offset must be >= 0, got -1",
        dict(p=0.5, row_offset=-1),
    ),
    "row_offset too large": (
        ValueError,
        r"rows \+ row_offset must be at most 2\^32 for dropout, "
        "got 4 .* 4294967293",
        dict(p=0.5, row_offset=2**32 - 3),
    ),
    "slope where none is read": (
        ValueError,
        "slope is for leaky_relu and prelu, got one for 'relu'",
        dict(slope=0.1),
    ),
    "slope missing": (
        ValueError,
        "prelu needs slope, a tensor of 1 or N = 6 elements",
        dict(activation="prelu"),
    ),
    "slope shape": (
        ValueError,
        r"slope must have 1 or N = 6 elements for prelu, got \(5,\)",
        dict(activation="prelu", slope=torch.ones(5)),
    ),
    "slope dtype": (
        TypeError,
        "slope must be torch.float32",
        dict(activation="prelu", slope=torch.ones(6).double()),
    ),
    "slope tensor for leaky": (
        TypeError,
        "slope must be a number for leaky_relu, got Tensor",
        dict(activation="leaky_relu", slope=torch.ones(1)),
    ),
    "slope infinite": (
        ValueError,
        "slope must be finite",
        dict(activation="leaky_relu", slope=float("inf")),
    ),
    "backend unknown": (
        ValueError,
        "unknown backend 'cutlass'; known: native, triton, reference",
        dict(backend="cutlass"),
    ),
}
ELEMENTWISE = {
    "bias shape": (
        ValueError,
        r"bias_act_dropout: bias must be \(N,\) with N = 5 to match input "
        r"\(4, 5\), got \(6,\)",
        dict(bias=B),
    ),
    "bias on 0-D": (
        ValueError,
        r"input must be \(\.\.\., N\) to add a bias",
        dict(input=X[0, 0], bias=B[:1]),
    ),
    "input integer": (TypeError, "input must be one of", dict(input=X.int())),
    "slope shape": (
        ValueError,
        "slope must have 1 or N = 5",
        dict(activation="prelu", slope=torch.ones(2)),
    ),
}


@pytest.mark.parametrize("wrong", LINEAR)
def test_linear_act_names_what_is_wrong(wrong):
    kind, message, change = LINEAR[wrong]
    good = dict(input=X, weight=W, bias=B, activation="relu")
    with pytest.raises(kind, match=message):
        FF.linear_act(**good | change)


@pytest.mark.parametrize("wrong", ELEMENTWISE)
def test_bias_act_dropout_names_what_is_wrong(wrong):
    kind, message, change = ELEMENTWISE[wrong]
    with pytest.raises(kind, match=message):
        FF.bias_act_dropout(**dict(input=X) | change)


def test_dropout_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"dropout: p must be in \[0, 1\], got 7"):
        FF.dropout(X, 7)
    with pytest.raises(TypeError, match="dropout: input must be one of"):
        FF.dropout(X.int())


STATE = torch.tensor([1, 2])


def test_fp64_is_refused_by_a_kernel_backend_by_name_and_runs_otherwise():
    x = X.double()
    if not registry._BY_NAME["native"].reasons_against("cpu", torch.float32):
        with pytest.raises(BackendError, match="(?s)cannot be used:.*fp64 is not one of its dtype"):
            FF.dropout(x, backend="native")
    assert FF.dropout(x).dtype == torch.float64


def test_dropout_state_names_what_is_wrong():
    for bad, kind in (
        (1.5, TypeError),
        (2**63, ValueError),
        (torch.ones(2), ValueError),
        (torch.ones(3, dtype=torch.int64), ValueError),
    ):
        with pytest.raises(kind, match="dropout_state"):
            fusedmlp.dropout_state(bad)
    with pytest.raises(ValueError, match="stream must be 0 beside a state tensor"):
        fusedmlp.dropout_state(STATE, 3)
    with pytest.raises(ValueError, match="row_offset must be >= 0"):
        fusedmlp.dropout_state(1, 2, -1)


def test_explain_names_what_is_wrong():
    for kwargs, kind in (
        (dict(op="conv"), ValueError),
        (dict(p=2), ValueError),
        (dict(activation="x"), ValueError),
        (dict(dtype=torch.int8), TypeError),
        (dict(rows=-1), ValueError),
        (dict(rows=1.0), TypeError),
    ):
        with pytest.raises(kind):
            fusedmlp.explain(**kwargs)


def test_every_activation_has_a_kernel_on_every_backend(backend, device):
    x = torch.randn(3, 9, device=device)
    outputs = {
        name: FF.bias_act_dropout(
            x,
            None,
            name,
            backend=backend,
            slope=torch.full((1,), 0.2, device=device) if name == "prelu" else None,
        )
        for name in activations.NAMES
    }
    names = list(outputs)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.equal(outputs[a], outputs[b]), (a, b)


def _same_number(p):
    """Numbers that nn.Dropout takes for p, of every type."""
    return [
        torch.tensor(p),
        torch.tensor(p, dtype=torch.float64),
        np.float32(p),
        np.float64(p),
        np.float16(p),
        np.array(p),
        fractions.Fraction(p),
    ]


def test_any_number_is_a_probability():
    x, want = torch.ones(8, 16), philox.dropout_mask(1, 0, 8, 16, 0.5)
    for p in _same_number(0.5):
        nn.Dropout(p)
        assert torch.equal(FF.dropout(x, p, seed=1) != 0, want)
        layers = (
            FusedDropout(p),
            FusedLinear(16, 16, activation="none", dropout=p),
            fusedmlp.FusedMLP(16, [16], 16, dropout=p)[:3],
            fusedmlp.fuse(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(p))),
        )
        for layer in layers:
            with fusedmlp.dropout_state(1):
                for _ in range(2):
                    assert torch.equal(layer(x) != 0, want) or layer is layers[2]
    for p in (torch.tensor(True), torch.tensor([0.5]), torch.tensor(0.5j), np.True_, "0.5"):
        with pytest.raises(TypeError, match="p must be a number in"):
            FF.dropout(x, p)
    with pytest.raises(ValueError, match="p must be in"):
        FF.dropout(x, torch.tensor(1.5))


def test_a_probability_that_is_changed_in_place_is_seen():
    x, p = torch.ones(8, 16), torch.tensor(0.5)
    net = fusedmlp.fuse(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(p)))
    layer = FusedLinear(16, 16, activation="tanh")
    layer.p = p
    for value in (0.5, 0.25):
        p.fill_(value)
        for f in (net, layer):
            with fusedmlp.dropout_state(1):
                assert torch.equal(f(x) != 0, philox.dropout_mask(1, 0, 8, 16, value))
