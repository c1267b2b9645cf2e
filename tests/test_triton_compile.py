"""Triton kernels compiled to machine code for GPUs that are not there. Nothing is run.

A sample of what `make kernels` compiles in full, in a process of its own: the interpreter, which
the other tests use, leaves nothing to compile.
"""

import json
import os
import subprocess
import sys

import pytest

from fusedmlp import dispatch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("kernels") / "kernels.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels", "--sample", "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert out.exists(), done.stderr
    return json.loads(out.read_text())


# One test, so that the workers of pytest-xdist do not each compile the sample.
def test_the_sample_compiles_without_local_memory_and_with_tensor_cores(report):
    """No spills, shared memory within the device's limit, wgmma on sm_90, mma or tcgen05 else."""
    wrong = [
        f"{r['target']} {r['op']} {r['dtype']} {r['tile']}: {r['wrong']}"
        for r in report["kernels"]
        if r["wrong"]
    ]
    assert not wrong
    assert {r["target"] for r in report["kernels"]} == {
        "sm_80",
        "sm_90",
        "sm_100",
        "sm_120",
        "gfx942",
    }
    found = {(r["target"], r["kind"]): r["tensor_core"] for r in report["kernels"] if r["kind"]}
    assert found["sm_90", "tf32"] == "HGMMA" and found["sm_90", "ieee"] == ""
    # Philox is 40 instructions for eight elements; the mask and its selection a few each.
    for row in report["dropout_instructions"]:
        assert row["per_element"] <= 16, row


def test_an_unknown_activation_does_not_compile():
    """In the interpreter as on a GPU: never silently the identity."""
    if dispatch._triton_unavailable("cpu"):
        pytest.skip(dispatch._triton_unavailable("cpu"))
    import torch

    from fusedmlp.kernels.triton import bias_act_dropout

    x = torch.zeros(2, 8)
    with pytest.raises(Exception, match="unknown activation id"):
        bias_act_dropout.bias_act_dropout_fwd(x, None, None, None, 99, 0.0, 0, 1.0, 0, 0)
