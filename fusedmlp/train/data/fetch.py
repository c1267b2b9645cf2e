"""One attempt to fetch an image set, through torchvision, that cannot hang and leaves nothing
half-done.

The download runs in a process of its own, into a new folder beside the target: a network that
swallows
packets can stop a thread for good (name look-ups know no time limit), but a process can be ended.
"""

import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 120.0
START_SECONDS = 20.0  # for Python itself, on a machine that is busy

# Prints a line at each stage. The first probe uses the standard library only, so that no network is
# noticed within the time to connect and not after the seconds that importing torchvision takes.
_CHILD = """
import socket, sys, urllib.request
name, folder, connect, mirror = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
stages, sys.stdout = sys.stdout, sys.stderr
socket.setdefaulttimeout(connect)
print("started", file=stages, flush=True)
urllib.request.urlopen(mirror + "t10k-labels-idx1-ubyte.gz", timeout=connect).read(1)
print("connected", file=stages, flush=True)
from torchvision import datasets
kind = getattr(datasets, name)
kind.mirrors = kind.mirrors if mirror in kind.mirrors else [mirror]
kind(folder, download=True)
print("fetched", file=stages, flush=True)
"""

# The first of torchvision's own.
MIRRORS = {
    "FashionMNIST": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "KMNIST": "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
}


def fetch(
    name: str,
    root: Path,
    *,
    mirror: str | None = None,
    connect_seconds: float = CONNECT_SECONDS,
    total_seconds: float = TOTAL_SECONDS,
) -> str | None:
    """Put root/<name>/raw in place and return None, or return the reason why not; root is made if
    need be.

    name  torchvision's class: FashionMNIST, MNIST or KMNIST
    """
    made = _first_missing(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".fetching-", dir=root))
    except OSError as error:
        return f"cannot write to {root}: {error.strerror}"
    try:
        reason = _run(name, work, mirror or MIRRORS[name], connect_seconds, total_seconds)
        return reason if reason is not None else _put(work / name, root / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _remove_empty(root, made)


def _first_missing(root: Path) -> Path | None:
    missing = [path for path in (root, *root.parents) if not path.exists()]
    return missing[-1] if missing else None


def _remove_empty(root: Path, made: Path | None) -> None:
    """Take back the folders that this attempt made, as far as they are empty."""
    while made is not None:
        try:
            root.rmdir()
        except OSError:
            return
        made, root = (None, root) if root == made else (made, root.parent)


def _put(fetched: Path, target: Path) -> str | None:
    try:
        target.mkdir(exist_ok=True)
        os.rename(fetched / "raw", target / "raw")
    except OSError as error:
        # Another process was faster: its files serve as well.
        return None if (target / "raw").is_dir() else f"cannot write to {target}: {error.strerror}"
    return None


def _run(
    name: str, work: Path, mirror: str, connect_seconds: float, total_seconds: float
) -> str | None:
    with open(work / "errors.txt", "w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, name, str(work), str(connect_seconds), mirror],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for the caller, who ends the child in `finally`
        )
        try:
            end = time.monotonic() + total_seconds
            if not _line(child, min(end, time.monotonic() + START_SECONDS)):
                return _why(child, errors, "the download could not be started")
            if not _line(child, min(end, time.monotonic() + connect_seconds)):
                return _why(child, errors, f"no answer from {mirror} within {connect_seconds:g} s")
            if not _line(child, end):
                return _why(child, errors, f"not done within {total_seconds:g} s")
            return None
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
            child.stdout.close()


def _line(child: subprocess.Popen, end: float) -> bool:
    """True when the child writes its next line in time; False when it does not, or ends."""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, end - time.monotonic())):
                return False
            # Unbuffered, one byte a time: a buffered read could block, or swallow the next line.
            byte = os.read(child.stdout.fileno(), 1)
            if byte == b"":
                return False
            if byte == b"\n":
                return True


def _why(child: subprocess.Popen, errors, waited: str) -> str:
    """The child's own last line of error where it ended by itself, else what was waited for."""
    try:
        child.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return waited
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    return lines[-1] if lines else waited
