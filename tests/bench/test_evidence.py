"""What has run where: the results are of the present kernels, and the pages say what they hold."""

import json
import os
import subprocess
import sys

import pytest

from bench import evidence, evidence_tables, record, report

pytest.importorskip("triton", reason="Triton is not installed")


# --- the file of this checkout ------------------------------------------------------------------


def test_the_results_are_of_the_present_kernels_and_complete():
    if not evidence.RESULTS.exists():
        pytest.skip("evidence.json is not in this checkout: run python -m bench.evidence")
    rows = record.read(evidence.RESULTS)["rows"]
    assert {row["suite"]: row["code"] for row in rows} == {
        suite: evidence.code(suite) for suite in evidence.SUITES
    }, "these suites were run with other kernels: run python -m bench.evidence"
    assert all(0 < row["tests"] <= row["launches"] for row in rows)
    ran = {where: {r["kernel"] for r in rows if r["where"] == where} for where in _where(rows)}
    assert set(ran) == {"interpreter", "sm_80", "sm_120"} and ran["sm_80"] == ran["sm_120"]
    triton = "".join(p.read_text() for p in (record.ROOT / "fusedmlp/backends/triton").glob("*.py"))
    assert len(ran["interpreter"]) == triton.count("_kernel(\n")
    cuda = "".join(p.read_text() for p in (record.ROOT / "csrc/cuda").glob("*.cu"))
    assert len(ran["sm_80"]) == cuda.count("__global__")


def _where(rows):
    return {row["where"] for row in rows}


# --- how it is made -----------------------------------------------------------------------------


def test_a_kernel_counts_where_a_test_of_it_passed(tmp_path):
    out = tmp_path / "out.json"
    asked = ["-k", "a_dropped_element_is_plus_zero and cpu and linear_act-none"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "bench.evidence", "-p", "no:cacheprovider"]
        + ["tests/backends/test_triton.py", *asked],
        cwd=record.ROOT,
        env=os.environ | {"EVIDENCE_OUT": str(out)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (forward, *rest) = sorted(json.loads(out.read_text()), key=lambda r: r["kernel"], reverse=True)
    assert (forward["kernel"], forward["where"]) == ("linear_act_fwd_kernel", "interpreter")
    assert forward["tests"] == 1 and forward["launches"] >= 1 and rest


def test_a_suite_that_fails_leaves_the_rows_that_were_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "code", lambda suite: "abc")
    out, ran = tmp_path / "evidence.json", []

    def run(suite):
        ran.append(suite)
        if len(ran) == 2:
            raise RuntimeError(f"{suite}: 1 failed")
        return [{"suite": suite, "where": suite, "kernel": "k", "code": "abc"}]

    monkeypatch.setattr(evidence, "run", run)
    assert evidence.main(["--out", str(out)]) == 1
    assert "evidence: PTX: 1 failed" in capsys.readouterr().err
    assert evidence.main(["--out", str(out)]) == 0  # only what is missing
    assert ran == ["interpreter", "PTX", "PTX"]
    monkeypatch.setattr(evidence, "code", lambda suite: "xyz" if suite == "PTX" else "abc")
    assert evidence.main(["--out", str(out)]) == 0 and ran[3:] == ["PTX"]
    assert _where(record.read(out)["rows"]) == {"interpreter", "PTX"}


# --- what the pages say -------------------------------------------------------------------------

FOUND = {
    "evidence": [
        {"where": "interpreter", "kernel": "dgrad_act_kernel", "launches": 5},
        {"where": "sm_80", "kernel": "add_rows", "launches": 6},
        {"where": "sm_120", "kernel": "add_rows", "launches": 7},
    ],
    "semantics": [
        {"kind": "tests", "kernels": {"dgrad_act_kernel": 3}, "wrong": ""},
        {"kind": "tests", "kernels": {"dgrad_act_kernel": 4}, "wrong": ""},
        {"kind": "tests", "kernels": {"dgrad_act_kernel": 90}, "wrong": "1 failed"},
        {"kind": "stages", "kernels": {"dgrad_act_kernel": 1}, "wrong": ""},
        {"kind": "planted fault", "wrong": ""},
    ],
    "kernels": [
        {"kernel": "dgrad_act_kernel", "target": "sm_90", "wrong": ""},
        {"kernel": "dgrad_act_kernel", "target": "sm_90", "wrong": ""},
        {"target": "gfx942", "wrong": "CompilationError"},
    ],
    "cuda_kernels": [{"kernel": "add_rows", "arch": "sm_75", "wrong": ""}],
    "gpus": [],
}


def test_the_table_says_what_ran_where_and_leaves_out_what_was_wrong():
    lines = evidence_tables.table(FOUND).splitlines()
    assert lines[2:4] == [
        "| `dgrad_act` | Triton | interpreter: 5 | sm_90: 7 | sm_90 | 1 |",
        "| `add_rows` | CUDA | – | sm_80: 6; sm_120: 7 | sm_75 | – |",
    ]
    assert lines[-1] == "On a GPU: none of them, never."
    assert "a GPU: A GPU." in evidence_tables.table(FOUND | {"gpus": ["A GPU"]})
    less = {name: rows for name, rows in FOUND.items() if name != "evidence"}
    assert "| CUDA | – | not counted | sm_75 | – |" in evidence_tables.table(less)
    assert "Triton | not counted | sm_90: 7 |" in evidence_tables.table(less)
    assert "nvcc's PTX ran\non a CPU; machine" in evidence_tables.summary(less)


def test_the_readme_says_the_same_in_a_few_lines(tmp_path):
    said = evidence_tables.summary(FOUND)
    assert said.startswith("**Nothing has run on a GPU so far.** The 1 Triton kernels")
    assert "in 7 launches" in said and "in 13 launches" in said and said.count("\n") == 4
    assert "Nothing has run" not in evidence_tables.summary(FOUND | {"gpus": ["A GPU"]})
    # As report.py finds them: a file of a GPU is no longer nothing.
    head = record.header("steps", "bench.steps", [])
    gpu = head | {"machine": head["machine"] | {"gpu": "A GPU"}, "rows": []}
    record.write(tmp_path / "steps.json", gpu)
    assert "A GPU" in report.table("evidence-summary", report.load(tmp_path))
