"""The direct launch gives the driver what Triton's own launcher would have given it.

With a driver that records instead of one that runs: no GPU is needed.
"""

import json
import os
import subprocess
import sys

import pytest

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
    assert seen["kinds"] >= seen["loaded"] >= 12
