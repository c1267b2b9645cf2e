"""bench.steps on a CPU: its groups come out whole, on networks small enough for a test."""

from __future__ import annotations

import json

import pytest

from bench import peak, report, steps

from ..engines import need_native

need_native()


def test_every_group_of_scaling_has_its_rows(tmp_path, monkeypatch):
    small = steps.network("5-4-3", batch=1024)
    monkeypatch.setattr(steps, "MAIN", (small,))
    monkeypatch.setattr(steps, "ENSEMBLE", (small,))
    monkeypatch.setattr(steps, "MEMBERS", (1, 4))
    monkeypatch.setattr(steps, "SCALING", {name: [small] for name in steps.SCALING})
    out = tmp_path / "step.json"
    groups = ["batch", "width", "depth", "threads", "ensemble"]
    before = steps.torch.get_num_threads()
    arguments = ["--group", *groups, "--threads", "1", "2", "--budget", "0.001"]
    try:
        assert steps.main([*arguments, "--out", str(out)]) == 0
    finally:
        steps.torch.set_num_threads(before)
    rows = json.loads(out.read_text())["rows"]
    found = [(row["group"], row["threads"], row.get("members")) for row in rows]
    each = [("batch", None), ("width", None), ("depth", None), ("ensemble", 1), ("ensemble", 4)]
    wanted = [(group, threads, members) for threads in (1, 2) for group, members in each]
    assert found == [*wanted, ("threads", 1, None), ("threads", 2, None)]
    assert all(len(row["native_us"]) == 3 and min(row["native_us"]) > 0 for row in rows)
    if peak.gflops(1) is not None:
        assert all(0 < row["share of peak"][1] <= row["share of peak"][2] for row in rows)
    assert all(row["over_one"][0] == 1.0 for row in rows if row.get("members") == 1)


def test_a_case_beside_a_busy_program_has_a_row_of_its_own(tmp_path):
    out = tmp_path / "bench" / "results" / "engine_step.json"
    small = "--dims 5-4-3 --batch 16 --threads 1 --budget 0 --busy 0 1"
    before = steps.torch.get_num_threads()
    try:
        assert steps.main([*small.split(), "--out", str(out)]) == 0
    finally:
        steps.torch.set_num_threads(before)
    quiet, loaded = json.loads(out.read_text())["rows"]
    assert (quiet["busy"], loaded["busy"]) == (0, 1)
    expected = loaded["native_us"][0] / quiet["native_us"][0]
    assert loaded["over_quiet"] == pytest.approx(expected, rel=1e-3)
    assert loaded["left_out"] == 0 and "over_quiet" not in quiet
    marked = "<!-- bench:engine-asked -->\n<!-- /bench:engine-asked -->\n"
    (tmp_path / "README.md").write_text(marked)
    report.main(["--root", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "| busy programs |" in text and "| over quiet |" in text
    assert ("| share of peak |" in text) == (peak.gflops(1) is not None)
