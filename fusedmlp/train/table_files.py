"""Files of tables and the network of a run: predicting their rows, testing it on them. Rows are
read in blocks, so that memory does not grow with the file."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..whole_file import whole_file
from .data.columns import Column
from .data.frame_data import raw_rows
from .data.frame_target import encode_target
from .data.frames import open_table
from .errors import TrainError, UsageError
from .inference import BLOCK_ROWS, Trained
from .losses import loss_sums


@dataclass
class Reading:
    """The blocks of a file, and what is to be said of it once they are read."""

    trained: Trained
    path: Path
    rows: int = 0
    unknown: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)

    def blocks(self, with_target: bool) -> Iterator[tuple]:
        """(outputs (n, C), the block as a DataFrame, its name in messages)."""
        preparation = self.trained.need_table()
        table = open_table(self.path)
        target = preparation.target.name
        if with_target and target not in table.names:
            raise TrainError(
                f"{table.where} must have the target {target!r} to test on; its columns: "
                f"{', '.join(table.names)}"
            )
        words = [c.name for c in preparation.columns if c.kind == "words"]
        left_out = (*preparation.left_out, target)
        for frame in table.blocks(BLOCK_ROWS, text=(*words, target)):
            where = table.where + (f", counted from row {self.rows + 1}" if self.rows else "")
            raw, unknown, self.extra = raw_rows(frame, preparation.columns, left_out, where)
            counts = raw.isnan().sum(0).tolist()
            missing = {
                part.column.name: count
                for part, count in zip(preparation.parts, counts, strict=True)
                if count and not part.has_flag and part.way != "target"
            }
            for found, kept in ((unknown, self.unknown), (missing, self.missing)):
                for name, count in found.items():
                    kept[name] = kept.get(name, 0) + count
            self.rows += len(frame)
            yield self.trained.outputs(raw, preparation.columns), frame, where

    def notes(self) -> Iterator[str]:
        if self.extra:
            yield f"{self.path}: columns that training did not have: {', '.join(self.extra)}"
        for name, count in self.unknown.items():
            yield f"{self.path}: column {name!r} has words unknown to training in {count} rows"
        for name, count in self.missing.items():
            yield f"{self.path}: column {name!r} is empty in {count} rows, never so in training"


def predict_file(
    trained: Trained, path: Path, out: Path | None, proba: bool, note: Callable[[str], None]
) -> int:
    """Write a csv with the columns of Trained.predict and a line for each row of the file, whole or
    not at all; to standard output where `out` is None. Returns the number of rows."""
    if out is not None and out.suffix.lower() == ".parquet":
        raise UsageError(f"--out must name a csv file, got {out}")
    if out is not None and out.exists() and path.exists() and out.samefile(path):
        raise UsageError(f"--out must be another file than the table to predict, got {out}")
    if proba and trained.classes is None:
        raise UsageError(
            f"--proba needs a run with classes, but {trained.folder} predicts a number"
        )
    reading = Reading(trained, path)
    with _text_file(out) if out is not None else _kept(sys.stdout) as file:
        for outputs, _, _ in reading.blocks(with_target=False):
            found = trained.predictions(outputs, proba)
            found.to_csv(file, index=False, header=reading.rows == len(found), lineterminator="\n")
    for text in reading.notes():
        note(text)
    return reading.rows


@contextmanager
def _kept(stream):
    yield stream


@contextmanager
def _text_file(path: Path):
    """A text file that is written whole or not at all."""
    if path.is_dir():
        raise TrainError(f"--out must be a file, but {path} is a folder")
    try:
        with whole_file(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            yield text
            text.flush()
            text.detach()
    except OSError as error:
        raise TrainError(f"cannot write {path}: {error.strerror or error}") from error


class _Spread:
    """Sums of a float target and of its errors, about a centre so that they keep their digits."""

    def __init__(self, centre: float):
        self.centre, self.errors, self.first, self.second, self.rows = centre, 0.0, 0.0, 0.0, 0

    def add(self, predicted: torch.Tensor, true: torch.Tensor) -> None:
        away = true - self.centre
        self.errors += float((predicted - true).square().sum())
        self.first += float(away.sum())
        self.second += float(away.square().sum())
        self.rows += len(true)

    def figures(self) -> dict[str, float]:
        spread = self.second - self.first**2 / self.rows
        share = self.errors / spread if spread > 0 else float(self.errors > 0)
        r2 = 1 - share if self.rows > 1 else float("nan")
        return {"test_rmse": (self.errors / self.rows) ** 0.5, "test_r2": r2}


def evaluate_file(trained: Trained, path: Path, note: Callable[[str], None]) -> dict:
    """What inference.evaluate returns, over all rows of the file that have a target."""
    preparation = trained.need_table()
    target: Column = preparation.target
    is_classes = trained.classes is not None
    sums = torch.zeros(3, dtype=torch.float64)
    mean = trained.target_scaling.mean
    spread = _Spread(0.0 if mean is None else float(mean))
    hits, counts = (torch.zeros(len(trained.classes or ()), dtype=torch.int64) for _ in range(2))
    reading = Reading(trained, path)
    for outputs, frame, where in reading.blocks(with_target=True):
        y, kept = encode_target(target, frame[target.name], where, str(trained.folder))
        outputs = outputs[kept]
        if not len(y):
            continue
        if is_classes:
            sums += loss_sums("cross_entropy", outputs, y)
            counts += torch.bincount(y, minlength=len(counts))
            hits += torch.bincount(y[outputs.argmax(1) == y], minlength=len(counts))
        else:
            sums += loss_sums("mse", outputs.double(), trained.target_scaling(y).double())
            spread.add(trained.target_scaling.undo(outputs), y)
    for text in reading.notes():
        note(text)
    loss, right, rows = sums.tolist()
    if not rows:
        raise TrainError(f"{path}: column {target.name!r} must hold values to test on, got none")
    if reading.rows > rows:
        note(f"{path}: {reading.rows - int(rows)} rows have no {target.name} and are left out")
    result = {
        "rows": int(rows),
        "test_loss": loss / rows,
        "test_accuracy": right / rows if is_classes else None,
        "test_rmse": None,
        "test_r2": None,
        "per_class": {},
    }
    if not is_classes:
        return result | spread.figures()
    for name, hit, count in zip(trained.classes, hits.tolist(), counts.tolist(), strict=True):
        result["per_class"][name] = (hit, count)
    return result
