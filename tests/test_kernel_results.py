"""Results files about compiled kernels: resumed, read by the report, and what they must say."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from bench import cuda_kernels, kernel_cases, kernel_tables, record, report

pytest.importorskip("triton", reason="Triton is not installed")

from bench import kernels  # noqa: E402


def _row(case, **fields):
    return {"case": case, "code": "abc", "registers": 40, "wrong": ""} | fields


@pytest.fixture(autouse=True)
def _code(monkeypatch):
    """The interpreter, which the other tests use, leaves nothing to look at."""
    monkeypatch.setattr(kernels, "code_of", lambda kernel: "abc")


def _results(out, resume, count=3):
    todo = kernel_cases.sample()[:count]
    head = record.header("kernels", "bench.kernels", [])
    return kernels.Results(out, head, list(todo), resume), [k.case for k in todo]


def test_every_case_has_a_name_of_its_own():
    cases = kernel_cases.kernels(kernel_cases.TARGETS, quick=False)
    assert len({k.case for k in cases}) == len(cases) > 700
    assert {k.target for k in cases} == set(kernel_cases.TARGETS)


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path):
    out = tmp_path / "kernels.json"
    results, cases = _results(out, resume=False)
    # Written after a while without being asked to: here at once.
    results._written = -kernels._PARTIAL_EVERY * 2
    results.add(_row(cases[1]))
    assert record.read(out)["left"] == 2
    again, _ = _results(out, resume=True)
    assert set(again.found) == {cases[1]}
    again.add(_row(cases[2]))
    again.add(_row(cases[0]))
    again.write()
    found = record.read(out)
    assert [r["case"] for r in found["rows"]] == cases and found["left"] == 0


@pytest.mark.parametrize("why", ["other code", "wrong before", "no longer a case", "damaged"])
def test_what_cannot_be_kept_is_made_again(why, tmp_path, monkeypatch):
    out = tmp_path / "kernels.json"
    results, cases = _results(out, resume=False)
    results.add(_row(cases[0], wrong="8 bytes of local memory" if why == "wrong before" else ""))
    if why == "no longer a case":
        results.found = {}
        results.cases, results.found = ["gone"], {"gone": _row("gone")}
    results.write()
    if why == "damaged":
        out.write_text(out.read_text()[:50])
    if why == "other code":
        monkeypatch.setattr(kernels, "code_of", lambda kernel: "xyz")
    again, _ = _results(out, resume=True)
    assert again.found == {}


def test_the_hash_follows_the_kernels_and_what_they_are_launched_with():
    """Comments, layout and host code are left out; one more warp is another kernel."""
    code = """
import shutil, tempfile
from pathlib import Path
from unittest import mock
from bench import kernel_cases, kernels, triton_build
from fusedmlp.backends.triton import tiles

kernel = kernel_cases.sample()[0]
launch = kernels._launch(kernel)
folder = Path(tempfile.mkdtemp())
shutil.copytree(Path(tiles.__file__).parent, folder, dirs_exist_ok=True)
gemm = folder / "gemm.py"
text = gemm.read_text()

def code_hash(text=text, **change):
    gemm.write_text(text)
    triton_build._kernels_hash.cache_clear()
    made = triton_build.Launch(**vars(launch) | change)
    with mock.patch.object(tiles, "__file__", str(folder / "tiles.py")):
        return triton_build.code_hash(made, kernel.target)

first = code_hash()
assert first == kernels.code_of(kernel) == code_hash("# a comment\\n" + text + "\\nX = 1\\n")
assert first != code_hash(text.replace("tl.zeros", "tl.ones"))
assert first != code_hash(warps=launch.warps * 2)
assert first != code_hash(constants=launch.constants | {"PARTS": 1})
shutil.rmtree(folder)
"""
    _run_python("-c", code)


# --- the files of this checkout -----------------------------------------------------------------


def _run_python(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=record.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-2000:]


def _file(name):
    path = record.ROOT / "bench" / "results" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not in this checkout")
    return record.read(path)


def test_the_triton_results_are_complete_of_this_code_and_right():
    found = _file("kernels")
    assert not [r["case"] for r in found["rows"] if r["wrong"]]
    if found["versions"]["triton"] != importlib.metadata.version("triton"):
        pytest.skip(f"the file is of Triton {found['versions']['triton']}")
    _run_python("-m", "bench.kernels", "--check", "--out", "bench/results/kernels.json")


def test_the_cuda_results_have_no_local_memory():
    found = _file("cuda_kernels")
    assert not [r for r in found["rows"] if r["wrong"] or r["spills"] or r["local"]]
    assert {r["kernel"] for r in found["rows"]} >= {"linear_act", "cross_entropy"}


# --- tables -------------------------------------------------------------------------------------


def test_tables_count_what_is_wrong():
    made = _row(
        "a", target="sm_90", op="linear_act", kind="half", local_bytes=0, tensor_core="HGMMA"
    )
    made |= {"shared_bytes": 2048}
    failed = {"case": "b", "target": "sm_90", "op": "linear_act", "kind": "half", "wrong": "no"}
    head, lines, left = kernel_tables.triton({"rows": [made, failed]})
    assert lines == [
        ["sm_90", "linear\\_act", "16-bit", "2", "40", "0", "2", "HGMMA", "1"]
    ] and len(head) == len(lines[0])  # fmt: skip
    _, lines, _ = kernel_tables.triton({"rows": [failed | {"kind": "tf32"}]})
    assert lines[0][-2:] == ["–", "1"]


def test_the_table_of_cuda_kernels_has_a_line_for_each_architecture():
    rows = [
        cuda_kernels.Kernel("linear_act", v, arch, registers=r, found={"HMMA": 8}).row()
        for v, arch, r in (("bf16", "sm_100", 90), ("bf16", "sm_80", 80), ("fp16", "sm_80", 82))
    ]
    assert all(row["wrong"] == "" for row in rows)
    head, lines, _ = kernel_tables.cuda({"rows": rows})
    assert [line[1:4] for line in lines] == [["sm_80", "2", "80–82"], ["sm_100", "1", "90"]]
    assert all(len(line) == len(head) for line in lines)


def test_the_report_writes_each_table_from_its_file(tmp_path):
    rows = [
        {
            "kernel": "bias_act_dropout_fwd_kernel",
            "dtype": "bf16",
            "target": "sm_90",
            "tile": "1x4096",
            "elements_a_thread": 32,
            "without": 300,
            "with": 620,
            "per_element": 10.0,
            "by_instruction": {"LOP3": 2.5, "SEL": 1.0, "FSEL": 0.5, "XYZ": 0.4},
        }
    ]
    head = record.header("dropout_instructions", "bench.kernels", [])
    record.write(tmp_path / "d.json", head | {"rows": rows})
    text = report.table("dropout-instructions", report.load(tmp_path))
    assert "logic 2.5, select 1.5, XYZ 0.4 | 300 | 620 | 10.0 |" in text
    assert json.loads((tmp_path / "d.json").read_text())["rows"] == rows
