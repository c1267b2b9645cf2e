"""The results files of this checkout: what README and docs show is theirs, of a commit before this
one, by a command that is still there."""

import pytest

from bench import numerics, record, report


def test_the_documents_of_this_checkout_agree_with_its_results():
    assert report.main(["--check"]) == 0, "run: python -m bench.report"


def _results() -> list[tuple[str, dict]]:
    found = report.load(record.ROOT / "bench" / "results")
    each = [(path.name, f) for path, f in found.items()]
    return each + [(name, early) for name, f in each for early in f.get("earlier", [])]


def test_the_commits_of_the_results_are_ancestors_of_this_one():
    if not record.commit() or record._said("git", "rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("no git checkout with its history")
    history = set(record._said("git", "rev-list", "--abbrev-commit", "--abbrev=12", "HEAD").split())
    strangers = [
        (name, found["commit"])
        for name, found in _results()
        if found["commit"].partition("+")[0] not in history
    ]
    assert not strangers


# The older rows of parity.json take an hour, and are of `bench.train` before it had this name.
RENAMED = {"bench.train_proof": "bench.train"}


def test_the_commands_of_the_results_are_there():
    for name, found in _results():
        module = found["command"].split()[2]
        module = RENAMED.get(module, module)
        assert (record.ROOT / f"{module.replace('.', '/')}.py").exists() or (
            record.ROOT / module.replace(".", "/") / "__main__.py"
        ).exists(), f"{name}: {found['command']}"


def test_rows_of_an_earlier_run_keep_its_commit(tmp_path, monkeypatch):
    row = {"backend": "native", "op": "mlp", "dtype": "fp32", "cases": 1, "wrong": 0}
    parts = {part: lambda part=part: [row | {"part": part}] for part in ("table", "bits")}
    monkeypatch.setattr(numerics, "PARTS", parts)
    out = tmp_path / "numerics.json"
    whole, part = ["--out", str(out)], ["--out", str(out), "--only", "bits"]
    monkeypatch.setattr(record, "commit", lambda: "one")
    assert numerics.main(whole) == 0
    monkeypatch.setattr(record, "commit", lambda: "two")
    assert numerics.main(part) == 0
    found = record.read(out)
    assert [r["part"] for r in found["rows"]] == ["table", "bits"]
    assert [head["commit"] for head in (*found["earlier"], found)] == ["one", "two"]
    assert numerics.main(whole) == 0 and "earlier" not in record.read(out)
