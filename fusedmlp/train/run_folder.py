"""RunFolder: where a run writes. Claimed for one run at a time; an earlier run is never
overwritten unasked."""

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

from . import checkpoint
from .errors import TrainError

METRICS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
)
# All that a run may write, and all that --overwrite removes.
FILES = (
    "config.json",
    "metrics.csv",
    "model.safetensors",
    "checkpoint.pt",
    "summary.json",
    "curves.png",
    "predictions.png",
    "confusion.png",
    "residuals.png",
    "results.csv",
    "crossval.png",
)


@dataclass(frozen=True)
class RunFolder:
    path: Path
    is_new: (
        bool  # made by this run: taken away again when the run fails before its first checkpoint
    )

    def file(self, name: str) -> Path:
        return self.path / name

    def paths(self) -> dict[str, Path]:
        return {name: self.path / name for name in FILES if (self.path / name).exists()}

    def write(self, name: str, content: bytes | str) -> None:
        checkpoint.write_atomically(
            self.file(name), content.encode() if isinstance(content, str) else content
        )

    def write_json(self, name: str, content: dict) -> None:
        self.write(name, json.dumps(content, indent=2) + "\n")

    def write_metrics(self, history: list[dict]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)  # None becomes an empty cell
        self.write("metrics.csv", text.getvalue())

    def discard(self) -> None:
        """Take back what a run left that has no checkpoint to go on from."""
        if self.file("checkpoint.pt").exists():
            return
        _remove_files(self.path)
        if self.is_new:
            try:
                self.path.rmdir()
            except OSError:
                pass


def reopen(path: Path) -> RunFolder:
    """The folder of a run that goes on; what that run was writing when it was killed is removed."""
    _remove_unfinished(path)
    return RunFolder(path, is_new=False)


def _remove_files(path: Path) -> None:
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    _remove_unfinished(path)


def _remove_unfinished(path: Path) -> None:
    for name in FILES:
        for file in path.glob(f".{name}-*"):
            file.unlink(missing_ok=True)


def create(out: Path | None, parent: Path | None, overwrite: bool, config_json: str) -> RunFolder:
    """A folder with nothing in it but config.json, which claims it: of two runs at once one gets
    it.

    out     None: the next free number under parent
    """
    try:
        folder = _numbered(parent) if out is None else _named(Path(out), overwrite)
        _claim(folder, config_json)
    except OSError as error:
        place = error.filename or out or parent
        raise TrainError(
            f"cannot write to {place}: {error.strerror}; name another folder with --out"
        ) from error
    return folder


def _numbered(parent: Path) -> RunFolder:
    parent.mkdir(exist_ok=True)
    taken = [int(entry.name) for entry in parent.iterdir() if entry.name.isdecimal()]
    number = max(taken, default=0)
    while True:
        number += 1
        path = parent / f"{number:04d}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return RunFolder(path, is_new=True)


def _named(path: Path, overwrite: bool) -> RunFolder:
    if path.exists() and not path.is_dir():
        raise TrainError(f"--out must be a folder, but {path} is a file")
    if not path.exists():
        path.mkdir(parents=True)
        return RunFolder(path, is_new=True)
    present = [name for name in FILES if (path / name).exists()]
    if present and not overwrite:
        raise TrainError(
            f"{path} already holds a run ({present[0]}); name another --out, replace it with "
            "--overwrite, "
            f"or go on with --resume {path}"
        )
    if not present and any(path.iterdir()):
        raise TrainError(f"--out must be new, empty or a run folder, but {path} holds other files")
    if present and not os.access(path, os.W_OK):
        raise TrainError(
            f"cannot write to {path}: permission denied; name another folder with --out"
        )
    _remove_files(path)
    return RunFolder(path, is_new=False)


def _claim(folder: RunFolder, config_json: str) -> None:
    path = folder.file("config.json")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(config_json)
    except FileExistsError as error:
        raise TrainError(
            f"{folder.path} has just been taken by another run; name another --out"
        ) from error
    except OSError:
        folder.discard()
        raise
