"""Checks and times candidates in a process of its own, which may end or hang without harm.

Reads works as lines of JSON from stdin, writes what it does and finds as lines of JSON to stdout:
`python -m fusedmlp.trial.worker THREADS GPU MODULE`, where MODULE has the function `candidates`,
or a `judge` of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch

from ..tuning.work import Work
from .candidates import Candidate
from .check import wrong, wrong_masks

try:
    import resource
except ImportError:  # not on Windows
    resource = None

_SAMPLE_SECONDS = 2.5e-4
_LEAST_ROUNDS, _MOST_CALLS = 7, 200


def calls(work: Work, found: dict[str, Candidate]) -> dict[str, Callable[[], object]]:
    """Name -> forward and backward, or forward alone, as the user's module makes it."""
    like = {"device": work.device, "dtype": work.torch_dtype}
    x = torch.randn(work.rows, work.in_features or work.layers[0][2], **like)
    x.requires_grad_(work.gradients and not work.in_features)
    dy = torch.randn(work.rows, work.layers[-1][2], **like)

    def whole(module: torch.nn.Module):
        if not work.gradients:
            return lambda: module(x)
        leaves = [t for t in (x, *module.parameters()) if t.requires_grad]

        def run():
            module(x).backward(dy)
            for t in leaves:
                t.grad = None

        return run

    return {n: whole(c.module(work).train(work.gradients)) for n, c in found.items()}


def _disturbances() -> int:
    """How often the kernel has taken a processor away from this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def timed(
    device: str, ways: dict[str, Callable[[], object]], seconds: float
) -> dict[str, list[float]]:
    """Microseconds a call of each in each round, host time included. A round times all of them, in
    another order each time; one in which another process took the processor is left out where
    enough remain."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    counts = {}
    for name, call in ways.items():
        call()
        wait()
        start = time.perf_counter()
        call()
        wait()
        once = max(time.perf_counter() - start, 1e-7)
        counts[name] = max(1, min(_MOST_CALLS, int(_SAMPLE_SECONDS / once)))
    clean: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    shuffle, order = random.Random(0).shuffle, list(ways)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(clean) + len(disturbed) < _LEAST_ROUNDS:
        shuffle(order)
        before, taken = _disturbances(), {}
        for name in order:
            call, count = ways[name], counts[name]
            wait()
            start = time.perf_counter()
            for _ in range(count):
                call()
            wait()
            taken[name] = (time.perf_counter() - start) / count * 1e6
        (clean if _disturbances() == before else disturbed).append(taken)
    rounds = clean if len(clean) >= _LEAST_ROUNDS else clean + disturbed
    return {name: [taken[name] for taken in rounds] for name in ways}


def judge(work: Work, seconds: float, found: dict, tell: Callable[..., None]) -> dict:
    """Check each candidate, then time those that are right: a row of the table, with eager's time
    over each one's, the median over the rounds.

    tell  is told what is being done, which the parent needs where it does not return
    """
    reasons: dict[str, str] = {}
    for name, candidate in found.items():
        tell(doing=name)
        if candidate.call is None:
            continue
        try:
            reason = wrong_masks(name, work) or wrong(work, candidate.call)
        except Exception as error:  # a candidate that raises is a finding
            told = str(error).strip().splitlines() or [""]
            reason = f"it raises {type(error).__name__}: {told[0]}"
        if reason is not None:
            reasons[name] = reason
    tell(doing="timing")
    right = {name: candidate for name, candidate in found.items() if name not in reasons}
    with torch.set_grad_enabled(work.gradients):
        rounds = timed(work.device, calls(work, right), seconds)
    return row(rounds, reasons)


def row(rounds: dict[str, list[float]], reasons: dict[str, str], parts: int = 1) -> dict:
    """A row of the table from the times of calls, each of so many parts."""
    ratios = {
        name: statistics.median(e / t for e, t in zip(rounds["eager"], times, strict=True))
        for name, times in rounds.items()
    }
    times = {name: float(f"{statistics.median(t) / parts:.4g}") for name, t in rounds.items()}
    return {"times": times, "wrong": reasons, "ratios": ratios}


def _requests() -> Iterator[dict]:
    for line in sys.stdin:
        yield json.loads(line)


def main(threads: int, gpu: int, module: str) -> None:
    # What a library prints does not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**line) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(line), file=answers, flush=True)

    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)
    tried = importlib.import_module(module)
    tell(doing="ready")
    for request in _requests():
        work = Work.from_dict(request["work"])
        seconds, without = request["seconds"], request["without"]
        if hasattr(tried, "judge"):
            tell(result=tried.judge(work, seconds, without, tell))
            continue
        found = {n: c for n, c in tried.candidates(work).items() if n not in without}
        tell(result=judge(work, seconds, found, tell))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
