"""Tiles that were timed on this machine: looked up at a call, kept on disk.

The file holds one table a GPU and Triton version; a table maps an op, kind and size class (sizes
rounded up to powers of two) to a tile. FUSEDMLP_AUTOTUNE decides what a call does with it:

    unset   takes the tile of the file, else the default of tiles.py; never tunes
    1       tunes a size class that is not in the file at its first call, which then takes seconds
    0       takes the defaults only

While a CUDA graph is captured nothing is tuned, and with torch.use_deterministic_algorithms the
defaults are taken: they are the same on every machine of a kind. Never runs in the interpreter.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from ... import environment
from . import tiles
from .launch import INTERPRET

log = logging.getLogger("fusedmlp")

_tables: dict[str, dict[str, list]] | None = None


def path() -> Path:
    """Where the tiles are kept: under XDG_CACHE_HOME, by default ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fusedmlp" / "triton_tiles.json"


def _load() -> dict[str, dict[str, list]]:
    global _tables
    if _tables is None:
        _tables = {}
        try:
            found = json.loads(path().read_text())
            for name, table in found.items():
                _tables[name] = {key: list(tiles.Tile(*tile)) for key, tile in table.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            _tables = {}
            log.warning("tuned tiles are not used: %s cannot be read: %s", path(), error)
    return _tables


def _save() -> None:
    """Writes the tables in one step: a reader never sees half a file."""
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as f:
        json.dump(_load(), f, indent=1)
    os.replace(f.name, target)


@functools.cache
def _table_name(device: int) -> str:
    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}"


def size_class(op: str, kind: str, m: int, n: int, k: int, odd: bool = False) -> str:
    """Sizes that share a tile: equal after rounding up to powers of two."""
    up = (1 << max(0, size - 1).bit_length() for size in (m, n, k))
    return f"{op} {kind} " + "x".join(map(str, up)) + " odd" * odd


def forget() -> None:
    """Reads the file again at the next call."""
    global _tables
    _tables = None
    _stored.cache_clear()


@functools.lru_cache(maxsize=4096)
def _stored(
    op: str,
    kind: str,
    m: int,
    n: int,
    k: int,
    itemsize: int,
    target: tiles.Target,
    name: str,
    odd: bool = False,
) -> tiles.Tile | None:
    tile = _load().get(name, {}).get(size_class(op, kind, m, n, k, odd))
    if tile is None:
        return None
    tile = tiles.Tile(*tile)
    # A file of another version may name a tile that this one does not have.
    known = tile._replace(splits=1) in tiles.fitting(kind, itemsize, target)
    return tile if known and (not odd or tiles.for_odd_rows(tile, kind, target)) else None


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
    stored = _stored(op, kind, m, n, k, itemsize, target, _table_name(x.device.index), odd)
    if stored is None and mode == "1" and not torch.cuda.is_current_stream_capturing():
        found = tiles.candidates(op, kind, m, n, k, itemsize, target, odd)
        times = time_tiles(run_with, found, f"{op} {m}x{n}x{k}")
        stored = keep(op, kind, m, n, k, times, x.device.index, odd) if times else None
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
    op: str,
    kind: str,
    m: int,
    n: int,
    k: int,
    times: dict[tiles.Tile, float],
    device: int,
    odd: bool,
) -> tiles.Tile:
    """Writes the fastest tile of one size to the file, and returns it."""
    best = min(times, key=times.get)
    _load().setdefault(_table_name(device), {})[size_class(op, kind, m, n, k, odd)] = list(best)
    _save()
    _stored.cache_clear()
    return best


def is_kept(op: str, kind: str, m: int, n: int, k: int, device: int, odd: bool) -> bool:
    """Whether the file has a tile for one size on this GPU."""
    return size_class(op, kind, m, n, k, odd) in _load().get(_table_name(device), {})
