"""--log: a tracker is told of each epoch; one that is missing is named, and one that fails costs no
run."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from fusedmlp.train import RunOptions, TrainError, UsageError, crossval, fit, logs, run

from .. import made_data
from .test_train import config, network

made_data.need(*made_data.TRAIN_EXTRA, "sklearn")


class Tracker:
    """Keeps what it is told; fails at what `fails` names."""

    def __init__(self, fails: str = ""):
        self.told, self.fails = [], fails

    def _tell(self, verb, *what):
        if verb == self.fails:
            raise OSError("no line\nno cable")
        self.told.append((verb, *what))

    def init(self, *, project, name, config):
        self._tell("init", project, name, config)

    def log(self, figures, step):
        self._tell("log", figures, step)

    def finish(self):
        self._tell("finish")


@pytest.fixture
def tracker(monkeypatch):
    made = Tracker()
    monkeypatch.setitem(sys.modules, "tracker", made)
    return made


def test_a_tracker_is_told_the_settings_each_epoch_and_the_end(tracker, tmp_path):
    options = RunOptions(out=tmp_path / "first", log="tracker")
    result = fit(network(sizes=(3, 8, 1)), made_data.line(), config(epochs=2), options)
    (init, *logged, finish), last = tracker.told, result.summary
    assert init[:3] == ("init", "fusedmlp", "first") and finish == ("finish",)
    assert init[3]["lr"] == result.config.lr and init[3]["dims"] == [3, 8, 1]
    assert [step for _, _, step in logged] == [1, 2, 2]
    for (_, figures, _), row in zip(logged, result.history, strict=False):
        assert figures == {k: v for k, v in row.items() if v is not None and k != "epoch"}
    assert logged[2][1] == {"test_r2": last["test_r2"], "test_rmse": last["test_rmse"]}


def test_a_run_that_goes_on_tells_its_further_epochs(tracker, tmp_path):
    data = made_data.blobs()
    fit(network(), data, config(epochs=1), RunOptions(out=tmp_path / "run"))
    fit(network(), data, config(epochs=3), RunOptions(resume=tmp_path / "run", log="tracker"))
    assert [part[2] for part in tracker.told if part[0] == "log"] == [2, 3]


def test_an_object_with_the_three_verbs_is_taken_too(tmp_path):
    mine = Tracker()
    fit(network(), made_data.blobs(), config(epochs=1), RunOptions(out=tmp_path / "r", log=mine))
    assert [part[0] for part in mine.told] == ["init", "log", "finish"]
    with pytest.raises(TypeError, match="log must be a module's name or have .* int has no init"):
        RunOptions(log=7).check()


def test_a_module_in_the_working_folder_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = ("def init(**_): print('begun')", "def log(*_, **__): ...", "def finish(): ...")
    (tmp_path / "mine_of_a_test.py").write_text("\n".join(lines))
    before = list(sys.path)
    flags = ("--dataset", "synthetic", "--epochs", 1, "--log", "mine_of_a_test")
    assert made_data.command("train", *flags) == 0
    assert capsys.readouterr().out.count("begun\n") == 1 and sys.path == before


@pytest.mark.parametrize(
    "log, missing, code, message",
    [
        (
            "wandb",
            "wandb",
            1,
            "--log wandb needs the package wandb, which is not installed: pip in",
        ),
        ("trackio", "trackio", 1, "trackio, which is not installed: pip install trackio"),
        ("tensorboard", "*", 1, "neither is installed: pip install tensorboardX"),
        ("no_such.thing", "", 1, "needs the package no_such, which is not installed"),
        ("json", "", 2, "a module with the functions init, log and finish, but json has no init"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_message(
    log, missing, code, message, tmp_path, monkeypatch, capsys
):
    for name in logs.TENSORBOARD if missing == "*" else filter(None, [missing]):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    assert made_data.command("train", "--dataset", "gone.csv", "--log", log) == code
    said = capsys.readouterr()
    assert message in said.err and len(said.err.splitlines()) == 1 and not said.out
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_cannot_start_ends_the_run_before_it_begins(tmp_path):
    options = RunOptions(out=tmp_path / "run", log=Tracker("init"))
    with pytest.raises(TrainError, match="--log Tracker could not be started: OSError: no line$"):
        fit(network(), made_data.blobs(), config(), options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["log", "finish"])
def test_a_tracker_that_fails_later_costs_a_warning(verb, tmp_path, caplog):
    mine = Tracker(verb)
    result = fit(network(), made_data.blobs(), config(), RunOptions(out=tmp_path / "r", log=mine))
    assert len(result.history) == 2 and "summary.json" in result.paths
    (record,) = caplog.records
    assert record.getMessage() == "--log Tracker failed, and is told no more: OSError: no line"
    assert [part[0] for part in mine.told] == (
        ["init"] if verb == "log" else ["init", "log", "log"]
    )


def test_tensorboard_writes_into_the_run_folder_and_overwriting_removes_it(tmp_path, monkeypatch):
    told = []

    class Writer:
        def __init__(self, folder, purge_step):
            self.file = f"{folder}/events.out.tfevents.{len(told)}"
            told.append(purge_step)
            open(self.file, "x").close()

        def add_text(self, *_): ...
        def add_scalar(self, *what):
            told.append(what)

        def close(self):
            told.append("closed")

    monkeypatch.setitem(sys.modules, logs.TENSORBOARD[0], None)
    monkeypatch.setitem(sys.modules, logs.TENSORBOARD[1], SimpleNamespace(SummaryWriter=Writer))
    data, out = made_data.blobs(), tmp_path / "run"

    def events():
        return [path.name for path in out.glob("events*")]

    fit(network(), data, config(epochs=1), RunOptions(out=out, log="tensorboard"))
    names = [what[0] for what in told[1:-1]]
    assert told[0] == 1 and names[0] == "train_loss" and told[-1] == "closed"
    assert events() == ["events.out.tfevents.0"]
    fit(network(), data, config(epochs=2), RunOptions(resume=out, log="tensorboard"))
    assert 2 in told and len(events()) == 2
    fit(network(), data, config(epochs=1), RunOptions(out=out, overwrite=True))
    assert events() == []


def test_the_real_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    options = RunOptions(out=tmp_path / "run", log="tensorboard")
    fit(network(), made_data.blobs(), config(), options)
    (file,) = (tmp_path / "run").glob("events.out.tfevents.*")
    assert b"test_accuracy" in file.read_bytes()


def test_many_networks_have_no_tracker(tmp_path):
    with pytest.raises(UsageError, match="--log belongs to train"):
        crossval(config(), options=RunOptions(out=tmp_path / "cv", log="json"))


def test_a_run_that_is_not_asked_imports_no_tracker(tmp_path, monkeypatch):
    for name in ("wandb", "trackio", *logs.TENSORBOARD):
        monkeypatch.delitem(sys.modules, name, raising=False)
    run(config(dataset="synthetic", epochs=1), RunOptions(out=tmp_path / "run"))
    assert not {"wandb", "trackio", *logs.TENSORBOARD} & sys.modules.keys()
