"""Measures works with the worker, and keeps what it finds in the table of measured.py."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from .._version import __version__
from ..backends import measured
from ..backends.registry import BackendError
from .work import Work

log = logging.getLogger("fusedmlp")

SECONDS = 0.25  # of timing one work
LIMIT = 120.0  # seconds without a sign of life, compilation included
# The other process is started by name: what it imports is built on this.
_WORKER, _MODULE = "fusedmlp.trial.worker", "fusedmlp.trial.candidates"


class _Worker:
    """The other process: requests in, answers out."""

    def __init__(self, module: str):
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else 0
        settings = [str(torch.get_num_threads()), str(gpu), module]
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        environment.pop("FUSEDMLP_BACKEND", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, request: dict) -> None:
        # Where it has ended, `answer` says so.
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def answer(self, seconds: float) -> dict | str:
        """Its next line, or why there is none."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return f"it did not return within {seconds:g} s"
        if line is None:
            return f"it ended the process, exit code {self.process.wait()}"
        return json.loads(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def measure(
    works: Iterable[Work], seconds: float = SECONDS, *, limit: float = LIMIT, module: str = _MODULE
) -> Iterator[tuple[Work, dict]]:
    """(work, {'times': microseconds, 'wrong': reasons, 'ratios': eager's time over each one's})
    of each work, as they are found.

    module   whose function `candidates` says what is tried, or whose `judge` compares it
    raises   BackendError where plain PyTorch itself cannot be measured
    """
    worker = None
    try:
        for work in works:
            failed: dict[str, str] = {}
            result = None
            while result is None:
                if worker is None:
                    worker = _Worker(module)
                    ready = worker.answer(LIMIT)
                    if isinstance(ready, str):
                        raise BackendError(
                            f"tune: the process that measures did not start: {ready}"
                        )
                request = {"work": work.to_dict(), "seconds": seconds, "without": list(failed)}
                worker.ask(request)
                doing = "eager"
                while result is None:
                    answer = worker.answer(limit)
                    if isinstance(answer, str):
                        worker.end()
                        worker = None
                        if doing in ("eager", "timing"):
                            raise BackendError(f"tune: {work}: {doing}: {answer}")
                        failed[doing] = answer
                        break
                    doing = answer.get("doing", doing)
                    result = answer.get("result")
            result["wrong"] = failed | result["wrong"]
            yield work, result
    finally:
        if worker is not None:
            worker.end()


def keep(work: Work, result: dict) -> None:
    """Write the times of one size into the table."""
    row = {"times": result["times"], "wrong": result["wrong"]}
    measured.keep(work.device, "calls", work.key, row)


def is_kept(work: Work) -> bool:
    return work.key in measured.own(work.device).get("calls", {})


def bugs(work: Work, result: dict) -> list[str]:
    """A line for each candidate that is wrong, to be sent to the developers."""
    where = measured.kind(work.device)
    versions = ", ".join(f"{k} {v}" for k, v in measured.versions(work.device).items())
    return [
        f"{name} is never chosen here, as {reason}. This is a bug; please report this line: "
        f"fusedmlp {__version__}: {name}: {work}: {reason} ({where}; {versions})"
        for name, reason in result["wrong"].items()
    ]


def summary(work: Work, result: dict) -> str:
    """One line: what was tried, what won and by how much."""
    times = result["times"]
    ranked = sorted(times, key=times.get)
    best = ranked[0]
    tried = ", ".join(f"{name} {times[name]:.3g} us" for name in ranked)
    if best == "eager":
        won = "plain PyTorch is the fastest"
    else:
        won = f"{best} wins, {times['eager'] / times[best]:.2f} times as fast as plain PyTorch"
    return f"{work}: {won} ({tried})"
