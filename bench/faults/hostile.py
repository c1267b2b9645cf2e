"""Files made to run code, or to take far more memory than they have bytes: each must be refused, or
read in little memory."""

import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from fusedmlp.train import TrainConfig, TrainError, UsageError, compare, inference, run_folder
from fusedmlp.train.data import datasets, images

from . import child, runs
from .damage import MEMORY, ROOM

MANY = 1 << 40
RAN = "ran"  # made by code that a file must not run


class Evil:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.place / RAN}",)


def _zip(path: Path, parts: dict[str, bytes], packed: bool = True) -> None:
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def _npy(shape: tuple, kind: str = "|u1", content: bytes = b"") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape!r}, }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


def _png(width: int, height: int, rows: int = 0) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    pixels = zlib.compress(bytes(min(rows * (width + 1), 1 << 27)), 1)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _safetensors(header: dict | bytes, length: int | None = None, content: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def _checkpoint(path: Path, data: bytes) -> None:
    """An archive as torch.save makes it, with another pickle."""
    buffer = io.BytesIO()
    torch.save({"format": 1, "w": torch.zeros(3)}, buffer)
    with zipfile.ZipFile(buffer) as good:
        parts = {name: good.read(name) for name in good.namelist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    _zip(path, parts | {name: data}, packed=False)


def _calls(module: str, name: str, argument: bytes) -> bytes:
    """A pickle of {"format": 1, "model": module.name(argument)}."""
    call = f"c{module}\n{name}\n".encode() + argument + b"\x85R"
    return b"\x80\x02}(X\x06\x00\x00\x00formatK\x01X\x05\x00\x00\x00model" + call + b"u."


def _int(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def cases(place: Path) -> Iterator[tuple[str, Path, Callable[[], object]]]:
    """(what it is, the file, how it is read)."""
    runs.make_data(place)
    child.run(lambda: runs.command(place, f"{runs.TRAIN} --epochs 1 --out run"), place, child.HANGS)
    run, npz = place / "run", place / "bad.npz"
    trained, about = inference.load(run), inference._weights(run)[1]

    def read_npz():
        return datasets.read(TrainConfig(dataset=str(npz), val_split=0.0))

    def model(about: dict | str, **tensors) -> bytes:
        text = about if isinstance(about, str) else json.dumps(about)
        return _safetensors({"__metadata__": {"fusedmlp": text}, **tensors})

    good = {"x_test.npy": _npy((4, 2), "|u1", bytes(8)), "y_test.npy": _npy((4,), "|u1", b"0101")}
    np.savez(npz, x_train=np.array([Evil(place)], dtype=object), y_train=np.arange(1))
    yield "npz with a pickle", npz, read_npz
    npz.write_bytes(pickle.dumps(Evil(place)))
    yield "npz that is a pickle", npz, read_npz
    for shape in ((MANY, 8), (1 << 34,), (1 << 62, 4)):
        _zip(npz, {"x_train.npy": _npy(shape), "y_train.npy": _npy(shape[:1])})
        yield f"npz that claims {shape}", npz, read_npz
    bomb = _npy((1 << 28, 1), "|u1", bytes(1 << 28))
    _zip(npz, {"x_train.npy": bomb, "y_train.npy": bomb, **good})
    yield "npz of zeros", npz, read_npz
    del bomb

    checkpoint = run / "checkpoint.pt"
    load = lambda: run_folder.load_checkpoint(run)  # noqa: E731
    torch.save({"format": 1, "model": Evil(place)}, checkpoint)
    yield "checkpoint with a pickle", checkpoint, load
    checkpoint.write_bytes(pickle.dumps(Evil(place)))
    yield "checkpoint that is a pickle", checkpoint, load
    torch.save(
        {"format": 1, "model": Evil(place)}, checkpoint, _use_new_zipfile_serialization=False
    )
    yield "checkpoint of the old form with a pickle", checkpoint, load
    for size in (1 << 29, 1 << 40):
        _checkpoint(checkpoint, _calls("__builtin__", "bytearray", _int(size)))
        yield f"checkpoint that makes a bytearray of {size:,}", checkpoint, load
        _checkpoint(checkpoint, _calls("torch", "FloatTensor", _int(size >> 2)))
        yield f"checkpoint that makes a tensor of {size:,}", checkpoint, load
    _zip(checkpoint, {"archive/data.pkl": bytes(1 << 28), "archive/version": b"3"})
    yield "checkpoint of packed zeros", checkpoint, load
    _checkpoint(checkpoint, b"\x80\x02" + b"(" * 1_000_000 + b".")
    yield "checkpoint of a million marks", checkpoint, load
    checkpoint.unlink()

    weights = run / "model.safetensors"
    load_model = lambda: inference.load(run)  # noqa: E731
    for length in (MANY, (1 << 63) + 5, 1 << 26):
        weights.write_bytes(_safetensors({}, length))
        yield f"safetensors with a header of {length}", weights, load_model
    huge = {"dtype": "F32", "shape": [MANY, 4], "data_offsets": [0, MANY * 16]}
    weights.write_bytes(model(about, **{"0.weight": huge}))
    yield "safetensors that claims 2^42 numbers", weights, load_model
    for dims in ([1 << 14, 1 << 14, 4], [MANY, MANY], [2] * 1_000_000):
        weights.write_bytes(model(about | {"model": about["model"] | {"dims": dims}}))
        yield f"safetensors of a network of {dims[:3]}", weights, load_model
    weights.write_bytes(model(about | {"model": about["model"] | {"networks": MANY}}))
    yield "safetensors of 2^40 networks", weights, load_model
    weights.write_bytes(model("[" * 100_000))
    yield "safetensors with deep metadata", weights, load_model

    folder = place / "idx"
    folder.mkdir()
    names = [name for _, name, _ in images.FILES]
    config = TrainConfig(dataset="fashion_mnist", data_dir=folder, val_split=0.0)
    for sizes in (((1 << 32) - 1, 28, 28), (1 << 31, 1 << 31, 1 << 31)):
        head = struct.pack(">IIII", 0x803, *sizes)
        for name in names:
            (folder / name).write_bytes(head + bytes(100))
        yield f"idx that claims {sizes}", folder / names[0], lambda: datasets.read(config)
    for name in names:
        (folder / name).unlink()
        (folder / f"{name}.gz").write_bytes(b"")
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    content = packer.compress(struct.pack(">IIII", 0x803, 1 << 19, 32, 32))
    content += b"".join(packer.compress(bytes(1 << 24)) for _ in range(32)) + packer.flush()
    (folder / f"{names[0]}.gz").write_bytes(content)
    yield "idx of packed zeros", folder / f"{names[0]}.gz", lambda: datasets.read(config)

    png = place / "bad.png"
    show = lambda: inference.read_images(trained, [png])  # noqa: E731
    for size in ((1 << 31) - 1, 40_000, 13_000, 9000):
        png.write_bytes(_png(size, size, rows=10))
        yield f"png that claims {size} x {size}", png, show
    png.write_bytes(_png(8000, 8000, rows=8000))
    yield "png of zeros", png, show
    png.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" +
                    f"(%pipe%touch {place / RAN}) (w) file\n".encode())  # fmt: skip
    yield "png that is PostScript", png, show

    csv = place / "bad.csv"
    table = lambda: datasets.read(TrainConfig(dataset=str(csv), target="a", val_split=0.0))  # noqa: E731
    for name, text in {
        "20,000 columns": "a" + "".join(f",c{i}" for i in range(20_000)) + "\n1\n",
        "one cell of 20 MB": "a,b\n1," + "x" * 20_000_000 + "\n",
        "only separators": "a,b\n" + "," * 2_000_000 + "\n",
        "only quotes": 'a,b\n"' + '""' * 1_000_000 + "\n",
        "a formula": "a,b\n=cmd|' /C touch ran'!A0,1\n=1+1,2\n",
        "a number of 2 MB": "a,b\n1," + "9" * 2_000_000 + "\n2,1\n",
    }.items():
        csv.write_text(text)
        yield f"csv: {name}", csv, table

    for name in ("config.json", "summary.json"):
        path = run / name
        before = path.read_text()
        for text in ("[" * 100_000, '{"a":' * 50_000, "[]", "null", '{"epochs": 1e999}', "\x00"):
            path.write_text(text)
            yield f"{name}: {text[:20]!r}", path, lambda: compare.table([run])
        path.write_text(before)


def files(place: Path, dice: random.Random, count: int) -> Iterator[str | None]:
    for name, path, read in cases(place):

        def work(read=read, path=path):
            try:
                read()
            except (TrainError, UsageError) as error:
                is_named = path.name in str(error) or str(path.parent) in str(error)
                return "refused" if is_named else f"refused without its name: {error}"
            return "read"

        ended = child.run(work, place, child.HANGS, ROOM)
        wrong = ended.crash() or ended.error
        if not wrong and ended.result not in ("refused", "read"):
            wrong = ended.result
        packed = path.suffix in (".gz", ".npz")  # twice what it may unpack to
        room = MEMORY + (200 if packed else 8) * path.stat().st_size
        if not wrong and ended.grew > room:
            wrong = f"it took {ended.grew >> 20} MB for {path.stat().st_size:,} bytes"
        if (place / RAN).exists():
            (place / RAN).unlink()
            wrong = "its code was run"
        yield wrong and f"{name}: {wrong[:300]}"
