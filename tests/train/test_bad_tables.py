"""Bad tables: one message that names the thing, an exit code, and nothing half-written."""

from __future__ import annotations

import re

import pytest
import torch

import fusedmlp
from fusedmlp.train import TrainConfig, UsageError, fit, run

from .. import made_data

made_data.need(*made_data.TRAIN_EXTRA, "pandas", "sklearn")
frame, command = made_data.mixed_table, made_data.command


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with table.csv and the runs `classes` and `number`."""
    folder = tmp_path_factory.mktemp("runs")
    file = folder / "table.csv"
    frame().to_csv(file, index=False)
    flags = ("--dataset", file, "--epochs", 1, "--device", "cpu")
    for out, target, other in (("classes", "kind", "price"), ("number", "price", "kind")):
        columns = ("--target", target, "--leave-out", other, "weight")
        assert command("train", *flags, *columns, "--out", folder / out) == 0
    return folder


BAD = {
    "empty": ("", (), 1, "must start with a header line, but it is empty"),
    "only_a_header": ("a,b\n", (), 1, "must have rows below its header line"),
    "no_target": ("a,b\n1,x\n2,y\n", ("--target", "c"), 2, "must be a column of .*: a, b; got 'c'"),
    "twice": ("a,a,b\n1,2,x\n", (), 1, "must name each column once, got 'a' twice"),
    "one_class": ("a,b\n1,x\n2,x\n3,x\n", (), 1, "at least two classes, got only x"),
    "nothing_to_predict": ("a,b\n1,\n2,NA\n", (), 1, "'b' must hold values to predict, got none"),
    "constant_number": ("a,b\n1,7.5\n2,7.5\n", (), 1, "two different numbers .*, got only 7.5"),
    "constant_float": ("a,b\n1,7\n2,7\n", ("--loss", "mse"), 1, "two different numbers .*, got on"),
    "names_for_classes": (
        "a,b\n" + "".join(f"{i % 3},n{i}\n" for i in range(10)),
        (),
        1,
        "'b' must hold classes of several rows, got another value in each of its 10 rows",
    ),
    "dates": (
        "a,b\n" + "".join(f"{i % 3},2020-01-{i % 28 + 1:02}\n" for i in range(50)),
        (),
        1,
        "'b' must hold numbers or words to predict, got dates",
    ),
    "nothing_left": ("a,b\n7,x\n7,y\n7,x\n7,y\n7,x\n", (), 1, "no column is left to predict b"),
    "all_left_out": ("a,b\n1,x\n2,y\n", ("--leave-out", "a"), 1, "must have a column besides"),
    "unknown_left_out": ("a,b\n1,x\n", ("--leave-out", "c"), 2, "--leave-out must be a column of"),
    "target_left_out": ("a,b\n1,x\n", ("--leave-out", "b"), 2, "other columns than the target"),
    "unknown_weight": ("a,b\n1,x\n", ("--weight-column", "w"), 2, "--weight-column must be a col"),
    "weight_below_0": (
        "a,w,b\n1,1,x\n2,-3,y\n",
        ("--weight-column", "w"),
        1,
        "'w' must hold weights of at least 0, got -3 in row 2",
    ),
    "no_weight": (
        "a,w,b\n1,1,x\n2,,y\n",
        ("--weight-column", "w"),
        1,
        "'w' must hold weights of at least 0, got an empty cell in row 2",
    ),
    "weights_of_0": (
        "a,w,b\n1,0,x\n2,0,y\n",
        ("--weight-column", "w"),
        1,
        "'w' must hold a weight above 0, got only 0",
    ),
    "class_weight_of_numbers": (
        "a,b\n" + "".join(f"{i % 7},{i}.5\n" for i in range(30)),
        ("--class-weight", "balanced"),
        2,
        "--class-weight needs classes, but the target of bad.csv is a number",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_one_message_an_exit_code_and_no_folder(case, tmp_path, capsys):
    text, flags, code, message = BAD[case]
    (tmp_path / "bad.csv").write_text(text)
    assert command("train", "--dataset", "bad.csv", "--device", "cpu", *flags) == code
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert re.search(message, said), said
    assert not any((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else True


BAD_NEW = {
    "missing_column": (lambda f: f.drop(columns=["size", "new"]), "missing: size, new; got: id,"),
    "words_for_numbers": (lambda f: f.assign(size="large"), "'size' must hold numbers, got large"),
    "numbers_for_words": (
        lambda f: f.assign(colour=range(len(f))),
        "'colour' must hold words as in training .blue, green, red., got 0 in row 1",
    ),
    "no_date": (lambda f: f.assign(day="soon"), "'day' must hold dates, got soon in row 1"),
    "no_truth": (lambda f: f.assign(new="perhaps"), "'new' must hold true or false, got perhaps"),
    "no_rows": (lambda f: f[:0], "must have rows below its header line"),
}


@pytest.mark.parametrize("case", BAD_NEW)
def test_a_bad_new_table_writes_nothing(trained, case, tmp_path, capsys):
    change, message = BAD_NEW[case]
    change(frame(30)).to_csv("new.csv", index=False)
    assert command("predict", trained / "classes", "new.csv", "--out", "p.csv") == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["new.csv"]


def test_what_cannot_be_evaluated_or_predicted_is_said(trained, capsys):
    def said(*arguments) -> str:
        assert command(*arguments) in (1, 2)
        return capsys.readouterr().err

    frame(30).drop(columns="kind").to_csv("no.csv", index=False)
    assert "must have the target 'kind' to test on" in said(
        "evaluate", trained / "classes", "no.csv"
    )
    other = frame(30)
    other.loc[4, "kind"] = "free"
    other.to_csv("other.csv", index=False)
    message = said("evaluate", trained / "classes", "other.csv")
    assert "'kind' must hold classes that " in message and "got free in row 5" in message
    frame(30).assign(kind="").to_csv("none.csv", index=False)
    message = said("evaluate", trained / "classes", "none.csv")
    assert "'kind' must hold values to test on, got none" in message
    new = trained / "table.csv"
    assert "--proba needs a run with classes" in said("predict", trained / "number", new, "--proba")
    assert "--out belongs to a table" in said("predict", trained / "classes", "--out", "p.csv")
    assert "--out must be another file than" in said(
        "predict", trained / "classes", new, "--out", new
    )
    assert "--out must be a file, but" in said("predict", trained / "classes", new, "--out", ".")
    assert "does not exist" in said("predict", trained / "classes", "gone.csv")
    assert command("train", "--dataset", "synthetic", "--epochs", 1, "--out", "s") == 0
    assert "a table needs a run on a table with named columns" in said("predict", "s", new)
    with pytest.raises(TypeError, match="leave_out must be a sequence, got str"):
        TrainConfig(dataset="t.csv", leave_out="id").check()
    with pytest.raises(TypeError, match="a table with words is passed as one DataFrame"):
        fit(fusedmlp.FusedMLP(4, [4], 2), (frame()[["colour"]], torch.zeros(400)))
    with pytest.raises(TypeError, match="run: data must be a DataFrame, got list"):
        run(data=[1])
    with pytest.raises(UsageError, match="--target names a column of a table"):
        TrainConfig(dataset="digits", target="x").check()


def test_names_from_a_file_cannot_break_a_line_or_colour_the_terminal(tmp_path, capsys):
    table = frame()[["size", "same", "kind"]]
    table["kind"] = table["kind"].map(lambda kind: f"{kind}\x1b[31m\nx")
    table.columns = "si\nze", "sa\nme", "ki\x1b[1mnd"
    file = tmp_path / "t.csv"
    table.to_csv(file, index=False)
    flags = ("--dataset", file, "--target", "ki\x1b[1mnd", "--preset", "plain", "--epochs", 1)
    assert command("train", *flags, "--out", tmp_path / "r") == 0
    assert command("evaluate", tmp_path / "r") == 0
    assert command("train", *flags, "--leave-out", "si\nze", "--out", tmp_path / "s") == 1
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert r"sa\nme" in said.out and r"\x1b[31m\nx " in said.out
    assert said.err.count("\n") == 1 and r"no column is left to predict ki\x1b[1mnd" in said.err
