"""bench.steps on a CPU: its groups come out whole, on networks small enough for a test."""

from __future__ import annotations

import json

import pytest

from bench import peak, report, starts, steps
from fusedmlp.backends import native

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


def test_starts_are_processes_of_which_each_has_its_say(tmp_path):
    out = tmp_path / "bench" / "results" / "engine_step.json"
    small = "--dims 5-4-3 --batch 16 --threads 1 --budget 0 --busy 0 1 --starts 2"
    before = steps.torch.get_num_threads()
    try:
        assert steps.main([*small.split(), "--out", str(out)]) == 0
    finally:
        steps.torch.set_num_threads(before)
    found = json.loads(out.read_text())
    assert "--starts 2" in found["command"]
    assert [(row["busy"], row["starts"]) for row in found["rows"]] == [(0, 2), (1, 2)]
    median, lowest, highest = found["rows"][1]["over_quiet"]
    assert 0 < lowest < median == pytest.approx((lowest + highest) / 2, rel=1e-3)
    marked = "<!-- bench:engine-asked -->\n<!-- /bench:engine-asked -->\n"
    (tmp_path / "README.md").write_text(marked)
    report.main(["--root", str(tmp_path)])
    assert "| starts | native, µs |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_wrong_number_of_starts(number, capsys):
    with pytest.raises(SystemExit):
        steps.parse([f"--starts={number}"])
    said = capsys.readouterr().err
    assert f"--starts: must be a number of processes above 0, got {number}" in said


def test_rows_of_several_starts_become_median_lowest_and_highest():
    first = {"case": "a", "dims": [3, 4, 5], "dropout": [0.1, 0.2, 0.3], "rounds": 10}
    runs = [
        [first | {"us": [2.0, 1.0, 3.0], "over_quiet": 1.5, "left out": "a reason"}],
        [first | {"us": [4.0, 1.0, 9.0], "over_quiet": 2.5, "rounds": 5}],
        [first | {"us": [9.0, 8.0, 9.5], "over_quiet": 1.0, "left out": "another"}],
    ]
    del runs[2][0]["rounds"]
    expected = {"us": [4.0, 2.0, 9.0], "over_quiet": [1.5, 1.0, 2.5], "rounds": 15, "starts": 3}
    assert starts.together(runs) == [first | expected | {"left out": "a reason"}]
    with pytest.raises(ValueError, match="shorter"):
        starts.together([runs[0], []])


def test_main_has_a_step_in_bf16_where_the_processor_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "MAIN", (steps.network("20-16-10", batch=1024),))
    monkeypatch.setattr(steps, "SCALING", {"main": steps.MAIN})
    out = tmp_path / "bench" / "results" / "engine_step.json"
    before = steps.torch.get_num_threads()
    try:
        assert steps.main(["--threads", "1", "--budget", "0", "--out", str(out)]) == 0
    finally:
        steps.torch.set_num_threads(before)
    (row,) = json.loads(out.read_text())["rows"]
    has_bf16 = native.bf16_isa() == "avx512_bf16"
    assert ("bf16_us" in row) == ("over_bf16" in row) == has_bf16
    if has_bf16 and peak.gflops(1, "bf16") is not None:
        assert 0 < row["bf16 share of peak"][0] < 1
        assert row["bf16 peak_gflops"] > 1.2 * row["peak_gflops"]
    (tmp_path / "README.md").write_text("<!-- bench:engine-main -->\n<!-- /bench:engine-main -->\n")
    report.main(["--root", str(tmp_path)])
    assert ("share of peak of bf16" in (tmp_path / "README.md").read_text()) == has_bf16
