"""The built CUDA extension: what can be said of it without a GPU, and what only a GPU can show.

The kernels themselves run on the CPU in test_cuda_kernels.py; on a GPU, test_ops.py and its kin run
with the `device` fixture. Here: sources, the built file, streams, graphs and several devices.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fusedmlp.functional as FF
from bench import cuda_kernels, machine_code
from fusedmlp import ops
from fusedmlp.backends import native
from fusedmlp.spec import activations, philox

from ..conftest import _skip_unless_usable

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
LIBRARY = native.library("cuda")


def sources(*folders):
    """Name -> text without comments."""
    paths = [p for f in folders for p in sorted((CSRC / f).glob("*.[ch]*"))]
    return {p.name: re.sub(r"//[^\n]*", "", p.read_text()) for p in paths}


# --- sources ------------------------------------------------------------------------------------


def test_every_launch_is_checked():
    """There is one launch, and its check is the next statement."""
    text = "\n".join(sources("cuda", "common", ".").values())
    assert text.count("<<<") == 1
    assert re.search(r"<<<[^;]*;\s*return cudaGetLastError\(\);", text)


def test_kernels_know_nothing_of_torch_and_wait_for_nothing():
    for name, text in sources("cuda", "common").items():
        assert "torch" not in text, name
        assert not re.search(r"Synchronize|cudaMalloc|cudaFree|cudaMemcpy|atomicAdd", text), name
    binding = "\n".join(sources(".").values())
    assert not re.search(r"Synchronize|cudaMalloc|cudaFree|cudaMemcpy", binding)


# --- the built file -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library():
    if not LIBRARY.exists():
        pytest.skip(native._not_built("cuda"))
    return LIBRARY


def run_python(code):
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_extension_loads_and_lists_its_ops_without_a_gpu(library):
    code = """
import torch, json, sys
from fusedmlp import ops
from fusedmlp.backends import native as extension
reason = extension.unavailable("cuda")
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps([reason, {op: has(f"fusedmlp::{op}.native", "CUDA") for op in ops.SCHEMAS}]))
"""
    reason, found = json.loads(run_python(code))
    assert all(found.values()), found
    if not torch.cuda.is_available():
        assert reason == "no GPU is available to torch"


def test_schemas_and_fakes_of_cuda_tensors(library):
    """Shapes, dtypes and devices as FakeTensorMode sees them, with the extension loaded."""
    code = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from fusedmlp import ops
torch.ops.load_library(__LIBRARY__)
native = ops.BY_BACKEND["native"]
with FakeTensorMode():
    x = torch.empty(3, 5, 7, device="cuda", dtype=torch.bfloat16)
    w, b = torch.empty(9, 7, device="cuda", dtype=torch.bfloat16), torch.empty(9, device="cuda")
    state = torch.empty(2, dtype=torch.int64, device="cuda")
    rest = b, None, state, 1, 0.0, 2**31, 2.0, 0, 0
    y, h = native.linear_act_fwd(x, w, *rest)
    for t in (y, h, native.linear_act_infer(x, w, *rest), native.bias_act_dropout_fwd(y, *rest)):
        assert t.shape == (3, 5, 9) and t.dtype == x.dtype and t.device.type == "cuda"
    dz, db, dslope = native.bias_act_dropout_bwd(y, y, *rest, 1, True, False)
    assert dz.shape == y.shape and db.shape == (9,) and db.dtype == torch.float32
    assert dslope.numel() == 0 and dz.device.type == "cuda"
"""
    run_python(code.replace("__LIBRARY__", repr(str(library))))


def test_no_kernel_spills_and_products_run_on_tensor_cores(library):
    if machine_code.cuobjdump() is None:
        pytest.skip("no cuobjdump: neither a CUDA toolkit's nor Triton's")
    found = list(machine_code.functions(library))
    rows = [cuda_kernels.row(function) for function in found]
    assert {row["kernel"] for row in rows} >= {
        "bias_act_dropout_fwd", "bias_act_dropout_bwd", "linear_act", "cross_entropy", "add_rows"
    }  # fmt: skip
    assert not [row for row in rows if row["wrong"]]
    built_for = json.loads((LIBRARY.parent / "_build_info.json").read_text())["archs"]
    assert {row["arch"] for row in rows} == {
        f"sm_{a.split('+')[0].replace('.', '')}" for a in built_for
    }
    for function, row in zip(found, rows, strict=True):
        if "vector" in row["variant"]:
            assert function.count("LDG.E.128") and function.count("STG.E.128"), row
        if row["kernel"] == "linear_act" and row["arch"] != "sm_75":
            assert function.count("LDGSTS") and function.count("LDSM"), row


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no GPU is available to torch")
    _skip_unless_usable("native", "cuda")
    return torch.device("cuda")


def numbers(act="none", p=0.0):
    threshold, scale = philox.threshold_and_scale(p)
    return activations.IDS[act], 0.01, threshold, scale, 0, 0


@pytest.mark.gpu
def test_a_captured_graph_draws_a_new_mask_on_each_replay(cuda):
    x = torch.ones(64, 72, device=cuda)

    def draw():
        state = ops.draw_seed(x)
        return state, ops.BY_BACKEND["native"].bias_act_dropout_fwd(
            x, None, None, state, *numbers(p=0.5)
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        draw()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state, y = draw()
    masks = []
    for _ in range(3):
        graph.replay()
        seed, stream = state.tolist()
        masks.append((y != 0).cpu())
        assert torch.equal(masks[-1], philox.dropout_mask(seed, stream, 64, 72, 0.5))
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_of_a_layer_can_be_captured(cuda, dtype):
    x = torch.randn(256, 64, device=cuda, dtype=dtype)
    w = torch.randn(72, 64, device=cuda, dtype=dtype, requires_grad=True)
    b = torch.zeros(72, device=cuda, dtype=dtype, requires_grad=True)

    def step():
        y = FF.linear_act(x, w, b, "gelu", p=0.2, seed=3, backend="native")
        return y, *torch.autograd.grad(y.sum(), (w, b))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
def test_kernels_run_on_the_current_stream(cuda):
    """Work that is queued late on another stream is waited for, not overtaken."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x = torch.full((512, 512), 2.0, device=cuda)
        y = FF.bias_act_dropout(x, torch.ones(512, device=cuda), "relu", backend="native")
    torch.cuda.current_stream().wait_stream(side)
    assert (y == 3).all()


@pytest.mark.gpu
def test_tensors_of_another_device_than_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x = torch.randn(70, 64, device="cuda:1", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(40, 64, device="cuda:1", dtype=torch.bfloat16)
    y = FF.linear_act(x, w, None, "gelu", p=0.3, seed=1, backend="native")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.device == dx.device == x.device and torch.cuda.current_device() == 0
    same = FF.linear_act(x.cpu(), w.cpu(), None, "gelu", p=0.3, seed=1, backend="reference")
    assert torch.equal(y.cpu() == 0, same == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(70, 784, 40), (700, 264, 1000), (2048, 128, 2048)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_each_tile_are_within_the_error_budget(cuda, dtype, shape):
    """By size these take the small, the medium and the large tile."""
    from .. import check_op

    m, k, n = shape
    case = check_op.Case("linear_act", m, k, n, "gelu", 0.3, dtype, "cuda")
    check_op.assert_within_budget(case, check_op.run(case, "native"))


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("columns", [40, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", ["relu", "prelu", "gelu"])
def test_each_kernel_once(cuda, act, dtype, columns):
    """A small case of every kernel family, vector and scalar, for compute-sanitizer."""
    from .. import check_op

    for op, m in (("bias_act_dropout", 600), ("linear_act", 70)):
        case = check_op.Case(op, m, 72, columns, act, 0.3, dtype, "cuda")
        check_op.assert_within_budget(case, check_op.run(case, "native"))
    logits = torch.randn(70, columns, device=cuda, dtype=dtype, requires_grad=True)
    target = torch.randint(columns, (70,), device=cuda)
    loss = FF.cross_entropy(logits, target, label_smoothing=0.1, backend="native")
    (dlogits,) = torch.autograd.grad(loss, logits)
    expected = F.cross_entropy(logits.float(), target, label_smoothing=0.1)
    torch.testing.assert_close(loss.float(), expected, rtol=2e-2, atol=1e-2)
    assert dlogits.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_as_one_call_can_be_captured(cuda, dtype):
    """Forward and backward of mlp; replays give the bits of the first run."""
    from ..autograd.test_mlp_op import Net

    net = Net((64, 72, 40, 10), ("relu", "gelu", "none"), 0.2, dtype, cuda, leading=(256,))

    def step():
        kept = net.forward("native")
        return {"y": kept[2]} | net.backward("native", kept)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
