"""What compute-sanitizer runs on a GPU (tests/ptx/harness.py), on the PTX machine."""

import subprocess
import sys

import pytest

from bench import record
from fusedmlp.spec import activations
from fusedmlp.spec.philox import threshold_and_scale

from ..ptx import harness, library

on_the_machine = pytest.mark.skipif(
    library.cannot_build() is not None, reason=f"no PTX: {library.cannot_build()}"
)


def test_it_names_activations_and_masks_as_the_package_does():
    assert {name: activations.IDS[name] for name in harness.ACTS} == {
        name: number for name, (number, _) in harness.ACTS.items()
    }
    assert threshold_and_scale(harness.P)[0] == round(harness.P * 2**32)
    names = [name for name, *_ in harness.cases()]
    assert len(set(names)) == len(names) == 48


def test_it_does_without_torch():
    code = "import sys, tests.ptx.harness; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=record.ROOT, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


@on_the_machine
@pytest.mark.slow
def test_its_cases_run(capsys):
    assert harness.main(["--machine"]) == 0
    assert capsys.readouterr().out == "48 cases, 0 wrong\n"


@on_the_machine
def test_what_is_wrong_is_named(capsys, monkeypatch):
    room = harness.OnMachine.room

    def short(gpu, kind, *shape, values=None):
        shape = (shape[0] - 1, *shape[1:]) if values is None else shape
        return room(gpu, kind, *shape, values=values)

    monkeypatch.setattr(harness.OnMachine, "room", short)
    assert harness.main(["--machine", "--only", "cross_entropy bf16 10"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("cross_entropy bf16 10: ") and said.endswith("1 cases, 1 wrong\n")


def test_without_a_build_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert harness.main([]) == 2
    assert "no CUDA objects in build/native: build the extension first" in capsys.readouterr().err
