"""The direct launch gives the driver what Triton's own launcher would have given it.

With a driver that records instead of one that runs: no GPU is needed.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


def test_a_direct_launch_is_the_launch_that_triton_makes(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch_probe"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen["own"]) == len(seen["direct"]) >= 15
    for own, direct in zip(seen["own"], seen["direct"], strict=True):
        assert own == direct
    # Calls that Triton compiles apart are kept apart, and each kernel was loaded once.
    assert seen["kinds"] >= seen["loaded"] >= 14
    # The number of a layer, a row and a threshold are told to a kernel, not compiled into it.
    assert seen["again"] == 0


class Kernel:
    """A kernel whose launcher a tool has replaced: it returns something of its own."""

    arg_names = ("x", "y")

    def __init__(self, result):
        self.result, self.launches = result, 0

    def __getitem__(self, grid):
        def run(*args, **options):
            self.launches += 1
            return self.result

        return run


@pytest.fixture
def direct_launch(monkeypatch):
    """`launch` as it is on a GPU whose number is 0, without one."""
    from fusedmlp.backends.triton import launch

    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return launch


def _tensor_on(index):
    return SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=index))


@pytest.mark.parametrize("result", [None, "a report"])
def test_what_a_replaced_launcher_returns_is_not_launched(result, direct_launch):
    kernel = Kernel(result)
    for _ in range(2):
        direct_launch.launch(kernel, 1, _tensor_on(0), 3, warps=4)
    assert kernel.launches == 2 and not direct_launch._compiled


def test_a_device_without_a_number_is_the_current_one(direct_launch, monkeypatch):
    kernel = Kernel(None)
    direct_launch.launch(kernel, 1, _tensor_on(None), 3, warps=4)
    assert kernel.launches == 1
    asked = []
    monkeypatch.setattr(direct_launch, "_capability", asked.append)
    direct_launch.capability(_tensor_on(None))
    direct_launch.capability(_tensor_on(1))
    assert asked == [0, 1]
