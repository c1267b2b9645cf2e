"""python -m bench.faults: injects faults of every kind and counts what survived them.

    python -m bench.faults --out bench/results/faults.json       # all, in about half an hour
    python -m bench.faults --few                                 # some of each, in a minute
    python -m bench.faults --only killed --count 20 --seed 7

Needs Linux; a kind that needs a C compiler or the extension is left out without it.
"""

import argparse
import functools
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import record
from . import child, inject

_PRELOADED = "FAULTS_FOLDER"  # where this process's own library lies


@dataclass(frozen=True)
class Kind:
    """count, few: how many are injected, and how many of them for a quick look."""

    fault: str
    wanted: str
    count: int
    few: int
    inject: Callable[[Path, random.Random, int], Iterator[str | None]]
    is_preloaded: bool = False


def kinds() -> dict[str, Kind]:
    from . import damage, disk, hostile, memory, stops

    on, message = "goes on to the same bits", "ends with a message, goes on to the same bits"
    one = "one ends right, the other is refused or comes after it"
    kept = "one message, no half-written file, the good one of before stays"
    error = "an ordinary error, and the next call has the right bits"
    values = "an error that names it, or the same values (text, pixels, times: or others)"
    passed = "passed over with a reason, and right values"
    refused = "no code runs; refused, or read in little memory"
    return {
        "killed": Kind("SIGKILL at any moment of training", on, 200, 3, stops.killed),
        "killed-writing": Kind(
            "SIGKILL in the middle of a write, before and after a rename",
            *(on, 200, 4, stops.killed_while_writing, True),
        ),
        "interrupted": Kind("Ctrl-C or SIGTERM", message, 60, 2, stops.interrupted),
        "two-at-once": Kind("two runs into one folder", one, 40, 4, stops.two_at_once),
        "rank-dies": Kind("one of two processes is killed", message, 20, 1, stops.rank_dies),
        "disk-train": Kind(
            "disk full at a write of a run that goes on", kept, 120, 4, disk.train, True
        ),
        "disk": Kind(
            "disk full at a write of train, crossval, predict or tune",
            *(kept, 64, 4, disk.other_commands, True),
        ),
        "memory": Kind(
            "the n-th allocation of C++ or of a tensor fails",
            *(error, 800, 24, memory.native_allocations, True),
        ),
        "memory-python": Kind(
            "an allocation of Python fails", error, 300, 6, memory.python_allocations
        ),
        "damage": Kind("file cut off, or with a bit turned", values, 3000, 48, damage.files),
        "damage-extension": Kind(
            "extension cut off, or with a bit turned", passed, 40, 1, damage.extension
        ),
        "hostile": Kind(
            "file made to run code or to fill the memory", refused, 1, 1, hostile.files
        ),
    }


def _preload() -> None:
    """Start this program again with the library in it."""
    folder = tempfile.mkdtemp(prefix="faults-")
    library = inject.build(Path(folder))
    if library is None:
        return
    preloaded = {"LD_PRELOAD": str(library), _PRELOADED: folder, "OMP_NUM_THREADS": "1"}
    os.execve(
        sys.executable,
        [sys.executable, "-m", "bench.faults", *sys.argv[1:]],
        os.environ | preloaded,
    )


def _import_all() -> None:
    """What a run imports, so that a forked child has it."""
    import matplotlib.pyplot  # noqa: F401
    import pandas  # noqa: F401
    import torch

    import fusedmlp.commands.tune
    import fusedmlp.train.commands  # noqa: F401

    torch.set_num_threads(1)


def run(kind: Kind, dice: random.Random, count: int, minutes: float) -> dict:
    """The row of a kind; after so many minutes it ends with what there is."""
    started, failures, injected = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for failure in kind.inject(Path(folder).resolve(), dice, count):
            injected += 1
            if failure is not None:
                failures.append(failure)
                print(f"  FAILED: {failure}", flush=True)
            if time.monotonic() - started > 60 * minutes:
                break
    failed = len(failures)
    row = {"fault": kind.fault, "wanted": kind.wanted, "injected": injected}
    row |= {"survived": injected - failed, "failed": failed}
    return row | {"seconds": time.monotonic() - started, "failures": failures[:3]}


def _has_ended(process: int) -> bool:
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process, options) is not None


def run_all(works: dict[str, Callable[[], dict]], jobs: int) -> Iterator[dict | None]:
    """The rows of all kinds, each in a process of its own, so many at a time; None for one that
    could not be run."""
    waiting, running = dict(works), {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = next(iter(waiting))
                said = Path(folder) / name
                running[name] = (*child.start(waiting.pop(name), said), said)
            name = next((n for n, (pid, *_) in running.items() if _has_ended(pid)), None)
            if name is None:
                time.sleep(0.1)
                continue
            ended = child.end(*running.pop(name), seconds=24 * 3600)
            print(ended.said, end="", flush=True)
            if ended.result is None:
                print(f"faults: {name}: it could not be run: {ended.crash() or ended.error}")
            yield ended.result


def main() -> int:
    if os.environ.get(_PRELOADED) is None:
        _preload()
    _import_all()
    known = kinds()
    parser = argparse.ArgumentParser(prog="bench.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=known, default=list(known))
    parser.add_argument("--count", type=int, help="faults of each kind")
    parser.add_argument("--few", action="store_true", help="only a few of each, in a minute")
    parser.add_argument("--minutes", type=float, default=600, help="at most, of each kind")
    parser.add_argument("--jobs", type=int, default=1, help="kinds at a time")
    parser.add_argument("--seed", type=int, help="else by chance; it is printed")
    parser.add_argument("--out", type=Path, help="results file")
    args = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
    print(f"faults: seed {seed}", flush=True)
    head = record.header("faults", "bench.faults", None) | {"seed": seed}
    results = record.Results(head, args.out)
    works = {}
    for name in args.only:
        kind = known[name]
        if kind.is_preloaded and not inject.is_preloaded():
            print(f"faults: {name}: left out without a C compiler")
            continue
        count = args.count or (kind.few if args.few else kind.count)
        works[name] = functools.partial(
            run, kind, random.Random(f"{seed} {name}"), count, args.minutes
        )
    for row in run_all(works, args.jobs):
        if row is not None:
            results.add(row, columns=("fault", "injected", "survived", "failed", "seconds"))
    shutil.rmtree(os.environ.get(_PRELOADED, ""), ignore_errors=True)
    is_whole = len(results.rows) == len(works)
    return 0 if is_whole and not any(row["failed"] for row in results.rows) else 1


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
