"""Small runs for the faults: their data and flags, and what must be equal in two of them."""

import json
import os
from pathlib import Path

import numpy as np
import torch

from fusedmlp import cli
from fusedmlp.train import inference, loop, plots, run_folder

TRAIN = "train --dataset data.npz --hidden 16 12 --dropout 0.2 --optimizer adam --batch-size 16"
TRAIN += " --keep best --val-split 0.2 --lr 0.01 --device cpu"
MESSAGE = "fusedmlp: "


def make_data(folder: Path, rows: int = 240, packed: bool = False) -> Path:
    """data.npz: images of 8 x 8 pixels, of four classes."""
    dice = np.random.default_rng(0)
    y = np.arange(rows) % 4
    x = dice.integers(0, 100, (rows, 8, 8))
    for row, label in enumerate(y):
        top, left = 4 * (label // 2), 4 * (label % 2)
        x[row, top : top + 4, left : left + 4] += 60
    cut, x = rows * 3 // 4, x.astype(np.uint8)
    parts = {"x_train": x[:cut], "y_train": y[:cut], "x_test": x[cut:], "y_test": y[cut:]}
    (np.savez_compressed if packed else np.savez)(folder / "data.npz", **parts)
    return folder / "data.npz"


def command(folder: Path, words: str, draws: bool = True) -> int:
    """The exit code of a command in this process, which then is in that folder.

    draws  pictures, which take far longer than the training
    """
    os.chdir(folder)
    loop.SAVE_SECONDS = 0.0  # a checkpoint after each epoch
    if not draws:
        plots.run_pictures = lambda *_: {}
    try:
        return cli.main(words.split())
    except SystemExit as stop:  # of the parser
        return stop.code


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or a != a)


def content(folder: Path) -> dict:
    """What a finished run leaves, but for times; raises where a file is not whole."""
    found = {"checkpoint.pt": run_folder.load_checkpoint(folder)}
    found["checkpoint.pt"].pop("rng")  # as it was when the last step was saved
    for row in (*found["checkpoint.pt"]["history"], found["checkpoint.pt"]["position"]):
        for name in ("seconds", "total_seconds"):
            row.pop(name, None)
    rows = (folder / "metrics.csv").read_text().splitlines()
    found["metrics.csv"] = [row.rsplit(",", 1)[0] for row in rows]
    summary = json.loads((folder / "summary.json").read_text())
    timed = ("seconds", "samples_per_second")
    found["summary.json"] = {k: v for k, v in summary.items() if not k.endswith(timed)}
    found["model.safetensors"] = (folder / "model.safetensors").read_bytes()
    inference.load(folder)
    for path in folder.glob("*.png"):
        found[path.name] = path.read_bytes()
    return found


def unfinished(folder: Path) -> list[str]:
    """Temporary files that are left."""
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


def differs(folder: Path, wanted: dict) -> str | None:
    """How a finished run differs from what it must be."""
    try:
        found = content(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    wrong = [name for name in wanted if not equal(found.get(name), wanted[name])]
    return f"other content: {', '.join(wrong)}" if wrong else None


def complaint(said: str, code: int, wanted: tuple[int, ...] = (1,)) -> str | None:
    """What is wrong with how a command failed: it must end with one message."""
    lines = [line for line in said.splitlines() if line.startswith(MESSAGE)]
    if code not in wanted:
        return f"exit code {code}: {said[-300:]}"
    if "Traceback" in said:
        return f"a traceback: {said[-600:]}"
    return None if len(lines) == 1 or code in (0, 130) else f"{len(lines)} messages: {said[-300:]}"
