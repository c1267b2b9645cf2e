"""One built file under several versions of torch (libtorch's stable ABI): build_tools.check_abi."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from build_tools import check_abi
from fusedmlp.backends import native

OTHERS = [p for p in os.environ.get("FUSEDMLP_OTHER_PYTHON", "").split(os.pathsep) if p]
NO_OTHER = "FUSEDMLP_OTHER_PYTHON names no Python with another torch"


@pytest.fixture(autouse=True)
def _built():
    if not native.library("cpu").exists():
        pytest.skip(native._not_built("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(not OTHERS, reason=NO_OTHER)
@pytest.mark.parametrize("python", OTHERS)
def test_the_extension_runs_under_another_torch(python, capsys):
    assert check_abi.ask(python)["torch"] != torch.__version__
    assert check_abi.main([python]) == 0, capsys.readouterr().err


def test_a_python_that_cannot_be_asked_is_named(capsys):
    assert check_abi.main(["/there/is/no/python"]) == 1
    assert "/there/is/no/python cannot be run" in capsys.readouterr().err


def test_a_function_that_a_torch_lacks_is_found(tmp_path):
    """Against this torch nothing is missing; against a folder without libtorch everything is."""
    if shutil.which("nm") is None or sys.platform != "linux":
        pytest.skip("no nm here")
    library = native.library("cpu")
    own = Path(torch.__file__).parent / "lib"
    needed, missing = check_abi.missing_symbols(own, library)
    assert len(needed) > 20 and "torch_library_impl" in needed and not missing
    assert check_abi.missing_symbols(tmp_path, library)[1] >= {"torch_library_impl"}
