"""What ttsem found is about the present kernels, and make semantics names what it lacks."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from bench import record, semantics
from build_tools import environment

PIECE, SOURCES = semantics.PIECES[0], semantics.sources_hash()


def _row(piece, **fields):
    return {"case": piece.case, "code": piece.code(SOURCES), "wrong": ""} | fields


def _write(path, rows):
    record.write(path, record.header("semantics", "bench.semantics", []) | {"rows": rows})


# --- the file of this checkout ------------------------------------------------------------------


def test_the_results_are_complete_of_these_kernels_and_right():
    if not semantics.RESULTS.exists():
        pytest.skip("semantics.json is not in this checkout")
    found = record.read(semantics.RESULTS)
    assert not [row["case"] for row in found["rows"] if row["wrong"]]
    stale = {piece.case for piece in semantics.PIECES} - set(semantics.kept(semantics.RESULTS))
    assert not stale, "these pieces were run with other kernels: run make semantics"
    assert found["versions"] | semantics.PINS == found["versions"]
    by_kind = {kind: [r for r in found["rows"] if r["kind"] == kind] for kind in semantics._READ}
    assert all(row["found"] for row in by_kind["planted fault"])
    kernels = {name for row in by_kind["tests"] for name in row["kernels"]}
    sources = "".join(p.read_text() for p in (record.ROOT / semantics.KERNELS).glob("*.py"))
    assert len(kernels) == sources.count("_kernel(\n") and all(k in sources for k in kernels)


def test_each_fault_can_still_be_put_into_the_kernels(tmp_path):
    faults = [piece.fault for piece in semantics.PIECES if piece.fault]
    assert len(faults) == 3
    for i, fault in enumerate(faults):
        semantics.plant(fault, tmp_path / str(i))
        name, text, instead, _ = fault
        planted = (tmp_path / str(i) / semantics.KERNELS / name).read_text()
        assert text not in planted and instead in planted
    with pytest.raises(
        ValueError, match="a fault needs 'no such text' once in gemm.py, .* 0 times"
    ):
        semantics.plant(("gemm.py", "no such text", "", ""), tmp_path / "none")


# --- what is kept, and what is run again --------------------------------------------------------


def test_the_code_follows_the_kernels_but_not_their_comments(tmp_path, monkeypatch):
    folder = tmp_path / "triton"
    shutil.copytree(record.ROOT / semantics.KERNELS, folder)
    gemm = folder / "gemm.py"
    text = gemm.read_text()
    for changed, same in (
        ("# a comment\n" + text, True),
        (text.replace("tl.zeros", "tl.ones"), False),
        (text.replace('"warps": tile.warps', '"warps": 8'), False),
    ):
        assert changed != text
        gemm.write_text(changed)
        assert (semantics.sources_hash(folder) == SOURCES) is same
    gemm.write_text(text)
    (folder / "tile_cache.py").write_text("# which tile is taken decides nothing about the kernels")
    assert semantics.sources_hash(folder) == SOURCES
    codes = {
        PIECE.code(SOURCES),
        PIECE.code("other sources"),
        dataclasses.replace(PIECE, tests="other tests").code(SOURCES),
    }
    monkeypatch.setattr(semantics, "PINS", semantics.PINS | {"triton": "9.9.9"})
    assert len(codes | {PIECE.code(SOURCES)}) == 4


@pytest.mark.parametrize("why", ["right", "other code", "wrong before", "no longer", "damaged"])
def test_only_right_rows_of_the_present_kernels_are_kept(why, tmp_path):
    path = tmp_path / "semantics.json"
    fields = {
        "other code": {"code": "abc"},
        "wrong before": {"wrong": "1 failed"},
        "no longer": {"case": "gone"},
    }
    _write(path, [_row(PIECE, **fields.get(why, {}))])
    if why == "damaged":
        path.write_text(path.read_text()[:50])
    assert set(semantics.kept(path)) == ({PIECE.case} if why == "right" else set())


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    path, ran = tmp_path / "semantics.json", []

    def run(piece, python):
        ran.append(piece.case)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return _row(piece, seconds=1.0)

    monkeypatch.setattr(semantics, "run", run)
    monkeypatch.setattr(semantics, "prepare", lambda venv: (venv, semantics.PINS))
    cases = [piece.case for piece in semantics.PIECES]
    with pytest.raises(KeyboardInterrupt):
        semantics.main(["--out", str(path)])
    assert record.read(path)["left"] == len(cases) - 2
    assert semantics.main(["--out", str(path)]) == 0
    assert ran == cases[:3] + cases[2:] and record.read(path)["left"] == 0
    assert semantics.main(["--out", str(path), "--only", cases[4]]) == 0 and ran[-1] == cases[4]


# --- what a process leaves becomes a row --------------------------------------------------------


def _run(piece, monkeypatch, found=None, status=0):
    """The row of a process that writes `found` and ends."""

    def process(command, env, **options):
        path = command[command.index("--json") + 1] if "--json" in command else env["SEMANTICS_OUT"]
        if found is not None:
            with open(path, "w") as file:
                json.dump(found, file)
        return subprocess.CompletedProcess(command, status, "ttsem: 2 launch(es)", "no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(semantics.subprocess, "run", process)
        return semantics.run(piece, Path("venv/bin/python"))


def test_rows_say_what_is_wrong(monkeypatch):
    by_kind = {piece.kind: piece for piece in semantics.PIECES}
    tests, stages, fault = (by_kind[k] for k in ("tests", "stages", "planted fault"))
    found = {"passed": 3, "failed": [], "kernels": {"a_kernel": 5}}
    row = _run(tests, monkeypatch, found)
    assert (row["wrong"], row["passed"], row["races_unchecked"]) == ("", 3, 2)
    assert row["code"] == tests.code(SOURCES) and row["kernels"] == {"a_kernel": 5}
    assert _run(tests, monkeypatch, found | {"kernels": {}})["wrong"] == "no kernel was run"
    row = _run(tests, monkeypatch, found | {"failed": ["test_a: 1 != 2"]})
    assert row["wrong"] == "1 failed, first test_a: 1 != 2"
    assert _run(tests, monkeypatch, None, 9)["wrong"].startswith("exit status 9: ")

    said = f"test_a: KernelFault: it {fault.fault[3]} of it"
    row = _run(fault, monkeypatch, found | {"failed": ["test_b: 1 != 2", said]})
    assert (row["wrong"], row["found"]) == ("", said)
    for failed in ([], ["test_b: 1 != 2"]):
        row = _run(fault, monkeypatch, found | {"failed": failed})
        assert row["wrong"] == "the fault was not found"

    def launched(*verdicts):
        passes = [{"verdict": v} for v in verdicts]
        launch = {"fn_name": "a_kernel", "passes": passes, "first_bad_pass": "Before X"}
        return _run(stages, monkeypatch, {"launches": [launch]})["wrong"]

    assert launched("match", "approx", "unsupported") == ""
    for verdicts in (["unsupported"], ["match", "mismatch"], ["match", "error", "unsupported"]):
        assert "Before X" in launched(*verdicts)
    assert launched("match", "unsupported", "unsupported")  # a stage that was not run


# --- the environment ----------------------------------------------------------------------------


def test_a_missing_python_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(SystemExit, match="install Python 3.12 for ttsem: none is on PATH or in"):
        semantics.prepare(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("release", ["3.11", ""])
def test_an_environment_of_another_python_is_named(release, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(semantics, "release_of", lambda python: release)
    said = (
        f"is Python {release or 'that does not start'}, 3.12 is needed; give --venv another folder"
    )
    with pytest.raises(SystemExit, match=said):
        semantics.prepare(tmp_path)


@pytest.mark.parametrize("name", semantics.PINS)
def test_a_package_that_is_missing_or_of_another_release_is_named(name, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    have, installed = semantics.PINS | dict.fromkeys(semantics._TESTS_NEED, "1"), []
    monkeypatch.setattr(semantics, "release_of", lambda python: "3.12")
    monkeypatch.setattr(environment, "packages", lambda python: dict(have))

    def install(python, *what):
        installed.extend(what)
        have.update(w.split("==") for w in what)

    monkeypatch.setattr(environment, "pip_install", install)
    assert semantics.prepare(tmp_path)[1] == {"python": "3.12"} | semantics.PINS and not installed
    del have[name]
    semantics.prepare(tmp_path)
    assert installed == [f"{name}=={semantics.PINS[name]}"]
    have[name] = "9.9.9"
    with pytest.raises(
        SystemExit, match=f"has {name} 9.9.9, {semantics.PINS[name]} is needed; give"
    ):
        semantics.prepare(tmp_path)
