"""A piece of work in a forked child, which may crash or hang: what became of it."""

import faulthandler
import io
import os
import pickle
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAGE = resource.getpagesize()
HANGS = 600.0  # seconds after which a child is taken to hang; all take a few


@dataclass(frozen=True)
class Ended:
    """What became of a child.

    result  what the work returned; None where it did not get that far
    error   the exception, as text; None without one
    signal  that ended it, 0 for none
    late    it was ended since it took too long
    grew    bytes of memory that it took beyond its parent's
    """

    result: object
    error: str | None
    signal: int
    late: bool
    said: str
    grew: int

    def crash(self) -> str | None:
        """What no fault may cause, in words."""
        if self.late:
            return "it hung"
        return f"it died of {signal.Signals(self.signal).name}" if self.signal else None


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def start(work: Callable[[], object], said: Path, memory: int | None = None) -> tuple[int, int]:
    """(process, where its answer can be read); what it says goes to a file."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    try:
        os.close(reader)
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = io.TextIOWrapper(open(1, "wb", 0, closefd=False), write_through=True)
        sys.stderr = io.TextIOWrapper(open(2, "wb", 0, closefd=False), write_through=True)
        faulthandler.enable(open(2, "wb", 0, closefd=False))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory is not None:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
            resource.setrlimit(resource.RLIMIT_AS, (size + memory, resource.RLIM_INFINITY))
        before = _resident()
        try:
            answer = work(), None
        except BaseException as error:
            traceback.print_exc()
            answer = None, f"{type(error).__name__}: {error}"
        grew = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        with open(writer, "wb") as pipe:
            pickle.dump((*answer, grew), pipe)
    finally:
        os._exit(0)


def end(process: int, reader: int, said: Path, seconds: float) -> Ended:
    """Waits for it; one that takes longer is ended."""
    until, late, status = time.monotonic() + seconds, False, None
    with open(reader, "rb") as pipe:
        os.set_blocking(reader, False)
        content = b""
        while status is None:
            content += pipe.read() or b""
            done, found = os.waitpid(process, os.WNOHANG)
            if done:
                status = found
            elif time.monotonic() > until:
                late = True
                os.kill(process, signal.SIGKILL)
                until = float("inf")
            else:
                time.sleep(0.002)
        content += pipe.read() or b""
    text = said.read_text(errors="replace") if said.exists() else ""
    try:
        result, error, grew = pickle.loads(content)  # our own child's
    except (EOFError, pickle.UnpicklingError):
        result, error, grew = None, None, 0
    return Ended(
        result, error, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, late, text, grew
    )


def run(
    work: Callable[[], object], folder: Path, seconds: float = HANGS, memory: int | None = None
) -> Ended:
    """The work in a child.

    memory  address space that it may take beyond its parent's
    """
    said = folder / "said.txt"
    return end(*start(work, said, memory), said, seconds)
