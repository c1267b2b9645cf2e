"""A disk that is full from some write on, or for one write: each command must end with one message,
with no half-written file under its final name, and with the good file of before."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from fusedmlp.backends import measured
from fusedmlp.train import inference, run_folder

from . import child, inject, runs

LESS = f"{runs.TRAIN} --epochs 2"
MORE = f"{runs.TRAIN} --epochs 4"


def _damaged(folder: Path) -> str | None:
    """Files that are half-written or left over."""
    if not folder.exists():
        return None
    if left := runs.unfinished(folder):
        return f"left behind: {', '.join(left)}"
    for path in folder.iterdir():
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.name == "checkpoint.pt":
                run_folder.load_checkpoint(folder)
            elif path.name == "model.safetensors":
                inference.load(folder)
            elif path.suffix == ".png":
                assert path.read_bytes()[-8:-4] == b"IEND", "it has no end"
        except Exception as error:
            return f"{path.name}: {error}"
    return None


def _each(
    place: Path, folder: Path, work, dice: random.Random, count: int, prepare=lambda: None
) -> Iterator[tuple[str, child.Ended]]:
    """What became of the work with each write of the folder in turn failing, for once and for
    ever; at most `count` of them, by chance."""

    def faulty(n: int, way: int):
        with inject.disk(n, way, folder) as counted:
            code = work()
        return code, counted.number

    prepare()
    whole = child.run(lambda: faulty(inject.NEVER, inject.FAILS), place, child.HANGS)
    code, number = whole.result
    if code != 0:
        raise RuntimeError(f"faults: a command without a fault has failed: {whole.said}")
    cases = [(n, way) for n in range(1, number + 1) for way in (inject.FAILS, inject.STAYS_FULL)]
    for n, way in sorted(dice.sample(cases, min(count, len(cases)))):
        prepare()
        ended = child.run(lambda n=n, way=way: faulty(n, way), place, child.HANGS)
        how = "for once" if way == inject.FAILS else "from then on"
        yield f"write {n} of {number} {how}", ended


def _complaint(ended: child.Ended) -> str | None:
    if ended.crash() or ended.error:
        return ended.crash() or ended.error
    code = ended.result[0]
    wrong = runs.complaint(ended.said, code, (0, 1))
    if not wrong and code and "No space left on device" not in ended.said:
        wrong = f"the message does not say why: {ended.said[-300:]}"
    return wrong


def train(place: Path, dice: random.Random, count: int) -> Iterator[str | None]:
    """A run that goes on from a checkpoint, and then goes on again."""
    runs.make_data(place)
    for words in (f"{LESS} --out first", f"{MORE} --out whole"):
        child.run(lambda w=words: runs.command(place, w), place, child.HANGS)
    wanted, run = runs.content(place / "whole"), place / "run"

    def prepare():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(place / "first", run)

    def work():
        return runs.command(place, "train --resume run --epochs 4 --device cpu")

    for which, ended in _each(place, run, work, dice, count, prepare):
        wrong = _complaint(ended) or _damaged(run)
        if not wrong:
            held = run_folder.load_checkpoint(run)["position"]["epoch"]
            if held < 2:
                wrong = "the checkpoint of before is gone"
            again = child.run(work, place, child.HANGS)
            is_done = again.result == 2 and "has done its" in again.said
            if again.result != 0 and not is_done:
                wrong = f"it did not go on: {again.said[-300:]}"
            wrong = wrong or runs.differs(run, wanted)
        yield wrong and f"train, {which}: {wrong}"


def other_commands(place: Path, dice: random.Random, count: int) -> Iterator[str | None]:
    """train into a new folder, crossval, predict --out and tune."""
    runs.make_data(place)
    table = "a,b,kind\n" + "".join(f"{i % 7},{i % 5},{'xy'[i % 2]}\n" for i in range(80))
    (place / "table.csv").write_text(table)
    trained = "train --dataset table.csv --target kind --preset plain --epochs 1 --device cpu"
    child.run(lambda: runs.command(place, f"{trained} --out trained"), place, child.HANGS)
    out = place / "out"

    def fresh():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    def fresh_cache():
        fresh()
        os.environ["XDG_CACHE_HOME"] = str(out)
        child.run(lambda: measured.keep_all("cpu", "classes", ROW), place, child.HANGS)

    def kept():
        measured.keep_all("cpu", "classes", {"another": ROW["one"]})

    def tune():
        from fusedmlp import cli
        from fusedmlp.commands import tune as command

        command._measure_classes = lambda count, seed: kept() or 0  # what writes, in no time
        return cli.main(["tune", "--device", "cpu", "--networks", "1"])

    commands = {
        "train": (f"{LESS} --out out/run", fresh),
        "crossval": (
            "crossval --dataset data.npz --hidden 4 / 8 --epochs 1 --folds 2 --out out/run",
            fresh,
        ),
        "predict": ("predict trained table.csv --out out/found.csv", fresh),
        "tune": (tune, fresh_cache),
    }
    share = max(1, count // len(commands))
    for name, (words, prepare) in commands.items():
        work = words if callable(words) else lambda w=words: runs.command(place, w)
        for which, ended in _each(place, out, work, dice, share, prepare):
            wrong = _complaint(ended)
            for folder in (out, out / "run", out / "fusedmlp"):
                wrong = wrong or _damaged(folder)
            if not wrong and name == "predict" and ended.result[0]:
                wrong = "a file is there" if (out / "found.csv").exists() else None
            if not wrong and name == "tune":
                held = json.loads((out / "fusedmlp" / "measured.json").read_text())
                wrong = None if "one" in str(held) else "what was kept before is gone"
            yield wrong and f"{name}, {which}: {wrong}"


ROW = {"one": {"ratios": {"native": [1.0, 1.1]}}}
