"""Triton kernels compiled to machine code for GPUs that are not there. Nothing is run.

A sample of what `make kernels` compiles in full, in a process of its own: the interpreter, which
the other tests use, leaves nothing to compile.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import kernel_cases, record
from fusedmlp.backends import registry
from fusedmlp.spec.layers import Epilogue

pytest.importorskip("triton", reason="Triton is not installed")


def _run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _bench_kernels(out: Path, *arguments: str) -> dict:
    done = _run("bench.kernels", "--quick", "--out", str(out), *arguments)
    assert out.exists(), done.stderr
    return record.read(out)


# One test, so that the workers of pytest-xdist do not each compile the sample.
def test_the_sample_compiles_without_local_memory_and_with_tensor_cores(tmp_path):
    """No spills, shared memory within the device's limit, wgmma on sm_90, mma or tcgen05 else."""
    report = _bench_kernels(tmp_path / "kernels.json")
    rows = report["rows"]
    wrong = [
        f"{r['target']} {r['op']} {r['dtype']} {r['tile']}: {r['wrong']}"
        for r in rows
        if r["wrong"]
    ]
    assert not wrong
    assert report["left"] == 0
    assert {r["target"] for r in rows} == set(kernel_cases.TARGETS)
    found = {(r["target"], r["kind"]): r["tensor_core"] for r in rows if r["kind"]}
    assert found["sm_90", "tf32"] == "HGMMA" and found["sm_90", "ieee"] == ""


def test_dropout_adds_few_instructions_to_an_element(tmp_path):
    report = _bench_kernels(tmp_path / "counts.json", "--dropout-instructions")
    assert {(r["kernel"], r["dtype"]) for r in report["rows"]} == {
        ("linear_act_fwd_kernel", "bf16"),
        ("bias_act_dropout_fwd_kernel", "bf16"),
        ("bias_act_dropout_fwd_kernel", "fp32"),
    }
    # Philox is 40 instructions for eight elements; the mask and its selection a few each; the key
    # is expanded once for all elements of a thread.
    for row in report["rows"]:
        assert 5 <= row["per_element"] <= 17, row


def test_every_kernel_compiles_for_sizes_that_triton_compiles_apart():
    """Sizes of 1, of 0, of 16 and of neither, in each place, with and without splits along K.

    And in fp32 no approximation is left but the one that the kernels correct, and those of erf:
    test_triton_numerics.py says what these would do to the results.
    """
    done = _run("tests.compile_probe")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["failed"]
    assert {"linear_act_merge_kernel", "dgrad_act_kernel", "column_sum_kernel"} <= set(
        found["kernels"]
    )
    assert len(found["kernels"]) == 8
    approximations = found["approximations"]
    del approximations["gelu"]  # erf is libdevice's
    assert set().union(*approximations.values()) == {"div.full.f32"}
    assert approximations["tanh"] == ["div.full.f32"]


def test_an_unknown_activation_does_not_compile():
    """In the interpreter as on a GPU: never silently the identity."""
    if registry._triton_unavailable("cpu"):
        pytest.skip(registry._triton_unavailable("cpu"))
    import torch

    from fusedmlp.backends.triton import bias_act_dropout

    x = torch.zeros(2, 8)
    with pytest.raises(Exception, match="unknown activation id"):
        bias_act_dropout.bias_act_dropout_fwd(x, Epilogue(None, None, None, 99, 0.0, 0, 1.0, 0, 0))
