"""Tiles that were timed on this machine: looked up at a call, kept in the table of measured.py.

FUSEDMLP_AUTOTUNE decides what a call does with them:

    unset   takes the tile of the table, else the default of tiles.py; never tunes
    1       tunes a size class that is not in the table at its first call, which then takes seconds
    0       takes the defaults only

While a CUDA graph is captured nothing is tuned, and with torch.use_deterministic_algorithms the
defaults are taken: they are the same on every machine of a kind. Never runs in the interpreter.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
import triton

from ... import environment
from .. import measured
from . import tiles
from .launch import INTERPRET

log = logging.getLogger("fusedmlp")


def size_class(op: str, kind: str, m: int, n: int, k: int, odd: bool = False) -> str:
    """Sizes that share a tile: equal after rounding up to powers of two."""
    return f"{op} {kind} " + "x".join(str(measured.up(s)) for s in (m, n, k)) + " odd" * odd


@functools.lru_cache(maxsize=4096)
def _stored(
    op: str, kind: str, m: int, n: int, k: int, itemsize: int, target: tiles.Target, odd: bool
) -> tiles.Tile | None:
    tile = measured.own("cuda").get("tiles", {}).get(size_class(op, kind, m, n, k, odd))
    if tile is None or len(tile) != len(tiles.Tile._fields):
        return None
    tile = tiles.Tile(*tile)
    # The table may name a tile that this version does not have.
    known = tile._replace(splits=1) in tiles.fitting(kind, itemsize, target)
    return tile if known and (not odd or tiles.for_odd_rows(tile, kind, target)) else None


measured.watch(_stored.cache_clear)


def choose(
    op: str,
    kind: str,
    m: int,
    n: int,
    k: int,
    x: torch.Tensor,
    target: tiles.Target,
    odd: bool,
    run_with: Callable[[tiles.Tile], object],
) -> tiles.Tile:
    """The tile for one call on x's device.

    odd       of its operands, as in tiles.candidates
    run_with  runs that very call with a tile, to time it
    """
    itemsize = x.element_size()
    mode = environment.read("FUSEDMLP_AUTOTUNE")
    if not x.is_cuda or mode == "0" or torch.are_deterministic_algorithms_enabled():
        return tiles.default_tile(op, kind, m, n, k, itemsize, target, odd)
    stored = _stored(op, kind, m, n, k, itemsize, target, odd)
    if stored is None and mode == "1" and not torch.cuda.is_current_stream_capturing():
        found = tiles.candidates(op, kind, m, n, k, itemsize, target, odd)
        times = time_tiles(run_with, found, f"{op} {m}x{n}x{k}")
        stored = keep(op, kind, m, n, k, times, odd) if times else None
    return stored or tiles.default_tile(op, kind, m, n, k, itemsize, target, odd)


def time_tiles(
    run_with: Callable[[tiles.Tile], object],
    found: list[tiles.Tile],
    name: str,
    progress: Callable[[str], None] = log.info,
) -> dict[tiles.Tile, float]:
    """Milliseconds of run_with(tile) for each tile of `found` that the device can run.

    progress  called with one line a tile
    raises    RuntimeError in the interpreter
    """
    if INTERPRET:
        raise RuntimeError("tune: the interpreter has nothing to time; unset TRITON_INTERPRET")
    times: dict[tiles.Tile, float] = {}
    for i, tile in enumerate(found, 1):
        try:
            times[tile] = triton.testing.do_bench(lambda t=tile: run_with(t), return_mode="median")
        except triton.runtime.errors.OutOfResources as error:
            progress(f"{name} {i}/{len(found)} {tuple(tile)}: {error}")
            continue
        progress(f"{name} {i}/{len(found)} {tuple(tile)}: {1e3 * times[tile]:.1f} us")
    return times


def keep(
    op: str, kind: str, m: int, n: int, k: int, times: dict[tiles.Tile, float], odd: bool
) -> tiles.Tile:
    """Write the fastest tile of one size to the table, and return it."""
    best = min(times, key=times.get)
    measured.keep("cuda", "tiles", size_class(op, kind, m, n, k, odd), list(best))
    return best


def is_kept(op: str, kind: str, m: int, n: int, k: int, odd: bool) -> bool:
    """Whether the table has a tile for one size on this GPU."""
    return size_class(op, kind, m, n, k, odd) in measured.own("cuda").get("tiles", {})
