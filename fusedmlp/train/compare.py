"""Runs beside each other: the settings in which they differ, their scores and their seconds."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from .config import shown
from .console import FIGURES, figure
from .errors import TrainError
from .run_folder import load_config

# Of a run's summary: what ran, which the settings leave open.
FACTS = ("engine", "backend", "device", "threads", "processes", "torch")

SECONDS = ("train_seconds", "search_seconds", "refit_seconds")  # of a run; of a cross-validation


@dataclass(frozen=True)
class _Line:
    """What is told of one run; settings and scores by name."""

    folder: Path
    settings: dict
    facts: dict
    scores: dict
    seconds: float | None


def table(folders: list[Path]):
    """A table of rich with a line for each run folder, in the order given.

    raises  TrainError for what is no run folder
    """
    from rich.markup import escape
    from rich.table import Table

    lines = [_line(folder) for folder in folders]
    settings = [_settings(line, lines) for line in lines]
    differ = [name for name in settings[0] if len({repr(s.get(name)) for s in settings}) > 1]
    scores = [name for name in FIGURES if any(line.scores.get(name) is not None for line in lines)]
    found = Table(title=None if differ else "all settings are the same")
    found.add_column("run", overflow="fold")
    for name in (*differ, *scores, "seconds"):
        found.add_column(escape(name), justify="right", overflow="fold")
    for line, of_line in zip(lines, settings, strict=True):
        values = [str(line.folder), *(shown(of_line[name]) for name in differ)]
        values += [_told(line.scores.get(name)) for name in scores]
        values.append("-" if line.seconds is None else f"{line.seconds:.2f}")
        found.add_row(*map(escape, values))
    return found


def _settings(line: _Line, lines: list[_Line]) -> dict:
    """Its settings, with what ran where all of the lines know that."""
    known = {name for name in FACTS if all(name in other.facts for other in lines)}
    return line.settings | {name: line.facts[name] for name in FACTS if name in known}


def _told(value) -> str:
    return "-" if value is None else figure(value)


def _line(folder: Path) -> _Line:
    config = load_config(folder)
    summary = _summary(folder)
    settings = {k: v for k, v in config.to_dict().items() if k not in ("data_dir", "time_limit")}
    if summary is None:
        last = _last_epoch(folder)
        settings["epochs"] = f"{last.get('epoch', 0)} of {config.epochs or '?'}"
        return _Line(folder, settings, {}, last, None)
    if "folds" in summary:  # a cross-validation: its chosen network
        scores = {"test_loss": summary.get("test_loss"), "test_r2": summary.get("test_r2")}
        if summary.get("measure") == "error" and summary.get("test_error") is not None:
            scores["test_accuracy"] = 1 - summary["test_error"]
        seconds = sum(summary.get(name) or 0 for name in SECONDS[1:])
        return _Line(folder, settings, {}, scores, seconds)
    if summary.get("epochs") != config.epochs:
        settings["epochs"] = f"{summary.get('epochs')} of {config.epochs}"
    return _Line(folder, settings, summary, summary, summary.get(SECONDS[0]))


def _summary(folder: Path) -> dict | None:
    path = folder / "summary.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        for name in (*FIGURES, "test_error", *SECONDS):
            value = content.get(name)
            if value is not None and type(value) not in (int, float):
                raise ValueError(f"{name} must be a number, got {value!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise TrainError(
            f"{path} is truncated, corrupted or no summary of a run ({error})"
        ) from error
    return content


def _last_epoch(folder: Path) -> dict:
    """The figures of the last epoch of a run that is not finished, by name."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return {}
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        found = {name: float(text) for name, text in (rows or [{}])[-1].items() if text}
        if "epoch" in found:
            found["epoch"] = int(found["epoch"])
    except (OSError, ValueError, TypeError, OverflowError, csv.Error) as error:
        raise TrainError(
            f"{path} is truncated, corrupted or no metrics of a run ({error})"
        ) from error
    return found
