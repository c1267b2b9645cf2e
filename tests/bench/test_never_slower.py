"""The benchmark of networks drawn at random: the draw, a run, and what it says of it."""

import json

from bench import never_slower, tables


def test_the_draw_depends_on_the_seed_alone():
    cases = never_slower.draw(50, 3)
    assert cases == never_slower.draw(50, 3) != never_slower.draw(50, 4)
    assert len(cases) == 100 and {len(case.dims) for case in cases} == {2, 3, 4}
    assert all(4 <= n <= 1024 for case in cases for n in case.dims)
    assert all(1 <= case.m <= 512 for case in cases)
    assert {case.act for case in cases} == {"relu", "tanh", "gelu", "sigmoid"}


def test_a_run_goes_on_where_it_was_stopped_and_says_what_was_slow(tmp_path, capsys, monkeypatch):
    out = tmp_path / "never_slower.json"
    given = ["--nets", "2", "--budget", "0.001", "--threads", "1", "--out", str(out)]
    assert never_slower.main([*given, "--seconds", "0"]) == 0
    assert "2 networks, seed 1; 4 cells to measure" in capsys.readouterr().out
    assert never_slower.main(given) == 0
    said = capsys.readouterr().out
    assert "step: 2 networks, eager / automatic: lowest" in said and "below 0.97" in said
    found = json.loads(out.read_text())
    assert found["seed"] == 1 and [row["mode"] for row in found["rows"]] == ["step", "infer"] * 2
    assert never_slower.main(given) == 0
    assert "0 cells to measure" in capsys.readouterr().out
    text = tables.of_file("never_slower", found["rows"])
    assert "| step | 2 |" in text and "The 4 lowest:" in text
