"""Results files about compiled kernels: resumed, read by the report, and what they must say."""

import json
import os
import subprocess
import sys

import pytest

from bench import cuda_kernels, kernel_cases, machine_code, record, report, tables

pytest.importorskip("triton", reason="Triton is not installed")

from bench import kernels  # noqa: E402


def _row(case, **fields):
    return {"case": case, "code": "abc", "registers": 40, "wrong": ""} | fields


@pytest.fixture(autouse=True)
def _code(monkeypatch):
    """The interpreter, which the other tests use, leaves nothing to look at."""
    monkeypatch.setattr(kernels, "code_of", lambda kernel, version: "abc")


TODO = kernel_cases.sample()[:3]
CASES = [kernel.case for kernel in TODO]


def _write(out, rows):
    record.write(out, record.header("kernels", "bench.kernels", []) | {"rows": rows})


def test_every_case_has_a_name_of_its_own():
    cases = kernel_cases.kernels()
    assert len({k.case for k in cases}) == len(cases) > 700
    assert {k.target for k in cases} == set(kernel_cases.TARGETS)


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    out, made = tmp_path / "kernels.json", []

    class Pool:
        """Compiles in this process, and is stopped in the second kernel of the first run."""

        def __init__(self, workers, mp_context):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def map(self, function, todo):
            for kernel in todo:
                made.append(kernel.case)
                if len(made) == 2:
                    raise KeyboardInterrupt
                yield _row(kernel.case)

    monkeypatch.setattr(kernels, "ProcessPoolExecutor", Pool)

    def run(todo, rows=()):
        head = record.header("kernels", "bench.kernels", [])
        kernels.compile_all(record.Results(head, out, list(rows)), todo, 1)

    with pytest.raises(KeyboardInterrupt):
        run([TODO[1], TODO[0], TODO[2]])
    assert record.read(out)["left"] == 2
    run(TODO, kernels.kept(out, TODO, "3.9.0"))
    found = record.read(out)
    assert [r["case"] for r in found["rows"]] == CASES and found["left"] == 0
    assert made == [CASES[1], CASES[0], CASES[0], CASES[2]]


@pytest.mark.parametrize("why", ["other code", "wrong before", "no longer a case", "damaged"])
def test_what_cannot_be_kept_is_made_again(why, tmp_path, monkeypatch):
    out = tmp_path / "kernels.json"
    wrong = "8 bytes of local memory" if why == "wrong before" else ""
    _write(out, [_row("gone" if why == "no longer a case" else CASES[0], wrong=wrong)])
    if why == "damaged":
        out.write_text(out.read_text()[:50])
    if why == "other code":
        monkeypatch.setattr(kernels, "code_of", lambda kernel, version: "xyz")
    assert kernels.kept(out, TODO, "3.9.0") == []


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
    triton_build.kernels_hash.cache_clear()
    made = triton_build.Launch(**vars(launch) | change)
    with mock.patch.object(tiles, "__file__", str(folder / "tiles.py")):
        return triton_build.code_hash(made, kernel.target)

first = code_hash()
same = code_hash("# a comment\\n" + text + "\\nX = 1\\n")
assert first == kernels.code_of(kernel, triton_build.triton.__version__) == same
assert first != kernels.code_of(kernel, "0.0.0")
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
    # Whatever Triton is installed: the hashes are those of the Triton that the file is of.
    _run_python("-m", "bench.kernels", "--check", "--out", "bench/results/kernels.json")


def test_the_cuda_results_are_of_these_sources_and_have_no_local_memory():
    found = _file("cuda_kernels")
    assert found["sources"] == cuda_kernels.sources_hash(), "run python -m bench.cuda_kernels"
    assert not [r for r in found["rows"] if r["wrong"] or r["spills"] or r["local"]]
    assert {r["kernel"] for r in found["rows"]} >= {"linear_act", "cross_entropy"}


def test_a_library_of_other_sources_is_refused(tmp_path, monkeypatch, capsys):
    for name, text in (("_build_info.json", '{"commit": "abc1234"}'), ("native.so", "")):
        (tmp_path / name).write_text(text)
    asked = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(cuda_kernels.subprocess, "run", run)
    monkeypatch.setattr(machine_code, "cuobjdump", lambda: "cuobjdump")
    assert cuda_kernels.main(["--library", str(tmp_path / "native.so")]) == 2
    assert "was built at commit abc1234, with other sources" in capsys.readouterr().err
    assert asked[0][-4:] == ["abc1234", "--", "csrc/cuda", "csrc/common"]


def test_the_hash_of_the_cuda_sources_follows_the_code_only(tmp_path, monkeypatch):
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (tmp_path / "csrc" / "common").mkdir()
    monkeypatch.setattr(record, "ROOT", tmp_path)

    def code(text):
        (folder / "a.cu").write_text(text)
        return cuda_kernels.sources_hash()

    assert code("int a;\n") == code("int  a;  // a comment\n") != code("int b;\n")


# --- tables -------------------------------------------------------------------------------------


def _cells(text):
    """The lines of a table below its head, as cells."""
    return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


def test_tables_count_what_is_wrong():
    made = _row(
        "a", target="sm_90", op="linear_act", kind="half", local_bytes=0, tensor_core="HGMMA"
    )
    made |= {"shared_bytes": 2048}
    failed = {"case": "b", "target": "sm_90", "op": "linear_act", "kind": "half", "wrong": "no"}
    assert _cells(tables.of_file("kernels", [made, failed])) == [
        ["sm_90", "linear\\_act", "16-bit", "2", "40", "0", "2", "HGMMA", "1"]
    ]
    (line,) = _cells(tables.of_file("kernels", [failed | {"kind": "tf32"}]))
    assert line[-2:] == ["–", "1"]


def test_the_table_of_cuda_kernels_has_a_line_for_each_architecture():
    symbol = "_Z17linear_act_kernelI{}4TileILi64ELi64ELi32ELi3ELi2ELi2EE"
    rows = []
    for dtype, arch, registers in (
        ("BFloat", "sm_100", 90), ("BFloat", "sm_80", 80), ("Half", "sm_80", 82)
    ):  # fmt: skip
        made = machine_code.Function(symbol.format(dtype), arch, registers, 0, 0, 0)
        made.counts["HMMA.16816.F32"] = 8
        rows.append(cuda_kernels.row(made))
    assert [row["variant"] for row in rows][1:] == [
        f"{dtype} 64x64x32 3 stages 4 warps" for dtype in ("bf16", "fp16")
    ]
    assert all(row["wrong"] == "" and row["tensor_core"] == 8 for row in rows)
    lines = _cells(tables.of_file("cuda_kernels", rows))
    assert [line[1:4] for line in lines] == [["sm_80", "2", "80–82"], ["sm_100", "1", "90"]]


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
