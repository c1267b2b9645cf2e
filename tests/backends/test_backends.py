"""The rules of choice: what is named works or raises with every reason; automatic falls back."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import fusedmlp
import fusedmlp.functional as FF
from fusedmlp import BackendError, context
from fusedmlp.backends import choice, registry


@pytest.fixture
def no_native(monkeypatch):
    """A machine without the extension."""
    broken = registry.Backend(
        "native",
        lambda d: "not built, and here is why",
        registry.BACKENDS[0].dtypes,
        "fusedmlp.backends.native",
    )
    monkeypatch.setattr(registry, "BACKENDS", (broken, *registry.BACKENDS[1:]))
    monkeypatch.setitem(registry._BY_NAME, "native", broken)
    monkeypatch.setattr(registry, "_usable", {})
    registry.log_once.cache_clear()


def _select(**change):
    args = dict(
        op="linear_act",
        device_type="cpu",
        dtype=torch.float32,
        act=1,
        dropout=True,
        rows=256,
        in_features=784,
        out_features=256,
    )
    return choice.select(**args | change)


def test_a_named_backend_that_cannot_run_raises_with_every_reason(no_native):
    with pytest.raises(
        BackendError, match="(?s)'native' was asked for.*not built, and here is why"
    ):
        _select(backend="native")
    with pytest.raises(BackendError, match="(?s)not built.*fp64 is not one of its dtypes"):
        _select(backend="native", dtype=torch.float64)
    with fusedmlp.use_backend("native"), pytest.raises(BackendError):
        FF.dropout(torch.ones(3))


def test_automatic_choice_falls_back_and_logs_once(no_native, caplog):
    with caplog.at_level(logging.INFO, logger="fusedmlp"):
        assert [_select() for _ in range(3)] == ["reference"] * 3
        assert _select(dropout=False) == registry.EAGER
    messages = [r.getMessage() for r in caplog.records]
    assert messages == ["linear_act: backend 'native' was passed over: not built, and here is why"]


def test_argument_beats_context_beats_environment(monkeypatch):
    assert _select(backend="reference") == "reference"
    with fusedmlp.use_backend("reference"):
        assert _select() == "reference"
        with pytest.raises(ValueError, match="unknown backend"):
            _select(backend="nothing")
        with fusedmlp.use_backend(None):
            monkeypatch.setattr(registry, "_from_environment", "reference")
            assert _select() == "reference"
    code = "from fusedmlp import explain; print(explain().choice)"
    env = os.environ | {"FUSEDMLP_BACKEND": "reference"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == "reference", out.stderr
    env["FUSEDMLP_BACKEND"] = "cudnn"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "FUSEDMLP_BACKEND must be one of native, triton, reference, got 'cudnn'" in out.stderr


def test_use_backend_is_a_setter_and_a_context():
    before = context.now().backend
    try:
        fusedmlp.use_backend("reference")
        assert registry.explicit(None) == "reference"
        with fusedmlp.use_backend("native"):
            assert registry.explicit(None) == "native"
        assert registry.explicit(None) == "reference"
        with pytest.raises(ValueError, match="use_backend: unknown backend 'x'; known: native"):
            fusedmlp.use_backend("x")
        assert registry.explicit(None) == "reference"
    finally:
        fusedmlp.use_backend(before)


def test_explain_names_the_choice_and_every_refusal(no_native):
    e = fusedmlp.explain(p=0.5)
    assert e.choice == "reference" and e.refusals["native"] == ["not built, and here is why"]
    assert "not native: not built, and here is why" in str(e)
    assert fusedmlp.explain(p=0.5, backend="native").choice == "nothing"


def test_explain_says_what_select_does():
    for rows, n, p, act in (
        (1, 1, 0.0, "relu"),
        (4096, 4096, 0.0, "gelu"),
        (256, 256, 0.5, "relu"),
        (256, 10, 0.0, "none"),
    ):
        e = fusedmlp.explain(rows=rows, out_features=n, p=p, activation=act)
        assert e.choice == _select(
            rows=rows, out_features=n, dropout=p > 0, act=fusedmlp.spec.activations.IDS[act]
        )


def test_a_fallback_never_computes_another_function(no_native):
    """Every activation, dtype and op gives the reference's values where native is missing."""
    for name in fusedmlp.spec.activations.NAMES:
        for dtype in registry._BY_NAME["reference"].dtypes:
            x = torch.randn(7, 13, dtype=dtype)
            slope = torch.full((1,), 0.2, dtype=dtype) if name == "prelu" else None
            for p in (0.0, 0.5):
                args = dict(slope=slope, p=p, seed=4)
                got = FF.bias_act_dropout(x, None, name, **args)
                want = FF.bias_act_dropout(x, None, name, backend="reference", **args)
                torch.testing.assert_close(got, want)


def test_bf16_on_an_old_gpu_is_refused_before_the_kernel_is(monkeypatch):
    """The kernels need compute capability 8.0 for it; fp16 runs there."""
    named = registry._BY_NAME["native"]
    native = registry.Backend("native", lambda d: None, named.dtypes, named.missing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    (reason,) = native.reasons_against("cuda", torch.bfloat16)
    assert "compute capability 8.0 or newer, this one has 7.5; use fp16" in reason
    assert native.reasons_against("cuda", torch.float16) == []
    assert native.reasons_against("cpu", torch.bfloat16) == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert native.reasons_against("cuda", torch.bfloat16) == []


@pytest.fixture
def a_gpu(monkeypatch):
    """As on a machine where every backend runs on a GPU."""
    there = [registry.Backend(b.name, lambda d: None, b.dtypes) for b in registry.BACKENDS]
    monkeypatch.setattr(registry, "BACKENDS", tuple(there))
    for backend in there:
        monkeypatch.setitem(registry._BY_NAME, backend.name, backend)
    monkeypatch.setattr(registry, "_usable", {})
    registry.log_once.cache_clear()


UNMEASURED = "this GPU has not been measured: plain PyTorch is used; run `fusedmlp tune`"


def test_a_gpu_that_was_not_measured_runs_plain_pytorch_and_says_so_once(a_gpu, caplog):
    with caplog.at_level(logging.INFO, logger="fusedmlp"):
        for act in range(len(fusedmlp.spec.activations.NAMES)):
            for rows in (1, 256, 65536):
                args = dict(device_type="cuda", act=act, rows=rows)
                assert _select(**args, dropout=False) == registry.EAGER
                # Eager PyTorch has not the masks that are promised.
                assert _select(**args, dropout=True) == "reference"
                assert _select(**args, backend="triton") == "triton"
        assert choice.select_net("cuda", torch.float32, 256, 784, [(1, True, 256)], None) is None
        with fusedmlp.use_backend("native"):
            assert _select(device_type="cuda") == "native"
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith(UNMEASURED)


def test_explain_says_that_a_gpu_was_not_measured(a_gpu):
    for p, chosen in ((0.0, "eager"), (0.5, "reference")):
        e = fusedmlp.explain(p=p, device="cuda")
        assert e.choice == chosen and e.why.startswith(UNMEASURED)


def test_compiled_calls_follow_the_same_rule(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert _select(device_type="cuda", dropout=False) == registry.EAGER
    assert _select(device_type="cuda", dropout=True) == "reference"


def test_an_engine_that_was_asked_for_by_name_runs_fused_kernels_on_a_gpu(a_gpu):
    assert choice.named_for_engine("cuda", torch.float32, "linear_act") == "triton"
    assert choice.named_for_engine("cpu", torch.float32, "linear_act") is None
    with fusedmlp.use_backend("reference"):
        assert choice.named_for_engine("cuda", torch.float32, "linear_act") == "reference"
