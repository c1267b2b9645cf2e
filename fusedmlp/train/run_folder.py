"""RunFolder: the files of a run. It is claimed for one run at a time, and an earlier run is never
overwritten unasked.

Every file is written whole or not at all, and those with weights hold a checksum of what they are:
a bit that has turned is an error and not another network. A checkpoint holds no Python objects.
"""

import csv
import errno
import importlib.util
import io
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.serialization import config as saving

from ..whole_file import whole_file
from .config import RunOptions, TrainConfig
from .errors import TrainError, WriteError, first_line

CHECKPOINT_FORMAT = 1
NUMBERED_RUNS = Path("runs")  # holds the folders of runs whose options name none
METRICS = (
    *("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy"),
    *("test_loss", "test_accuracy", "seconds"),
)
# All that a run may write, and all that --overwrite removes.
FILES = (
    *("config.json", "metrics.csv", "model.safetensors", "checkpoint.pt", "summary.json"),
    *("curves.png", "predictions.png", "confusion.png", "roc.png", "reliability.png"),
    *("residuals.png", "importance.csv", "importance.png"),
    *("results.csv", "crossval.png"),
)
_locks: dict[Path, int] = {}  # the folders that this process has, open
EVENT_FILES = "events.out.tfevents."  # how the names of those begin that TensorBoard reads


@dataclass(frozen=True)
class RunFolder:
    """is_new: this run made the folder, and removes it if it fails before its first checkpoint."""

    path: Path
    is_new: bool

    def file(self, name: str) -> Path:
        return self.path / name

    def paths(self) -> dict[str, Path]:
        return {name: self.path / name for name in FILES if (self.path / name).exists()}

    def write(self, name: str, content: bytes | str) -> None:
        write_atomically(self.file(name), content.encode() if isinstance(content, str) else content)

    def write_json(self, name: str, content: dict) -> None:
        self.write(name, json.dumps(content, indent=2) + "\n")

    def write_config(self, config: TrainConfig) -> None:
        """config.json of a run that is complete."""
        self.write("config.json", config_json(config, RunOptions(out=self.path)))

    def write_metrics(self, history: list[dict]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)  # None becomes an empty cell
        self.write("metrics.csv", text.getvalue())

    def write_pictures(
        self, pictures: dict[str, Callable[[], bytes | str]], warn: Callable[[str], None]
    ) -> None:
        """Draw and write {file name: what makes it}; warn, in one line a reason, of those that
        cannot be drawn."""
        failed: dict[str, list[str]] = {}
        for name, picture in pictures.items():
            try:
                self.write(name, picture())
            except Exception as error:  # whatever it is, it costs a picture and not the run
                lines = str(error).strip().splitlines()
                failed.setdefault(lines[0] if lines else type(error).__name__, []).append(name)
        for reason, names in failed.items():
            warn(f"{self.path}: no {', '.join(names)}: {reason}")

    def remove_pictures(self) -> None:
        for name in FILES:
            if name.endswith(".png") or name == "importance.csv":
                self.file(name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what a run left that has no checkpoint to go on from."""
        if self.file("checkpoint.pt").exists():
            return
        _remove_files(self.path)
        if self.is_new:
            try:
                self.path.rmdir()
            except OSError:
                pass

    def release(self) -> None:
        """Let other runs have the folder, in the process that has it."""
        handle = _locks.pop(self.path, None)
        if handle is not None:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_UN)  # a forked child may have it open too
            os.close(handle)


def config_json(config: TrainConfig, options: RunOptions) -> str:
    told = config.to_dict() | RunOptions(out=options.out).to_dict()
    return json.dumps(told, indent=2) + "\n"


def create_folder(options: RunOptions, config: TrainConfig) -> RunFolder:
    """A folder with nothing in it but config.json, which claims it: of two runs that start at the
    same time, one gets it, until it releases it. Without options.out it is the next free number
    under runs/.

    raises  TrainError, also where safetensors is missing, which the end of the run needs
    """
    if importlib.util.find_spec("safetensors") is None:
        raise TrainError(
            "a run folder needs safetensors, which is not installed: pip install 'fusedmlp[train]'"
        )
    try:
        if options.out is None:
            folder = _numbered(NUMBERED_RUNS)
        else:
            folder = _named(Path(options.out), options.overwrite)
        try:
            _claim(folder, config_json(config, options))
        except BaseException:
            folder.release()
            raise
    except OSError as error:
        place = error.filename or options.out or NUMBERED_RUNS
        raise TrainError(
            f"cannot write to {place}: {error.strerror}; name another folder with --out"
        ) from error
    return folder


def reopen_folder(path: Path) -> RunFolder:
    """The folder of a run that goes on; what that run was writing when it was killed is removed."""
    return _take(path, False, _remove_unfinished)


def _take(path: Path, is_new: bool, clear: Callable[[Path], None] | None = None) -> RunFolder:
    """The folder, locked and cleared."""
    folder = RunFolder(path, is_new)
    _lock(path)
    try:
        if clear is not None:
            clear(path)
    except BaseException:
        folder.release()
        raise
    return folder


def _lock(path: Path) -> None:
    """Have the folder until this process ends or releases it, however it ends; a file system
    without locks gives none.

    raises  TrainError where another run has it
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise TrainError(
            f"another run is at work in {path}; wait for its end, or name another folder with --out"
        ) from error
    except OSError:
        os.close(handle)
    else:
        _locks[path] = handle


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
        return _take(path, True)


def _named(path: Path, overwrite: bool) -> RunFolder:
    if path.exists() and not path.is_dir():
        raise TrainError(f"--out must be a folder, but {path} is a file")
    if not path.exists():
        path.mkdir(parents=True)
        return _take(path, True)
    present = [name for name in FILES if (path / name).exists()]
    if present and not overwrite:
        raise TrainError(
            f"{path} already holds a run ({present[0]}); name another --out, replace it with "
            f"--overwrite, or go on with --resume {path}"
        )
    if not present and any(path.iterdir()):
        raise TrainError(f"--out must be new, empty or a run folder, but {path} holds other files")
    if present and not os.access(path, os.W_OK):
        raise TrainError(
            f"cannot write to {path}: permission denied; name another folder with --out"
        )
    return _take(path, False, _remove_files)


def _claim(folder: RunFolder, text: str) -> None:
    path = folder.file("config.json")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise TrainError(
            f"{folder.path} has just been taken by another run; name another --out"
        ) from error
    except OSError:
        folder.discard()
        raise


def _remove_files(path: Path) -> None:
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    for file in path.glob(f"{EVENT_FILES}*"):
        file.unlink(missing_ok=True)
    _remove_unfinished(path)


def _remove_unfinished(path: Path) -> None:
    for name in FILES:
        for file in path.glob(f".{name}-*"):
            file.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write all of content, or leave the file as it was before."""
    try:
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        room = _missing_room(error, path, len(content))
        raise WriteError(f"cannot write {path}: {error.strerror}{room}") from error


def _missing_room(error: OSError, path: Path, size: int) -> str:
    """The room that the file takes, where the error is a want of room."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    text = f"; it takes {size:,} bytes"
    if error.errno == errno.ENOSPC:  # a quota and a largest size are not the disk's
        text += f", and {shutil.disk_usage(path.parent).free:,} are free there"
    return text


def save_checkpoint(path: Path, content: dict) -> None:
    # Through memory: torch's own zip writer, met by a full disk, does not say which file or why.
    buffer = io.BytesIO()
    with saving.patch("save.compute_crc32", True):
        torch.save({"format": CHECKPOINT_FORMAT, **content}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(folder: Path) -> dict:
    """The checkpoint of a run folder, on the CPU."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file() and _is_ensemble(Path(folder)):
        raise TrainError(f"{folder} holds an ensemble, which has no checkpoint; train it anew")
    if not path.is_file():
        wanted = "a run folder" if Path(folder).exists() else "an existing run folder"
        raise TrainError(f"{folder} must be {wanted} with a checkpoint.pt, and there is none")
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file raises whatever it likes
        raise TrainError(
            f"{path} is truncated, corrupted or no checkpoint ({first_line(error)})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise TrainError(f"{path} must be a checkpoint of format {CHECKPOINT_FORMAT}, got {found}")
    return content


def _check_archive(path: Path) -> None:
    """Raise for what torch.load lets pass: a checksum that is not its record's, a record marked as
    a folder (its tensor is what memory holds), and more memory than the size of the file."""
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            raise ValueError("its records are longer than the file")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its record {damaged} is another")
        for record in archive.infolist():
            if record.external_attr & 0x10:  # what MS-DOS marks folders with
                raise ValueError(f"its record {record.filename} is marked as a folder")
            # Of what torch.load lets a file call, this one alone fills as much as it is told.
            if record.filename.endswith("data.pkl") and b"\nbytearray\n" in archive.read(record):
                raise ValueError("it makes a bytearray")


def _is_ensemble(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return (config.get("networks") or 1) > 1
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def load_config(folder: Path) -> TrainConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise TrainError(f"{folder} must be a run folder, but it has no config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return TrainConfig.from_dict(content).check()
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise TrainError(
            f"{path} is truncated, corrupted or no config of a run ({error})"
        ) from error


def check_same_model(model: nn.Module, state: dict, where: str) -> None:
    """Raise TrainError where the weights belong to another model; names the first that does not
    fit."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise TrainError(
                f"{where} belongs to another model: {name} must be {wanted.get(name, 'absent')}, "
                f"got {found.get(name, 'nothing')}"
            )


def _checksum(number: int = 0) -> bytes:
    """As the header of model.safetensors has it; quotes within its texts are escaped."""
    return f'"crc32": "{number:08x}"'.encode()


def model_bytes(model: nn.Module, about: dict) -> bytes:
    """model.safetensors: the weights under the plain nn.Sequential's names, and what the model and
    its data are (`about`) as metadata, with the CRC-32 that the file has while that stands as
    zeros. The same bytes for the same weights."""
    from safetensors.torch import save

    weights, seen = {}, {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            tensor = tensor.clone()  # shared weights: the format wants each name to own its bytes
        seen[tensor.data_ptr()] = name
        weights[name] = tensor.detach().cpu().contiguous()
    metadata = {"format": "pt", "fusedmlp": json.dumps(about), "crc32": f"{0:08x}"}
    content = save(weights, metadata=metadata)
    # The library leaves the order of the metadata to chance, so the header is sorted here: JSON
    # after its length in 8 bytes, padded with spaces to a multiple of 8.
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    head, rest = len(header).to_bytes(8, "little") + header, memoryview(content)[end:]
    number = zlib.crc32(rest, zlib.crc32(head))
    return head.replace(_checksum(), _checksum(number), 1) + rest


def check_model_file(path: Path, checksum: str | None) -> None:
    """Raise ValueError where the file has other bytes than `model_bytes` has made, given the
    checksum among its metadata; other programs write none."""
    if checksum is None:
        return
    wanted = int(checksum, 16)
    with open(path, "rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
        found = zlib.crc32(start + header.replace(_checksum(wanted), _checksum(), 1))
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    if found != wanted:
        raise ValueError("its checksum is another")
