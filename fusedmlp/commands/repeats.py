"""The same call in other circumstances must give the same bits: again, on other numbers of threads,
from several Python threads at once, in a forked process, beside busy processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from .cases import Case

# The results of a case; and a hash of those of each of some cases.
Results = Callable[[Case], dict[str, torch.Tensor]]
Ask = Callable[[], list[str]]

_ANSWERS = 120  # seconds that a forked process may take
_AT_ONCE = 3  # Python threads
_MOST_BUSY = 16  # processes


def bits(found: Iterable[Case], results: Results) -> list[str]:
    """A hash of the outputs and gradients of each case."""
    hashes = []
    for case in found:
        digest = hashlib.sha256()
        for t in results(case).values():
            digest.update(t.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes


def _threads(count: int) -> Callable[[Ask], list[list[str]]]:
    def answers(ask: Ask) -> list[list[str]]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return [ask()]
        finally:
            torch.set_num_threads(before)

    return answers


def _at_once(ask: Ask) -> list[list[str]]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda _: ask(), range(_AT_ONCE)))


def _forked(ask: Ask) -> list[list[str]]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=lambda: there.send(ask()))
    child.start()
    there.close()  # so that the end of a child which fails is seen
    try:
        return [here.recv() if here.poll(_ANSWERS) else ["no answer"]]
    except EOFError:
        return [["no answer"]]
    finally:
        child.kill()
        child.join()


def _beside_busy(ask: Ask) -> list[list[str]]:
    count = min(_MOST_BUSY, os.cpu_count() or 1)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        return [ask()]
    finally:
        for process in busy:
            process.kill()
            process.wait()


SAME_THREADS = {
    "again": lambda ask: [ask()],
    "several at once": _at_once,
    "beside busy processes": _beside_busy,
}
# A forked process has one thread.
CIRCUMSTANCES = SAME_THREADS | {
    **{f"{n} thread{'s' * (n > 1)}": _threads(n) for n in (1, 2, 3)},
    "forked": _forked,
}


def promised(op: str, device: str) -> list[str]:
    """The circumstances in which an op has the same bits."""
    if device != "cpu" or op == "linear_act":  # PyTorch's own products change with the threads
        return list(SAME_THREADS)
    # With a GPU, PyTorch refuses to go backward in a forked process.
    return [c for c in CIRCUMSTANCES if c != "forked" or not torch.cuda.is_available()]


def changed(
    found: list[Case], results: Results, circumstances: Iterable[str] = CIRCUMSTANCES
) -> Iterator[tuple[str, list[Case]]]:
    """For each circumstance the cases whose bits are others there."""
    first = bits(found, results)
    for name in circumstances:
        wrong = set()
        for answer in CIRCUMSTANCES[name](lambda: bits(found, results)):
            same = [a == b for a, b in zip(first, answer, strict=False)]
            wrong |= {i for i in range(len(found)) if not (i < len(same) and same[i])}
        yield name, [found[i] for i in sorted(wrong)]
