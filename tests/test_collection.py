"""Every test file can be read where packages of the extras are not installed: a GPU image has few.

A file that cannot is an error of the whole run: pytest then runs no test at all.
"""

import os
import subprocess
import sys

import pytest

from bench import record

OPTIONAL = (
    *("tyro", "rich", "matplotlib", "safetensors", "torchvision", "sklearn", "scipy", "pandas"),
    *(
        "hypothesis",
        "expecttest",
        "triton",
        "lightning",
        "skorch",
        "onnx",
        "onnxruntime",
        "onnxscript",
    ),
)
COLLECT = """
import sys
from importlib.machinery import PathFinder

import torch

MISSING = set(sys.argv[1].split())


class Without:
    # PathFinder, to which some packages are not there.
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in MISSING:
            return PathFinder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(PathFinder, name)


# What torch itself took is gone for those who import it now.
for name in [n for n in sys.modules if n.partition(".")[0] in MISSING]:
    del sys.modules[name]
sys.meta_path[:] = [Without() if finder is PathFinder else finder for finder in sys.meta_path]

import pytest

sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def _collected(missing, *arguments):
    return subprocess.run(
        [sys.executable, "-c", COLLECT, " ".join(missing), *arguments],
        cwd=record.ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("missing", [OPTIONAL, ("tyro",)], ids=["all of them", "tyro"])
def test_every_file_is_collected_without_packages_of_the_extras(missing):
    done = _collected(missing)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = done.stdout
    assert "test_triton.py::" in found or "triton" in missing
    assert "test_ops.py::" in found and "test_cuda_extension.py::" in found
    assert "test_cli.py::" not in found


def test_a_file_that_needs_a_package_that_is_missing_is_an_error(tmp_path):
    (tmp_path / "test_it.py").write_text("import tyro\n\n\ndef test_nothing():\n    pass\n")
    done = _collected(("tyro",), str(tmp_path), "--rootdir", str(tmp_path))
    assert done.returncode == 2 and "No module named 'tyro'" in done.stdout
