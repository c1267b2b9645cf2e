"""bench.tabular: the same rows for every way, what is left out, and the tables of its results."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("pandas")

from bench import record, report, tabular, tabular_tables  # noqa: E402


def test_no_table_that_is_published_chose_the_presets():
    assert len(tabular.PUBLISHED) >= 12 and not set(tabular.PUBLISHED) & set(tabular.CHOICE)
    assert set(tabular.PUBLISHED["flchain"][1]) >= {"chapter", "futime"}


def test_splits_differ_and_are_the_same_each_time():
    first, again = (tabular.split("breast_cancer", 1_000, 0) for _ in range(2))
    other = tabular.split("breast_cancer", 1_000, 1)
    assert all(a.equals(b) for a, b in zip(first, again, strict=True))
    assert not first[0].equals(other[0]) and len(first[0]) + len(first[2]) == 569
    assert len(tabular.split("breast_cancer", 100, 0)[0]) == 100
    assert len(tabular.split("breast_cancer", 100, 0)[2]) == 469


WAYS = ["fusedmlp, preset plain", "fusedmlp, preset table", "scikit-learn MLP"]


def test_a_run_goes_on_where_it_stopped_and_becomes_tables(tmp_path):
    out = tmp_path / "tabular.json"
    flags = ["--tables", "breast_cancer", "--rows", "80", "--out", str(out)]
    assert tabular.main([*flags, "--splits", "1", "--ways", *WAYS[:2]]) == 0
    before = record.read(out)["rows"]
    assert tabular.main([*flags, "--splits", "2", "--ways", *WAYS]) == 0
    rows = record.read(out)["rows"]
    assert rows[:2] == before and len(rows) == 6
    assert {(r["split"], r["way"]) for r in rows} == {(s, w) for s in (0, 1) for w in WAYS}
    assert all(r["score"] > 0.8 and 0 < r["log loss"] < 1 and r["fit"] > 0 for r in rows)
    results = report.load(tmp_path)
    summary = report.table("tabular", results)
    assert "| fusedmlp, preset table | 2 |" in summary and "python -m bench.tabular" in summary
    assert "| breast\\_cancer | 2 classes | 80 | 30 |" in report.table("tabular-each", results)
    merged = tmp_path / "merged.json"
    other = ["--ways", WAYS[0], "--splits", "1"]
    assert tabular.main([*flags[:-1], str(merged), *other, "--merge", str(out)]) == 0
    assert record.read(merged)["rows"] == rows


def test_ranks_are_among_the_ways_that_ran_everywhere_and_equals_share():
    def row(way, split, score):
        of = {"table": "t", "split": split, "rows": 9, "columns": 2, "kind": "number"}
        return of | {"way": way, "score": score, "log loss": None, "fit": 2.0, "predict": 0.1}

    ours = tabular_tables.TABULAR_OURS
    rows = [row(ours, 0, 0.5), row(ours, 1, 0.7), row("a", 0, 0.5), row("a", 1, 0.9)]
    rows.append(row("slow", 0, 0.4) | {"fit": 8.0})
    text = tabular_tables.tabular_table(json.loads(json.dumps(rows)))
    assert "| a | 2 | 0.7000 | +0.1000 | – | 1.25 | 2.00 | 0.100 | 1.00 |" in text
    assert f"| {ours} | 2 | 0.6000 | +0.0000 | – | 1.75 |" in text
    assert "| slow | 1 | 0.4000 | -0.1000 | – | – | 8.00 | 0.100 | 4.00 |" in text
