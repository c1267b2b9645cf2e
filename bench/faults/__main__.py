"""python -m bench.faults: injects faults of every kind and counts what survived them.

    python -m bench.faults --out bench/results/faults.json       # all, in about half an hour
    python -m bench.faults --only killed --count 20 --seed 7

Needs Linux; a kind that needs a C compiler or the extension is left out without it.
"""

import argparse
import os
import random
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import record
from . import inject

_PRELOADED = "FAULTS_FOLDER"  # where this process's own library lies


@dataclass(frozen=True)
class Kind:
    fault: str
    wanted: str
    count: int
    inject: Callable[[Path, random.Random, int], Iterator[str | None]]
    is_preloaded: bool = False


def kinds() -> dict[str, Kind]:
    from . import damage, disk, hostile, memory, stops

    on, refused = "goes on to the same bits", "one ends right, the other is refused"
    kept = "one message, no half-written file, the good one stays"
    error = "an ordinary error, the next call has the right bits"
    named, refusal = (
        "an error with its name, or the same values",
        "refused, or read in little memory",
    )
    passed = "passed over with a reason, the right values"
    message = "ends with a message, goes on to the same bits"
    return {
        "killed": Kind("SIGKILL at any moment of a run", on, 200, stops.killed),
        "killed-writing": Kind(
            "SIGKILL in the middle of a write, at a rename",
            on,
            200,
            stops.killed_while_writing,
            True,
        ),
        "interrupted": Kind("Ctrl-C or SIGTERM", message, 60, stops.interrupted),
        "two-at-once": Kind("two runs into one folder", refused, 40, stops.two_at_once),
        "rank-dies": Kind("one of two processes is killed", message, 20, stops.rank_dies),
        "disk-train": Kind(
            "the disk is full at a write: train goes on", kept, 120, disk.train, True
        ),
        "disk": Kind(
            "the disk is full at a write: train, crossval, predict, tune",
            kept,
            240,
            disk.other_commands,
            True,
        ),
        "memory": Kind(
            "the n-th allocation of C++ or of a tensor fails",
            error,
            600,
            memory.native_allocations,
            True,
        ),
        "memory-python": Kind(
            "an allocation of Python fails", error, 300, memory.python_allocations
        ),
        "damage": Kind("files cut off, or with a bit turned", named, 3000, damage.files),
        "damage-extension": Kind(
            "the extension cut off, or with a bit turned", passed, 30, damage.extension
        ),
        "hostile": Kind("files made to run code or to fill the memory", refusal, 1, hostile.files),
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


def run(kind: Kind, dice: random.Random, count: int, say=print) -> dict:
    """The row of a kind."""
    started, failures, injected = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for failure in kind.inject(Path(folder).resolve(), dice, count):
            injected += 1
            if failure is not None:
                failures.append(failure)
                say(f"  FAILED: {failure}")
    failed = len(failures)
    row = {"fault": kind.fault, "wanted": kind.wanted, "injected": injected}
    row |= {"survived": injected - failed, "failed": failed}
    return row | {"seconds": time.monotonic() - started, "failures": failures[:3]}


def main() -> int:
    if os.environ.get(_PRELOADED) is None:
        _preload()
    _import_all()
    known = kinds()
    parser = argparse.ArgumentParser(prog="bench.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=known, default=list(known))
    parser.add_argument(
        "--count", type=int, help="faults of each kind; else as many as are worth it"
    )
    parser.add_argument("--seed", type=int, help="else by chance; it is printed")
    parser.add_argument("--out", type=Path, help="results file")
    args = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
    print(f"faults: seed {seed}", flush=True)
    head = record.header("faults", "bench.faults", None) | {"seed": seed}
    results = record.Results(head, args.out)
    for name in args.only:
        kind = known[name]
        if kind.is_preloaded and not inject.is_preloaded():
            print(f"faults: {name}: left out without a C compiler")
            continue
        row = run(kind, random.Random(f"{seed} {name}"), args.count or kind.count)
        results.add(row, columns=("fault", "injected", "survived", "failed", "seconds"))
    return 1 if any(row["failed"] for row in results.rows) else 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
