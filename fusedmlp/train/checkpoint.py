"""Checkpoints: everything that an exact continuation needs, written so that a crash never leaves
half a file.

A checkpoint holds plain values and tensors only, so it loads with weights_only=True.
"""

import errno
import io
import os
import shutil
import tempfile
from pathlib import Path

import torch

from .config import TrainConfig
from .errors import TrainError, UsageError, WriteError

FORMAT = 1
# May differ between a run and its continuation; everything else would make it another run.
FREE = ("epochs", "data_dir", "device", "backend", "engine", "out", "overwrite", "resume", "debug")


def write_atomically(path: Path, content: bytes) -> None:
    """All of content, or the file as it was before: a temporary file beside it, flushed to disk,
    then renamed."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only the owner can read
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        room = _room(error, path, len(content))
        raise WriteError(f"cannot write {path}: {error.strerror}{room}") from error
    finally:
        if temporary is not None:
            _remove(temporary)


def _room(error: OSError, path: Path, size: int) -> str:
    """What it takes, where room is what lacks."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    told = f"; it takes {size:,} bytes"
    if error.errno == errno.ENOSPC:  # a quota and a largest size are not the disk's
        told += f", and {shutil.disk_usage(path.parent).free:,} are free there"
    return told


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove(path) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def save(path: Path, content: dict) -> None:
    # Through memory: torch's own zip writer, met by a full disk, does not say which file or why.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getvalue())


def load(folder: Path) -> dict:
    """The checkpoint of a run folder, on the CPU."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        wanted = "a run folder" if Path(folder).exists() else "an existing run folder"
        raise TrainError(f"{folder} must be {wanted} with a checkpoint.pt, and there is none")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file raises whatever it likes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrainError(f"{path} is truncated, corrupted or no checkpoint ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise TrainError(f"{path} must be a checkpoint of format {FORMAT}, got {found}")
    return content


def config_of(content: dict) -> TrainConfig:
    return TrainConfig.from_dict(content["config"])


def check_same_run(config: TrainConfig, saved: TrainConfig) -> None:
    """Raise UsageError where the continuation asks for something that only a new run can have."""
    asked, was = config.to_dict(), saved.to_dict()
    for name, value in asked.items():
        if name not in FREE and value != was[name]:
            raise UsageError(
                f"--resume: --{name.replace('_', '-')} must stay {was[name]} as in the run, got "
                f"{value}; "
                "leave it out, or start a new run"
            )


def check_same_model(model: torch.nn.Module, state: dict, where: str) -> None:
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
