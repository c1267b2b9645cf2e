"""Files that are damaged or hostile, two runs in one folder, runs cut off at their end: an error
that names it, or the same bits. bench/faults injects these by chance, and in bulk."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import random
import re
import resource
import signal
import struct
import threading
import zipfile
import zlib

import numpy as np
import pytest
import torch
from torch.utils.serialization import config as saving

from fusedmlp import cli
from fusedmlp.backends import measured
from fusedmlp.train import RunOptions, TrainConfig, TrainError, fit, inference, run_folder
from fusedmlp.train.data import datasets, packed, tables

from .. import made_data
from .test_train import config, network

made_data.need(*made_data.TRAIN_EXTRA)


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run on images."""
    net = network(sizes=(64, 16, 4))
    fit(net, made_data.pictures(), config(epochs=1), RunOptions(out=tmp_path / "run"))
    return tmp_path / "run"


# turned bits


def _equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors"])
def test_a_turned_bit_is_an_error_or_the_same_weights(run, name):
    """torch.load does not look at the checksums of its archives, and safetensors has none: one bit
    in seven turned a network into another without a word."""

    def load():
        if name == "checkpoint.pt":
            return run_folder.load_checkpoint(run)
        return [inference.load(run).model.state_dict(), inference.load(run).about]

    whole, dice, named = load(), random.Random(0), 0
    content = (run / name).read_bytes()
    for _ in range(150):
        changed = bytearray(content)
        changed[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        (run / name).write_bytes(changed)
        try:
            assert _equal(load(), whole)
        except TrainError as error:
            assert f"{run / name} is truncated, corrupted or no" in str(error)
            named += 1
    assert named > 100


def test_a_turned_bit_in_the_index_of_a_checkpoint_is_an_error_or_the_same_weights(run):
    """The index of an archive has no checksum, and one bit of each entry calls a tensor a folder:
    torch.load then gave whatever the memory held."""
    path = run / "checkpoint.pt"
    whole, content = run_folder.load_checkpoint(run), path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = [m.start() for m in re.finditer(b"PK\1\2", content[archive.start_dir :])]
        place, count = archive.start_dir, len(archive.infolist())
    assert len(entries) == count
    folders, named = 0, 0
    for at in range(place, place + entries[4]):  # four of them
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            try:
                assert _equal(run_folder.load_checkpoint(run), whole), f"byte {at}, bit {bit}"
            except TrainError as error:
                folders += "is marked as a folder" in str(error)
                named += 1
    assert folders == 4
    assert named > 500


def test_a_turned_bit_that_takes_a_column_from_an_array_of_npz_is_an_error(tmp_path):
    """NumPy looks at a checksum at the end of what it reads only, and then ends earlier."""
    path = tmp_path / "data.npz"
    np.savez(path, x_train=np.ones((900, 3)), y_train=np.arange(900) % 2)
    assert path.read_bytes().count(b"(900, 3)") == 1
    path.write_bytes(path.read_bytes().replace(b"(900, 3)", b"(900, 2)"))
    with pytest.raises(TrainError, match="data.npz is truncated, .*CRC-32 for file 'x_train.npy'"):
        tables.read_npz(str(path))


def test_a_turned_bit_that_hides_members_of_npz_is_an_error(tmp_path):
    """The length of a comment in the index reaches over the members that follow: the rows for
    testing were gone."""
    path = tmp_path / "data.npz"
    x, y = np.ones((8, 3)), np.arange(8) % 2
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2", 0, content.rindex(b"x_test.npy") - 46)
    content[at + 33] ^= 1  # 256 of the comment's length
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["x_train.npy", "y_train.npy"]
    with pytest.raises(TrainError, match="data.npz is truncated, .*its index has 2 members of 4"):
        tables.read_npz(str(path))


def test_checksums_are_written_whatever_torch_is_told(tmp_path):
    with saving.patch("save.compute_crc32", False):
        run_folder.save_checkpoint(tmp_path / "checkpoint.pt", {"model": {}})
    assert run_folder.load_checkpoint(tmp_path)["model"] == {}


def test_a_class_named_like_the_checksum_harms_nothing(run):
    about = inference.load(run).about
    about["data"]["classes"] = ['"crc32": "00000000"', "00000000", "c", "d"]
    net = inference.load(run).model
    (run / "model.safetensors").write_bytes(run_folder.model_bytes(net, about))
    assert inference.load(run).classes == about["data"]["classes"]


# hostile files


@pytest.mark.parametrize(
    "changed", [{"dims": [1 << 40, 1 << 40]}, {"dims": [2] * 100_000}, {"networks": 1 << 40}]
)
def test_a_network_that_is_not_in_the_file_takes_no_memory(run, changed):
    trained = inference.load(run)
    about = trained.about | {"model": trained.about["model"] | changed}
    (run / "model.safetensors").write_bytes(run_folder.model_bytes(trained.model, about))
    with pytest.raises(TrainError, match=f"{run}.*(damaged|belongs to another model)"):
        inference.load(run)


def _checkpoint_with(pickle: bytes) -> bytes:
    made, changed = io.BytesIO(), io.BytesIO()
    torch.save({"format": 1}, made)
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickle if name.endswith("data.pkl") else old.read(name))
    return changed.getvalue()


def test_a_checkpoint_takes_no_memory_beyond_its_size(tmp_path):
    path = tmp_path / "checkpoint.pt"
    call = b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R"
    path.write_bytes(_checkpoint_with(b"\x80\x02}X\x06\x00\x00\x00format" + call + b"s."))
    with pytest.raises(TrainError, match="checkpoint.pt is .*it makes a bytearray"):
        run_folder.load_checkpoint(tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(TrainError, match="its records are longer than the file"):
        run_folder.load_checkpoint(tmp_path)


def _npy(shape: tuple[int, ...], content: bytes) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


def test_packed_data_take_no_memory_out_of_proportion(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_ANYWAY", 1 << 16)
    file = tmp_path / "zeros.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x_train.npy", "y_train.npy"):
            archive.writestr(name, _npy((1 << 20, 1), bytes(1 << 20)))
    told = "must not unpack to more than 100 times its [0-9,]+ bytes, got .*without packing"
    with pytest.raises(TrainError, match=f"zeros.npz: x_train {told}"):
        tables.read_npz(str(file))
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("x_train.npy", "y_train.npy"):
            archive.writestr(name, _npy((1 << 50, 1), b"1"))
    with pytest.raises(TrainError, match="zeros.npz is truncated, corrupted or no .npz file"):
        tables.read_npz(str(file))
    folder = made_data.write_idx(tmp_path / "idx")
    name = "train-images-idx3-ubyte.gz"
    (folder / name).write_bytes(gzip.compress(bytes(1 << 20)))
    flags = ("--dataset", "fashion_mnist", "--data-dir", folder)
    assert made_data.command("train", *flags) == 1
    with pytest.raises(TrainError, match=f"{name} {told}"):
        from fusedmlp.train.data import images

        images.load_images("fashion_mnist", folder)


def test_a_row_that_is_far_too_long_takes_no_memory_out_of_proportion(tmp_path):
    """pandas made a column of each of its cells: 2 MB of commas took 2.8 GB and a minute."""
    file = tmp_path / "commas.csv"
    file.write_text("a,b\n1,2\n" + "," * 300_000 + "\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TrainError, match="commas.csv, line 3: a row must have 2 values as the"):
        datasets.read(TrainConfig(dataset=str(file), target="a"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_long_cells_are_text_as_others_are(tmp_path):
    file = tmp_path / "long.csv"
    file.write_text("a,b\n" + "".join(f"{i % 3}.5,{'xy'[i % 2] * 200_000}\n" for i in range(20)))
    assert datasets.read(TrainConfig(dataset=str(file), target="b")).classes


def _png(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + head + rows + chunk(b"IEND", b"")


def test_pictures_run_no_program_and_have_a_largest_size(run, recwarn):
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    trained, file = inference.load(run), run / "picture.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(TrainError, match="picture.png is .*no image .cannot identify"):
        inference.read_images(trained, [file])
    file.write_bytes(_png(9000, 10_000))
    with pytest.raises(TrainError, match="picture.png is .*9000 x 10000 are too many pixels"):
        inference.read_images(trained, [file])
    assert not recwarn.list


# two runs in one folder


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    """A second run used to remove the files of the first with --overwrite, and to go on beside it
    with --resume."""
    data, seen = made_data.blobs(), []

    class Second:
        def __init__(self, **options):
            self.options = RunOptions(**options)

        def start(self):
            try:
                fit(network(), data, config(epochs=9), self.options)
            except TrainError as error:
                seen.append(str(error))

    def others(module, inputs):
        if module.training and not seen and (tmp_path / "run" / "checkpoint.pt").exists():
            Second(resume=tmp_path / "run").start()
            Second(out=tmp_path / "run", overwrite=True).start()

    alone = fit(network(), data, config(epochs=3, engine="autograd"))
    net = network()
    net.register_forward_pre_hook(others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusedmlp.train.loop.SAVE_SECONDS", 0.0)
        first = fit(net, data, config(epochs=3), RunOptions(out=tmp_path / "run"))
    told = f"another run is at work in {tmp_path / 'run'}; wait for its end, or name another"
    assert len(seen) == 2 and all(text.startswith(told) for text in seen)
    for name, value in alone.model.state_dict().items():
        assert torch.equal(first.model.state_dict()[name], value)
    assert fit(network(), data, config(epochs=4), RunOptions(resume=tmp_path / "run")).paths


@pytest.mark.parametrize("out", ["run", None], ids=["named", "numbered"])
def test_a_folder_is_free_again_after_a_run_that_failed(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    options, before = RunOptions(out=out, overwrite=out is not None), set(run_folder._locks)
    for _ in range(2):
        with pytest.raises(TrainError, match="no longer finite"):
            fit(network(), made_data.blobs(), config(lr=1e30), options)
    assert set(run_folder._locks) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    """As the workers of a DataLoader, which live on."""
    folder = run_folder.create_folder(RunOptions(out=tmp_path / "run"), TrainConfig())
    child = os.fork()
    if not child:
        signal.pause()
    try:
        folder.release()
        run_folder.reopen_folder(tmp_path / "run").release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ends


@pytest.mark.parametrize("lacking", ["confusion.png", "predictions.png", "summary.json"])
def test_what_a_run_had_no_time_for_comes_with_resume(run, lacking):
    (run / lacking).unlink()
    net = network(sizes=(64, 16, 4))
    result = fit(net, made_data.pictures(), config(epochs=1), RunOptions(resume=run))
    assert lacking in result.paths and len(result.history) == 1


@pytest.mark.parametrize("lost", ["summary.json", "curves.png"])
def test_results_of_before_do_not_stand_for_those_of_a_run_that_went_on(run, lost, monkeypatch):
    """Where the disk was full at the end, the old summary once made resume refuse to write a new
    one."""
    replace, options, net = os.replace, RunOptions(resume=run), network(sizes=(64, 16, 4))

    def full(source, target):
        if target.name == lost:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        if lost == "summary.json":
            with pytest.raises(TrainError, match="its checkpoint of epoch 2 is kept"):
                fit(net, made_data.pictures(), config(epochs=2), options)
        else:
            fit(net, made_data.pictures(), config(epochs=2), options)
    result = fit(network(sizes=(64, 16, 4)), made_data.pictures(), config(epochs=2), options)
    assert lost in result.paths
    assert json.loads((run / "summary.json").read_text())["epochs"] == 2


def test_sigterm_ends_any_command_with_a_message(monkeypatch, capsys):
    def slow(argv):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(30)

    monkeypatch.setattr("fusedmlp.commands.info.verify_command", slow)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["verify"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "fusedmlp: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_measurements_that_cannot_be_kept_leave_those_of_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    row = {"times": {"eager": 1.0}, "wrong": {}}
    measured.keep("cpu", "calls", "one", row)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def measure(count, seed):
        measured.keep("cpu", "calls", "two", row)

    monkeypatch.setattr("fusedmlp.commands.tune._measure_classes", measure)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli.main(["tune", "--device", "cpu"]) == 1
    told = f"fusedmlp: tune: cannot write {measured.path()}: No space left on device\n"
    assert capsys.readouterr().err == told
    assert [file.name for file in measured.path().parent.iterdir()] == ["measured.json"]
    measured.forget()
    assert list(measured.own("cpu")["calls"]) == ["one"]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "null", "\x00"], ids=["deep", "list", "null", "zero"]
)
def test_what_is_no_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TrainError, match="config.json is truncated, corrupted or no config"):
        run_folder.load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TrainConfig().to_dict()))
    assert run_folder.load_config(tmp_path) == TrainConfig()
