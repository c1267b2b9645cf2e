"""The file of measured choices: damaged, stale, of other devices, in a folder that is closed."""

import json
import logging

import pytest
import torch

from fusedmlp.backends import measured

from .works import DROPS, WORK, keep, network, ran


def _damaged() -> list[str]:
    entry = {"versions": measured.versions("cpu")}
    rows = (
        {"calls": {"x": 3}},
        {"calls": {"x": {"times": {"eager": "fast"}, "wrong": {}}}},
        {"calls": {"x": {"times": {"eager": -1.0}, "wrong": {}}}},
        {"classes": {"x": {"ratios": {"native mlp": [1.0]}}}},
        {"tiles": {"x": 3}},
    )
    return ["{", "[]", '{"x": 3}', *(json.dumps({"Test cpu": entry | row}) for row in rows)]


@pytest.mark.parametrize("text", _damaged())
def test_a_damaged_file_is_named_once_and_written_anew(text, caplog):
    measured.path().parent.mkdir(parents=True)
    measured.path().write_text(text)
    for _ in range(3):
        assert ran(network()) == "eager"
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(measured.path()) in message and "cannot be read" in message
    keep(WORK, eager=2.0, native_mlp=1.0)
    measured.forget()
    assert measured.own("cpu")["calls"][WORK.key]["times"] == {"eager": 2.0, "native mlp": 1.0}


def test_a_table_of_other_versions_is_named_once_and_makes_room(caplog):
    keep(WORK, eager=100.0, native_mlp=10.0)
    tables = json.loads(measured.path().read_text())
    tables["Test cpu"]["versions"]["torch"] = "1.0"
    measured.path().write_text(json.dumps(tables))
    measured.forget()
    for _ in range(3):
        assert ran(network()) == "eager"
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(measured.path()) in message
    assert f"torch 1.0, now {torch.__version__}" in message
    keep(DROPS, eager=1.0)
    assert list(measured.own("cpu")["calls"]) == [DROPS.key]


def test_entries_of_other_devices_stay():
    measured.keep("cuda", "tiles", "x", [1, 2, 3])
    keep(WORK, eager=1.0)
    assert set(json.loads(measured.path().read_text())) == {"Test cuda", "Test cpu"}


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        keep(WORK, eager=1.0)


def test_info_shows_the_first_sizes_and_says_how_many_there_are_more(capsys):
    from fusedmlp import cli
    from fusedmlp.commands import info

    def said(count: int) -> str:
        rows = {f"size {i}": {"times": {"eager": 1.0}, "wrong": {}} for i in range(count)}
        measured.keep_all("cpu", "calls", rows)
        assert cli.main(["info"]) == 0
        return capsys.readouterr().out

    text = said(info._SHOWN)
    assert text.count(", size ") == info._SHOWN and "sizes more" not in text
    text = said(info._SHOWN + 3)
    assert text.count(", size ") == info._SHOWN and "cpu: 3 sizes more" in text
