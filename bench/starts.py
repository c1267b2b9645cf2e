"""Runs a benchmark in several processes, one after the other, and makes one row of the rows that
they found for the same thing. A machine can be slow for as long as one process runs, so the spread
within one says nothing about the next."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import record

_COUNTS = ("rounds", "left_out")


def count(text: str) -> int:
    """The number of processes, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of processes above 0, got {text}")
    return int(text)


def rows(module: str, arguments: Sequence[str], processes: int) -> list[dict]:
    """The rows of `processes` runs of `python -m module arguments --out FILE`, as together() has
    them; raises CalledProcessError where one fails."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(processes):
            out = Path(folder) / f"{i}.json"
            command = [sys.executable, "-m", module, *arguments, "--out", str(out)]
            subprocess.run(command, check=True, cwd=record.ROOT)
            found.append(record.read(out)["rows"])
    return together(found)


def together(found: Sequence[Sequence[dict]]) -> list[dict]:
    """One row for each place, with `starts`, the number of processes. What was measured in each
    becomes [median, lowest, highest] of their medians; what is equal in all stays; numbers of
    rounds add up. Raises ValueError where the processes have different numbers of rows."""
    made = []
    for same in zip(*found, strict=True):
        names = dict.fromkeys(name for row in same for name in row)
        row = {name: _one([row.get(name) for row in same]) for name in names}
        counts = {n: sum(each.get(n, 0) for each in same) for n in _COUNTS if n in names}
        made.append(row | counts | {"starts": len(same)})
    return made


def _one(values: list):
    there = [value for value in values if value is not None]
    if isinstance(there[0], str) or all(value == there[0] for value in there):
        return there[0]
    medians = [value[0] if isinstance(value, list) else value for value in there]
    return [statistics.median(medians), min(medians), max(medians)]
