"""A few faults of each kind that bench.faults injects, and that it tells of what does not survive
them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench import record
from bench.faults import inject

from .. import made_data
from ..native import needs_native

made_data.need(*made_data.TRAIN_EXTRA, "sklearn", "pandas", "rich")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are injected on Linux")


def faults(*words, code: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run the tool, after some code."""
    start = f"{code}\nimport runpy, sys; sys.argv = ['faults', *sys.argv[1:]]\n"
    start += "runpy.run_module('bench.faults', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", start, *map(str, words)],
        cwd=made_data.ROOT,
        env=made_data.environment(**environment),
        capture_output=True,
        text=True,
        timeout=600,
    )


@needs_native
def test_a_few_faults_of_each_kind_are_survived(tmp_path):
    done = faults("--few", "--jobs", 2, "--out", tmp_path / "faults.json")
    found = record.read(tmp_path / "faults.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"seed {found['seed']}" in done.stdout
    assert len(found["rows"]) > 8
    for row in found["rows"]:
        assert row["injected"] == row["survived"] > 0 == row["failed"], row


UNCHECKED = "from fusedmlp.train import run_folder as r; r._check_archive = lambda path: None"
HALF_WRITTEN = """
import contextlib
from fusedmlp.train import run_folder as r
@contextlib.contextmanager
def plain(path):
    with open(path, "wb") as file:
        yield file
r.whole_file = plain
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count", "code"),
    [("damage", 160, UNCHECKED), ("killed-writing", 12, HALF_WRITTEN)],
    ids=["no checksum", "files in place"],
)
def test_the_tool_sees_what_does_not_survive(kind, count, code, tmp_path):
    """Negative controls: a part of the package that stands against a fault is taken out."""
    library = inject.build(tmp_path)
    if library is None:
        pytest.skip("no C compiler")
    place = {"LD_PRELOAD": str(library), "FAULTS_FOLDER": str(tmp_path)}
    done = faults("--only", kind, "--count", count, "--seed", 1, code=code, **place)
    assert done.returncode == 1 and "FAILED" in done.stdout, done.stdout + done.stderr
