"""A fused model in other processes and modes: AOTInductor, spawn, inference, determinism."""

import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo
from torch import nn

import fusedmlp
import fusedmlp.functional as FF
from fusedmlp import fuse
from fusedmlp.backends import registry
from fusedmlp.spec import activations

from ..class_nets import Net, as_sequential
from ..made_data import ROOT
from ..nets import mlp

LOAD = """
import sys, torch
{imported}
net = torch._inductor.aoti_load_package(sys.argv[1])
x, want = torch.load(sys.argv[2])
torch.testing.assert_close(net(x), want)
"""


@pytest.mark.slow
def test_aotinductor_packages_a_fused_model_for_processes_that_import_the_package(tmp_path):
    """Any batch size; without the package its ops are not there, and PyTorch names the first."""
    net, x = fuse(mlp(act=nn.GELU)).eval(), torch.randn(5, 6)
    batch = torch.export.Dim("batch", min=2, max=512)
    native = registry._BY_NAME["native"].unavailable("cpu") is None
    with torch.no_grad(), fusedmlp.use_backend("native" if native else "reference"):
        program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "net.pt2")
        )
        x = torch.randn(33, 6)
        torch.save((x, net(x)), tmp_path / "rows.pt")

    def loaded(imported):
        command = [sys.executable, "-c", LOAD.format(imported=imported), package]
        return subprocess.run(
            [*command, str(tmp_path / "rows.pt")], cwd=ROOT, capture_output=True, text=True
        )

    done = loaded("import fusedmlp")
    assert done.returncode == 0, done.stderr
    assert "Could not find schema for fusedmlp::linear_act_infer" in loaded("").stderr


def test_one_compilation_of_the_backend_serves_five_batch_sizes():
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return fusedmlp.compile_backend(graph, inputs)

    net = Net().eval()
    torch._dynamo.reset()
    model = torch.compile(net, backend=counted, dynamic=True, fullgraph=True)
    for rows in (2, 3, 8, 17, 300):
        x = torch.randn(rows, 784)
        torch.testing.assert_close(model(x), net(x))
    assert len(graphs) == 1


def test_a_spawned_process_gives_the_same_bits():
    """A model is pickled, and the package imported anew."""
    net, x = fuse(as_sequential(Net())).eval(), torch.randn(40, 784)
    with torch.no_grad():
        want = net(x)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        threads = pool.apply(torch.get_num_threads)
        got = pool.apply(_without_gradients, (net, x.numpy()))
    if threads == torch.get_num_threads():
        assert torch.equal(torch.from_numpy(got), want)
    torch.testing.assert_close(torch.from_numpy(got), want)


def _without_gradients(net, x):
    with torch.no_grad():
        return net(torch.from_numpy(x)).numpy()


def test_threads_share_a_model_that_records_programs():
    """Each with sizes and a mode of its own, so that what one records the others meet."""
    net = fuse(mlp())
    xs = [torch.randn(rows, 6, requires_grad=rows % 2 == 0) for rows in (1, 2, 7, 64, 300, 5)]

    def run(x):
        found = []
        for _ in range(20):
            with fusedmlp.dropout_state(7, x.shape[0]), torch.set_grad_enabled(x.requires_grad):
                y = net(x)
            found.append([y.detach(), *torch.autograd.grad(y.sum(), [x] if x.requires_grad else [])]
                         if x.requires_grad else [y])  # fmt: skip
        return found

    want = [run(x)[0] for x in xs]
    with ThreadPoolExecutor(len(xs)) as pool:
        for found, first in zip(pool.map(run, xs), want, strict=True):
            for again in found:
                assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("act", activations.NAMES)
def test_inference_tensors_give_the_values_of_others(act, backend, device):
    x, w = torch.randn(5, 6, device=device), torch.randn(9, 6, device=device)
    slope = torch.rand(1, device=device) if act == "prelu" else None
    more = dict(slope=slope, p=0.5, seed=3, backend=backend)

    def both(x, w):
        return (
            FF.linear_act(x, w, None, act, **more),
            FF.bias_act_dropout(x, None, act, **more),
        )

    want = both(x, w)
    with torch.inference_mode():
        frozen = x.clone(), w.clone()
        for got, y in zip(both(*frozen), want, strict=True):
            assert got.is_inference() and torch.equal(got, y)
    for got, y in zip(both(*frozen), want, strict=True):
        assert torch.equal(got, y)
    # As in PyTorch: what backward needs cannot be kept of them.
    leaf = w.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="[Ii]nference tensors cannot be saved for backward"):
        FF.linear_act(frozen[0], leaf, None, act, **more)


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn)


def test_all_of_it_runs_where_only_deterministic_algorithms_may(deterministic, backend, device):
    """Forward and backward, of each activation, with dropout: nothing is refused, and twice the
    same bits come out."""
    for act in activations.NAMES:
        leaves = [torch.randn(*s, device=device) for s in ((33, 6), (9, 6), (9,))]
        slope = torch.rand(9, device=device) if act == "prelu" else None
        leaves = [t.requires_grad_() for t in (*leaves, slope) if t is not None]
        found = []
        for _ in range(2):
            x, w, b, *slopes = leaves
            y = FF.linear_act(x, w, b, act, slope=slopes[0] if slopes else None, p=0.3, seed=1,
                              backend=backend)  # fmt: skip
            found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), act
    with fusedmlp.use_backend(backend), torch.device(device):
        net = fuse(mlp())
    net(torch.randn(8, 6, device=device)).sum().backward()
