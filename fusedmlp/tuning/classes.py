"""Classes of networks, measured ahead by networks drawn at random: what a CPU decides by where no
network of the very size was measured."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator

import torch

from .work import Work

ACTIVATIONS = ("relu", "tanh", "gelu", "sigmoid")
_FEWEST = 5  # networks that speak for a class
_MOST = 40  # more are not measured
_ELEMENTWISE = 0.1  # share of activations alone
_WIDE = 0.3  # share of networks whose layers are all wide, which few of the others are
_WIDE_WIDTHS = (256, 1536)


def _log_uniform(rnd: random.Random, low: int, high: int) -> int:
    return round(math.exp(rnd.uniform(math.log(low), math.log(high))))


def random_net(
    rnd: random.Random, bounds: tuple[int, int] = (4, 1024)
) -> tuple[int, list[int], str, bool]:
    """(rows, widths, activation, whether it drops): 1 to 3 layers, the widths log-uniform between
    the bounds, 1 to 512 rows."""
    widths = [_log_uniform(rnd, *bounds) for _ in range(rnd.randint(1, 3) + 1)]
    act, drops = rnd.choice(ACTIVATIONS), rnd.random() < 0.5
    return _log_uniform(rnd, 1, 512), widths, act, drops


def work_of(rows: int, widths: list[int], act: str, drops: bool, gradients: bool, **what) -> Work:
    """A network whose hidden layers have an activation and perhaps a dropout, or a single layer
    that has both."""
    drops = drops and gradients  # evaluation drops nothing
    hidden = [(act, drops, n) for n in widths[1:]]
    if len(hidden) > 1:
        hidden[-1] = ("none", False, widths[-1])
    what = {"device": "cpu", "dtype": "fp32"} | what
    return Work(rows=rows, in_features=widths[0], layers=tuple(hidden), gradients=gradients, **what)


def random_works(count: int, seed: int) -> Iterator[Work]:
    """So many works for a CPU, fewer of classes that have enough."""
    rnd, seen = random.Random(seed), {}
    for _ in range(count):
        bounds = (_WIDE_WIDTHS,) if rnd.random() < _WIDE else ()
        rows, widths, act, drops = random_net(rnd, *bounds)
        if rnd.random() < _ELEMENTWISE:
            rows, widths = rows * rnd.choice((1, 8)), [0, widths[-1]]
        for gradients in (True, False):
            work = work_of(rows, widths, act, drops, gradients)
            key = work.class_key
            seen[key] = seen.get(key, 0) + 1
            if seen[key] <= _MOST:
                yield work


def rows_of(found: Iterable[tuple[Work, dict]]) -> dict[str, dict]:
    """The rows of the table for what was measured: of each class the number of networks, and for
    each candidate eager's time over its own, that of the slowest 4 % and the median."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for work, result in found:
        for name, ratio in result["ratios"].items():
            if name != "eager":
                ratios.setdefault(work.class_key, {}).setdefault(name, []).append(ratio)
    rows = {}
    for key, by_name in sorted(ratios.items()):
        count = max(map(len, by_name.values()))
        # One that was wrong, or could not run, on some of them is not among those to choose.
        whole = {name: sorted(r) for name, r in by_name.items() if len(r) == count}
        if count >= _FEWEST:
            pairs = {
                n: [round(r[count // 25], 3), round(r[count // 2], 3)] for n, r in whole.items()
            }
            rows[key] = {"networks": count, "ratios": pairs}
    return rows


def summary(rows: dict[str, dict]) -> list[str]:
    """How many classes of networks each candidate wins, and by how much."""
    won: dict[str, list[float]] = {}
    for row in rows.values():
        # None is left where all were wrong.
        ratios = row["ratios"] or {"plain PyTorch": (1.0, 1.0)}
        best = max(ratios, key=lambda name: ratios[name][1])
        low, median = ratios[best]
        is_faster = low >= 0.97 and median >= 1.03
        won.setdefault(best if is_faster else "plain PyTorch", []).append(median)
    lines = [f"{len(rows)} classes of networks on {torch.get_num_threads()} threads:"]
    for name, medians in sorted(won.items()):
        told = f"; {min(medians):.2f} to {max(medians):.2f} times as fast as plain PyTorch"
        lines.append(f"  {name} in {len(medians)}" + ("" if name == "plain PyTorch" else told))
    return lines
