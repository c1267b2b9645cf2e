"""Files that are cut off or have a bit turned, at places by chance: reading one must give an error
that names it, or what the whole file gives. Text, raw pixels and measured times have nothing to
tell a turned bit by: of those another value is as good."""

import gzip
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedmlp.backends import measured, native
from fusedmlp.functional import linear_act
from fusedmlp.train import TrainConfig, TrainError, UsageError, compare, inference, run_folder
from fusedmlp.train.data import datasets, images

from . import child, runs

# Address space that reading may take; Arrow reserves a GB before it reads anything.
ROOM = 4 << 30
MEMORY = 256 << 20  # bytes of memory


@dataclass(frozen=True)
class Reader:
    """How a file is read, what it is called in errors, and whether other values may come of it."""

    path: Path
    read: Callable[[], object]
    may_differ: bool = False
    named: str | None = None


def _loaded(config: TrainConfig) -> list:
    data = datasets.read(config)
    return [data.x_train, data.y_train, data.x_test, data.y_test, data.classes]


def _table(path: Path) -> TrainConfig:
    return TrainConfig(dataset=str(path), target="kind", val_split=0.0)


def _idx(folder: Path, packed: bool) -> Path:
    folder.mkdir()
    dice = random.Random(0)
    for _, name, dims in images.FILES:
        rows = 30
        sizes = (rows, 28, 28)[:dims]
        header = (0x800 + dims).to_bytes(4, "big")
        header += b"".join(size.to_bytes(4, "big") for size in sizes)
        count = rows * (784 if dims == 3 else 1)
        values = bytes(dice.randrange(10) for _ in range(count))
        file = folder / (f"{name}.gz" if packed else name)
        file.write_bytes(gzip.compress(header + values) if packed else header + values)
    return folder / (images.FILES[0][1] + (".gz" if packed else ""))


def readers(place: Path) -> dict[str, Reader]:
    """A reader of each kind of file, which is made here."""
    from PIL import Image

    found = {}
    for name, packed in (("npz", False), ("npz, packed", True)):
        folder = place / name
        folder.mkdir()
        path = runs.make_data(folder, packed=packed)
        config = TrainConfig(dataset=str(path), val_split=0.0)
        found[name] = Reader(path, lambda c=config: _loaded(c))
    csv = place / "table.csv"
    rows = (f"{i % 7},{i % 5}.25,{'xyz'[i % 3]},{'ab'[i % 2]}" for i in range(80))
    csv.write_text("first,second,word,kind\n" + "\n".join(rows) + "\n")
    found["csv"] = Reader(csv, lambda: _loaded(_table(csv)), may_differ=True)
    import pandas

    parquet = place / "table.parquet"
    try:
        pandas.read_csv(csv).to_parquet(parquet)
        found["parquet"] = Reader(parquet, lambda: _loaded(_table(parquet)), may_differ=True)
    except ImportError:
        pass
    for name, packed in (("idx", False), ("idx, gz", True)):
        path = _idx(place / name, packed)
        config = TrainConfig(dataset="fashion_mnist", data_dir=path.parent, val_split=0.0)
        found[name] = Reader(path, lambda c=config: _loaded(c), may_differ=not packed)
    runs.make_data(place)
    child.run(lambda: runs.command(place, f"{runs.TRAIN} --epochs 2 --out run"), place, child.HANGS)
    run = place / "run"
    found["checkpoint.pt"] = Reader(run / "checkpoint.pt", lambda: run_folder.load_checkpoint(run))
    model = run / "model.safetensors"
    found["safetensors"] = Reader(
        model, lambda: [inference.load(run).model.state_dict(), inference._weights(run)[1]]
    )
    for name in ("config.json", "summary.json", "metrics.csv"):
        folder = place / f"of {name}"
        shutil.copytree(run, folder)
        if name == "metrics.csv":
            (folder / "summary.json").unlink()  # then it is looked at
        read = lambda f=folder: str(compare.table([f]).columns)  # noqa: E731
        found[name] = Reader(folder / name, read, may_differ=True)
    png = place / "picture.png"
    noise = bytes(random.Random(0).randrange(256) for _ in range(20 * 20))
    Image.frombytes("L", (20, 20), noise).save(png)
    trained = inference.load(run)
    found["png"] = Reader(png, lambda: inference.read_images(trained, [png])[0], may_differ=True)
    found["tune table"] = Reader(_measurements(place), _choice, may_differ=True)
    return found


def _measurements(place: Path) -> Path:
    """A table of what was measured on this machine, of calls like that of _choice."""
    os.environ["XDG_CACHE_HOME"] = str(place)
    keys = [measured.call_key(torch.float32, 33, 20, [(1, True, 17)], g) for g in (True, False)]
    for key in keys:
        row = {"times": {"eager": 9.0, "native": 3.5}, "wrong": {}}
        measured.keep("cpu", "calls", key, row)
    measured.keep_all("cpu", "classes", {"one": {"ratios": {"native": [1.0, 1.25]}}})
    return measured.path()


def _choice() -> torch.Tensor:
    """A call whose backend the table chooses: never an error, and the right values."""
    measured.forget()
    x, w = torch.linspace(-1, 1, 33 * 20).view(33, 20), torch.linspace(-1, 1, 17 * 20).view(17, 20)
    y = linear_act(x, w, None, "relu", p=0.5, seed=1)
    wanted = linear_act(x, w, None, "relu", p=0.5, seed=1, backend="reference")
    if not torch.allclose(y, wanted, atol=1e-5):
        raise AssertionError("wrong values")
    return y


def _spoilt(content: bytes, dice: random.Random) -> tuple[str, bytes]:
    if dice.random() < 0.25:
        length = dice.randrange(len(content))
        return f"cut off at {length}", content[:length]
    # Headers stand at the beginning and indexes at the end: there a bit does the most harm.
    size = len(content)
    first, last = dice.choice([(0, size), (0, min(size, 256)), (max(0, size - 2048), size)])
    at, bit = dice.randrange(first, last), dice.randrange(8)
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return f"bit {bit} of byte {at} turned", bytes(changed)


def files(place: Path, dice: random.Random, count: int) -> Iterator[str | None]:
    """Every kind of file but the extension."""
    made = readers(place)
    wanted = {name: child.run(reader.read, place).result for name, reader in made.items()}
    if absent := [name for name, found in wanted.items() if found is None]:
        raise RuntimeError(f"faults: whole files could not be read: {', '.join(absent)}")
    for _ in range(max(1, count // len(made))):
        for name, reader in made.items():
            content = reader.path.read_bytes()
            how, spoilt = _spoilt(content, dice)
            reader.path.write_bytes(spoilt)
            yield _wrong(f"{name}, {how}", reader, place, wanted[name])
            reader.path.write_bytes(content)


def _wrong(which: str, reader: Reader, place: Path, wanted) -> str | None:
    def work():
        try:
            found = reader.read()
        except (TrainError, UsageError) as error:
            return "named" if reader.path.name in str(error) else f"not named: {error}"
        return "same" if runs.equal(found, wanted) else "other"

    ended = child.run(work, place, child.HANGS, ROOM)
    wrong = ended.crash() or ended.error
    if not wrong and ended.grew > MEMORY:
        wrong = f"it took {ended.grew >> 20} MB"
    if not wrong and ended.result not in ("named", "same"):
        is_other = ended.result == "other"
        wrong = None if is_other and reader.may_differ else ended.result
    return wrong and f"{which}: {wrong}"


def extension(place: Path, dice: random.Random, count: int) -> Iterator[str | None]:
    """The extension: it is passed over with a reason, and the values are right."""
    content = native.library("cpu").read_bytes()
    (place / "_build_info.json").write_text(json.dumps({"crc32": {"cpu": zlib.crc32(content)}}))

    def work():
        native._FOLDER = place
        reason = native.unavailable("cpu")  # opens it, for the first time in this process
        return reason, bool(_choice().isfinite().all())

    os.environ["FUSEDMLP_AUTOTUNE"] = "0"
    for _ in range(count):
        how, spoilt = _spoilt(content, dice)
        (place / "_native_cpu.so").write_bytes(spoilt)
        ended = child.run(work, place)
        wrong = ended.crash() or ended.error
        if not wrong and "rebuild with" not in str(ended.result[0]):
            wrong = f"it was taken: {ended.result[0]}"
        yield wrong and f"{how}: {wrong}"
