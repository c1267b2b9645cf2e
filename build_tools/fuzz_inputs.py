"""What build_tools/fuzz.py feeds to whom: the readers with their first inputs, and how an input
becomes another one."""

import contextlib
import copy
import gzip
import io
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
VALUES = (None, True, False, 0, -1, 1, 3, 2**63, 2**70, 0.5, -0.0, 1e308, "", "a", "\0", "é" * 9)
VALUES += ([], {}, [None], [[]], {"a": 1}, [0] * 50, float("nan"), float("inf"), "a" * 3000)
PART = b"\0--part--\0"  # between the members of an input that becomes an archive


@dataclass(frozen=True)
class Reader:
    """seeds(folder) are first inputs; write(folder, content) puts one there and returns what
    read(path) reads, which returns None or what is wrong."""

    seeds: Callable[[Path], list[bytes]]
    write: Callable[[Path, bytes], Path]
    read: Callable[[Path], str | None]
    words: tuple[bytes, ...] = ()
    is_json: bool = False
    names_file: bool = True


# --- changes --------------------------------------------------------------------------------------


def changed(pick: random.Random, content: bytes, pool: list[bytes], reader: Reader) -> bytes:
    for _ in range(pick.choice((1, 1, 2, 3, 6))):
        if reader.is_json and pick.random() < 0.8:
            content = _json_changed(pick, content)
        else:
            content = _bytes_changed(pick, content, pool, reader.words)
    return content


def _bytes_changed(pick, content: bytes, pool, words) -> bytes:
    at = pick.randrange(len(content) + 1)
    size = min(pick.choice((1, 1, 2, 4, 8, 32, 256)), len(content) - at)
    kind = pick.randrange(1, 9) if words else pick.randrange(1, 7)
    kind = kind if at < len(content) else 1
    before, there, after = content[:at], content[at : at + size], content[at + size :]
    if kind == 1 and after and pick.random() < 0.5:
        return before + bytes([content[at] ^ 1 << pick.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return before + pick.randbytes(max(size, 1)) + after
    if kind == 2:
        return before + after
    if kind == 3:
        return before + there * pick.choice((2, 3, 50)) + after
    if kind == 4:
        number, width = pick.choice(NUMBERS), pick.choice((1, 2, 4, 8))
        order = pick.choice(("little", "big"))
        return before + (number % 256**width).to_bytes(width, order) + content[at + width :]
    if kind == 5:
        return before if pick.random() < 0.3 else content[:at] + pick.choice(pool)[at:]
    if kind == 6:
        other = pick.choice(pool)
        start = pick.randrange(len(other) + 1)
        return before + other[start : start + 64] + after
    return before + pick.choice(words) + (after if kind == 7 else content[at:])


def _json_changed(pick, content: bytes) -> bytes:
    """A value, a name or an element changed, where it is JSON."""
    try:
        root = json.loads(content)
    except ValueError:
        return content
    places = list(_places(root))
    if not places:
        return json.dumps(pick.choice(VALUES)).encode()
    owner, name = pick.choice(places)
    kind = pick.randrange(6)
    if kind == 0:
        del owner[name]
    elif kind == 1 and isinstance(owner, dict):
        owner[pick.choice(("", "a", "kind", "é"))] = owner.pop(name)
    elif kind == 2:
        other, its = pick.choice(places)
        owner[name] = copy.deepcopy(other[its])
    elif kind == 3 and isinstance(owner[name], int | float):
        owner[name] = owner[name] * pick.choice((-1, 0, 2, 10**9)) + pick.choice((-1, 0, 1))
    elif kind == 4 and isinstance(owner[name], list) and owner[name]:
        owner[name] = owner[name] + [pick.choice(owner[name])]
    else:
        owner[name] = pick.choice(VALUES)
    return json.dumps(root).encode()


def _places(value):
    if isinstance(value, dict | list):
        for name in value if isinstance(value, dict) else range(len(value)):
            yield value, name
            yield from _places(value[name])


# --- data files -----------------------------------------------------------------------------------


def _file(name: str):
    def write(folder: Path, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _load(path: Path) -> None:
    from fusedmlp.train import TrainConfig
    from fusedmlp.train.data import datasets

    datasets.load(TrainConfig(dataset=str(path)))


CSV = (
    b"size,colour,day,new,kind\n"
    + b"".join(b"%d.5,red,2020-01-%02d,True,a\n,blue,2021-02-%02d,False,b\n" % (i, i, i)
               for i in range(1, 12)),
    b"a;b\n1,5;x\n2,5;y\n3;x\n",
    b"a b c\n1 2 0.5\n3 4 0.25\n7 8 1\n",
    "\ufeffh\u00f6he\tart\n1\t\u00e4\n2\t\u00fc\n3\t\u00e4\n".encode(),
    "a,b\n1,x\n2,y\n".encode("utf-16"),
    b'a,"b\nc",d\n1,"x, y",2\n3,"z",4\n',
)  # fmt: skip
CSV_WORDS = tuple(
    word.encode("latin-1")
    for word in (
        *(",", ";", "\t", "|", " ", "\n", "\r\n", "\r", '"', '""', "'", "\0", "NA", "nan", "None"),
        *("inf", "-inf", "1e999", "1e-999", "-0", "0x10", "1_000", "1,000.5", "9" * 40, "\xe9"),
        *("2020-01-01", "2020-13-01", "12:30", "99999-01-01", "2020-01-01T00:00:00Z", "True"),
        *("false", "yes", "\xef\xbb\xbf", "\xff\xfe", "a" * 5000, "id", "#", "=1+1", "\x1a"),
    )
)


def _parquet(_: Path) -> list[bytes]:
    import numpy as np
    import pandas as pd

    found = []
    days = pd.date_range("2020-01-01", periods=20)
    frames = [
        pd.DataFrame({"a": np.arange(20.0), "b": ["x", None] * 10, "day": days, "y": [0, 1] * 10}),
        pd.DataFrame({"a": pd.Categorical(["x", "y"] * 10), "y": np.arange(20) * 0.5}),
    ]
    for frame in frames:
        for compression in (None, "snappy"):
            out = io.BytesIO()
            frame.to_parquet(out, index=False, compression=compression)
            found.append(out.getvalue())
    return found


def _npz_seeds(_: Path) -> list[bytes]:
    """The members of an archive, whose checksums are made right when it is written."""
    import numpy as np

    def members(*arrays) -> bytes:
        made = []
        for array in arrays:
            out = io.BytesIO()
            np.save(out, array)
            made.append(out.getvalue())
        return PART.join(made)

    x = np.random.default_rng(0).normal(size=(12, 3))
    numbers, words = np.arange(12) % 3, np.array(["a", "b"] * 6)
    images = np.arange(12 * 16, dtype=np.uint8).reshape(12, 4, 4)
    return [
        members(x, numbers),
        members(x.astype(np.float16), words, x[:4].astype(np.float16), words[:4]),
        members(images, numbers.astype(np.uint8), images, numbers.astype(np.uint8)),
        members(x, x[:, 0], x, x[:, 0]),
        members(np.asfortranarray(x), words.astype("S2")),
    ]


def _write_npz(folder: Path, content: bytes) -> Path:
    import zipfile

    path = folder / "data.npz"
    names = ("x_train", "y_train", "x_test", "y_test", "more")
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in zip(names, content.split(PART), strict=False):
            archive.writestr(f"{name}.npy", member)
    return path


def _npz_whole(folder: Path) -> list[bytes]:
    return [_write_npz(folder, seed).read_bytes() for seed in _npz_seeds(folder)]


def _idx(folder: Path) -> list[bytes]:
    """Images and labels of the training rows in one input; the test rows are right ones."""

    def idx(values: bytes, *sizes: int) -> bytes:
        head = [0x800 + len(sizes), *sizes]
        return b"".join(n.to_bytes(4, "big") for n in head) + values

    labels = idx(bytes(range(10)), 10)
    images = idx(bytes(i % 256 for i in range(10 * 16)), 10, 4, 4)
    for name, content in (("images-idx3", images), ("labels-idx1", labels)):
        (folder / f"t10k-{name}-ubyte").write_bytes(content)
    return [PART.join((images, labels)), PART.join((idx(b"", 0, 4, 4), idx(b"", 0)))]


def _write_idx(folder: Path, content: bytes) -> Path:
    images, _, labels = content.partition(PART)
    (folder / "train-images-idx3-ubyte").write_bytes(images)
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)
    return folder


def _write_gz(folder: Path, content: bytes) -> Path:
    images, _, labels = content.partition(PART)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(images)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(labels)
    return folder


def _gz(folder: Path) -> list[bytes]:
    return [PART.join(gzip.compress(p, 9, mtime=0) for p in s.split(PART)) for s in _idx(folder)]


def _load_images(folder: Path) -> None:
    from fusedmlp.train.data import images

    images.load_images("fashion_mnist", folder)


def _pictures(_: Path) -> list[bytes]:
    from PIL import Image

    found = []
    for kind, mode in (("PNG", "RGBA"), ("PNG", "P"), ("BMP", "RGB"), ("GIF", "P"), ("PNG", "I;16"),
                       ("TIFF", "F"), ("JPEG", "L"), ("PPM", "RGB"), ("WEBP", "RGB")):  # fmt: skip
        out = io.BytesIO()
        with contextlib.suppress(OSError, KeyError):
            Image.new(mode, (9, 7)).save(out, kind)
            found.append(out.getvalue())
    return found


def _write_picture(folder: Path, content: bytes) -> Path:
    """The checksums of a png made right, so that what they guard is read."""
    if content.startswith(b"\x89PNG"):
        fixed, at = [content[:8]], 8
        while at + 12 <= len(content):
            size = int.from_bytes(content[at : at + 4], "big")
            chunk = content[at + 4 : at + 8 + size]
            fixed += [content[at : at + 4], chunk, zlib.crc32(chunk).to_bytes(4, "big")]
            at += 12 + size
        content = b"".join(fixed)
    return _file("picture")(folder, content)


def _read_picture(path: Path) -> None:
    from fusedmlp.train import inference

    about = {"data": {"name": "images", "scaling": {"divisor": 255.0}}}
    run = SimpleNamespace(image_shape=(8, 8), about=about, folder=path.parent)
    inference.read_images(run, [path])


# --- run folders ----------------------------------------------------------------------------------


def _run(folder: Path) -> Path:
    """A run folder of a table with every kind of column: a copy of one that is trained once."""
    run, first = folder / "run", folder.parent / "trained"
    if not first.exists():
        from fusedmlp.train import TrainConfig, loop
        from fusedmlp.train.config import RunOptions

        table = _file("table.csv")(folder.parent, CSV[0])
        config = TrainConfig(dataset=str(table), hidden=(4,), epochs=1, device="cpu")
        with contextlib.redirect_stdout(None):
            loop.run(config, RunOptions(out=first))
    if not run.exists():
        shutil.copytree(first, run)
        shutil.copy(folder.parent / "table.csv", folder)
    return run


def _of_run(name: str, *more: str):
    return lambda folder: [(_run(folder) / n).read_bytes() for n in (name, *more)]


def _in_run(name: str):
    """Writes a file of a run folder, beside the right ones."""

    def write(folder: Path, content: bytes) -> Path:
        (folder / "run" / name).write_bytes(content)
        return folder / "run"

    return write


def _load_weights(folder: Path) -> None:
    from fusedmlp.train import inference

    inference.load(folder)


def _abouts(folder: Path) -> list[bytes]:
    from safetensors import safe_open

    with safe_open(_run(folder) / "model.safetensors", framework="pt") as file:
        return [file.metadata()["fusedmlp"].encode()]


def _write_about(folder: Path, content: bytes) -> Path:
    """The weights of the run, with other words about them."""
    from safetensors.torch import load_file, save_file

    right = folder / "right.safetensors"
    target = _run(folder) / "model.safetensors"
    if not right.exists():
        right.write_bytes(target.read_bytes())
    text = content.decode(errors="replace")
    save_file(load_file(right), target, metadata={"format": "pt", "fusedmlp": text})
    return folder / "run"


def _predict_with(folder: Path) -> None:
    import pandas as pd

    from fusedmlp.train import inference

    run = inference.load(folder)
    run.predict(pd.read_csv(folder.parent / "table.csv"))


def _checkpoints(folder: Path) -> list[bytes]:
    """Of a run that is not finished; a finished one keeps none."""
    import torch

    from fusedmlp.train import run_folder

    content = {"model": {"0.weight": torch.ones(2, 2)}, "config": {"epochs": 3}, "epoch": 1}
    run_folder.save_checkpoint(_run(folder) / "checkpoint.pt", content)
    return [(_run(folder) / "checkpoint.pt").read_bytes()]


def _checkpoint(folder: Path) -> None:
    from fusedmlp.train import run_folder

    run_folder.load_checkpoint(folder)


def _compare(folder: Path) -> None:
    from fusedmlp.train import compare

    compare.table([folder])


def _unfinished(folder: Path) -> list[bytes]:
    (_run(folder) / "summary.json").unlink(missing_ok=True)
    return [(_run(folder) / "metrics.csv").read_bytes()]


# --- the table of measured choices, and the command line ------------------------------------------


def _measured(_: Path) -> list[bytes]:
    from fusedmlp.backends import measured

    times = {"eager": 10.0, "native": 5.0, "reference": 12.5}
    calls = {"fp32 step, 256 x 16, 16 relu dropout": {"times": times, "wrong": {"triton": "no"}}}
    entry = {"versions": measured.versions("cpu"), "calls": calls, "tiles": {"a": [16, 16, 16]}}
    entry["classes"] = {"fp32 step, relu": {"ratios": {"native": [1.5, 2.0]}}}
    return [json.dumps({measured.kind("cpu"): entry}).encode(), measured.SHIPPED.read_bytes()]


def _write_measured(folder: Path, content: bytes) -> Path:
    os.environ["XDG_CACHE_HOME"] = str(folder)
    (folder / "fusedmlp").mkdir(exist_ok=True)
    return _file("fusedmlp/measured.json")(folder, content)


def _choose(path: Path) -> None:
    """A file that cannot be used is told in a warning, and the call runs."""
    import torch

    from fusedmlp import functional
    from fusedmlp.backends import measured

    measured.forget()
    functional.linear_act(torch.ones(256, 16), torch.ones(16, 16), None, "relu")


FLAGS = (
    *("--dataset", "--hidden", "--epochs", "--batch-size", "--lr", "--optimizer", "--momentum"),
    *("--loss", "--dropout", "--activation", "--val-split", "--patience", "--networks", "--seed"),
    *("--target", "--leave-out", "--weight-column", "--class-weight", "--standardize", "--keep"),
    *("--no-standardize", "--weight-decay", "--label-smoothing", "--precision", "--device"),
    *("--engine", "--backend", "--time-limit", "--warmup-epochs", "--clip-norm", "--init-std"),
    *("--out", "--overwrite", "--resume", "--log", "--data-dir", "--preset", "--folds", "--init"),
    *("--proba", "--images", "--invert", "--rows", "--debug=x", "--schedule", "--help", "--"),
)
OPERANDS = (
    *("train", "crossval", "compare", "evaluate", "predict", "info", "--version", "help", ""),
    *("0", "1", "-1", "0.5", "nan", "inf", "-inf", "1e400", "9" * 30, "None", "True", "/", "relu"),
    *("adam", "sgd", "mse", "cross_entropy", "cpu", "table.csv", "run", "none.csv", ".", "..", "x"),
    *("kind", "size", "auto", "digits", "native", "\udcff", "é", "=", "--=", "a b", "best", "bf16"),
)


def _lines(folder: Path) -> list[bytes]:
    _run(folder)
    lines = (
        *("train --dataset table.csv --hidden 4 4 --epochs 1 --out new --overwrite",),
        *("crossval --dataset table.csv --hidden 4 / 8 --lr 0.1 0.5 --folds 2",),
        *("predict run table.csv --proba", "evaluate run table.csv", "compare run run", "info"),
        *("train --resume run", "predict run --rows 2 --images table.csv", "--version"),
    )
    return [line.replace(" ", "\n").encode() for line in lines]


def _write_line(folder: Path, content: bytes) -> Path:
    return _file("line")(folder, content)


def _command(path: Path) -> str | None:
    """Runs in the folder; nothing is trained, which is what would follow right words."""
    from fusedmlp import cli
    from fusedmlp.train import crossvalidation, loop

    words = path.read_bytes().decode("utf-8", "surrogateescape").replace("\0", "").split("\n")
    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    loop.run = lambda *_, **__: SimpleNamespace(interrupted=False)
    crossvalidation.crossval = lambda *_, **__: None
    os.chdir(path.parent)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([word for word in words if word != "verify" and word != "tune"])
        except SystemExit as ended:
            code = ended.code
    said = [s.flush() or s.buffer.getvalue().decode(errors="replace") for s in (out, err)]
    if "--debug shows where" in said[1]:
        return f"cli.py: {said[1].strip()}"
    if code not in (0, 1, 2):
        return f"cli.py: exit code {code}"
    if code and not (said[0] + said[1]).strip():
        return f"cli.py: exit code {code} without a word"
    return None


_WORDS = tuple(f"\n{word}".encode("utf-8", "surrogateescape") for word in (*FLAGS, *OPERANDS))
_JSON = dict(is_json=True)
READERS = {
    "csv": Reader(lambda _: list(CSV), _file("data.csv"), _load, CSV_WORDS),
    "npz members": Reader(_npz_seeds, _write_npz, _load, (PART, b"<f8", b"|O", b"(3,)", b"True")),
    "npz": Reader(_npz_whole, _file("data.npz"), _load),
    "parquet": Reader(_parquet, _file("data.parquet"), _load),
    "idx": Reader(_idx, _write_idx, _load_images),
    "idx gz": Reader(_gz, _write_gz, _load_images),
    "pictures": Reader(_pictures, _write_picture, _read_picture),
    "config.json": Reader(_of_run("config.json"), _in_run("config.json"), _load_weights, **_JSON),
    "model.safetensors": Reader(
        _of_run("model.safetensors"), _in_run("model.safetensors"), _load_weights
    ),
    "about a model": Reader(_abouts, _write_about, _predict_with, **_JSON),
    "checkpoint.pt": Reader(_checkpoints, _in_run("checkpoint.pt"), _checkpoint),
    "summary.json": Reader(_of_run("summary.json"), _in_run("summary.json"), _compare, **_JSON),
    "metrics.csv": Reader(_unfinished, _in_run("metrics.csv"), _compare, CSV_WORDS),
    "measured.json": Reader(_measured, _write_measured, _choose, **_JSON),
    "command line": Reader(_lines, _write_line, _command, _WORDS, names_file=False),
}
