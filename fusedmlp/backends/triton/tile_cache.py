"""Tiles that were timed on this machine: kept on disk, looked up at a call, made ahead.

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
from collections.abc import Callable, Iterable
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


def _odd(op: str, n: int, k: int) -> bool:
    """Whether the operands that are timed have odd rows (gemm.py); w of dgrad_act is (k, n)."""
    return bool(k % 16 or (op == "dgrad_act" and n % 16))


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
    odd: bool = False,
) -> tiles.Tile:
    """The tile for one call on x's device; odd: of its operands, as in configs.candidates."""
    itemsize = x.element_size()
    mode = environment.read("FUSEDMLP_AUTOTUNE")
    if not x.is_cuda or mode == "0" or torch.are_deterministic_algorithms_enabled():
        return tiles.default_tile(op, kind, m, n, k, itemsize, target, odd)
    stored = _stored(op, kind, m, n, k, itemsize, target, _table_name(x.device.index), odd)
    if stored is None and mode == "1" and not torch.cuda.is_current_stream_capturing():
        stored = tune_one(op, x.dtype, m, n, k, x.device.index)
    return stored or tiles.default_tile(op, kind, m, n, k, itemsize, target, odd)


def _call(op: str, dtype: torch.dtype, m: int, n: int, k: int, device: int) -> Callable:
    """tile -> one call of an op with relu and dropout on random data."""
    from ...spec import activations, philox
    from .dgrad_act import dgrad_act
    from .linear_act import run

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=f"cuda:{device}")

    threshold, scale = philox.threshold_and_scale(0.1)
    state = torch.zeros(2, dtype=torch.int64, device=f"cuda:{device}")
    epilogue = randn(n), None, state, activations.RELU, 0.0, threshold, scale, 0, 0
    x = randn(m, k)
    if op == "linear_act":
        w = randn(n, k)
        return lambda tile: run(x, w, *epilogue, keep_h=False, tile=tile)
    w, saved = randn(k, n), randn(m, n)
    rest = activations.SAVE_Y, True, False
    return lambda tile: dgrad_act(x, w, saved, *epilogue, *rest, tile=tile)


def time_tiles(
    op: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    device: int = 0,
    progress: Callable[[str], None] = log.info,
) -> dict[tiles.Tile, float]:
    """Milliseconds of every tile that can be chosen for one size and that the device can run.

    op        'linear_act' or 'dgrad_act'; x (m, k), output (m, n)
    progress  called with one line a tile
    raises    RuntimeError in the interpreter
    """
    if INTERPRET:
        raise RuntimeError("tune: the interpreter has nothing to time; unset TRITON_INTERPRET")
    call = _call(op, dtype, m, n, k, device)
    times: dict[tiles.Tile, float] = {}
    found = candidates(op, dtype, m, n, k, device)
    for i, tile in enumerate(found, 1):
        try:
            times[tile] = triton.testing.do_bench(lambda t=tile: call(t), return_mode="median")
        except triton.runtime.errors.OutOfResources as error:
            progress(f"{op} {m}x{n}x{k} {i}/{len(found)} {tuple(tile)}: {error}")
            continue
        progress(f"{op} {m}x{n}x{k} {i}/{len(found)} {tuple(tile)}: {1e3 * times[tile]:.1f} us")
    return times


def candidates(
    op: str, dtype: torch.dtype, m: int, n: int, k: int, device: int = 0
) -> list[tiles.Tile]:
    """What time_tiles times, in this order."""
    from .gemm import kind_of
    from .launch import capability

    target = capability(torch.empty(0, device=f"cuda:{device}"))
    kind, odd = kind_of(dtype), _odd(op, n, k)
    return tiles.candidates(op, kind, m, n, k, dtype.itemsize, target, odd)


def tune_one(
    op: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    device: int = 0,
    progress: Callable[[str], None] = log.info,
) -> tiles.Tile | None:
    """Times every tile that can be chosen for one size, and keeps the fastest on disk.

    Arguments as in time_tiles; returns the fastest tile, None if none ran.
    """
    times = time_tiles(op, dtype, m, n, k, device, progress)
    return keep(op, dtype, m, n, k, times, device) if times else None


def keep(
    op: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    times: dict[tiles.Tile, float],
    device: int = 0,
) -> tiles.Tile:
    """Writes the fastest tile of one size to the file, and returns it."""
    from .gemm import kind_of

    best = min(times, key=times.get)
    table = _load().setdefault(_table_name(device), {})
    table[size_class(op, kind_of(dtype), m, n, k, _odd(op, n, k))] = list(best)
    _save()
    _stored.cache_clear()
    return best


def is_kept(op: str, dtype: torch.dtype, m: int, n: int, k: int, device: int = 0) -> bool:
    """Whether the file has a tile for one size on this GPU."""
    from .gemm import kind_of

    table = _load().get(_table_name(device), {})
    return size_class(op, kind_of(dtype), m, n, k, _odd(op, n, k)) in table


def jobs(
    shapes: Iterable[tuple[int, int, int]], dtypes: Iterable[torch.dtype]
) -> list[tuple[str, torch.dtype, int, int, int]]:
    """(op, dtype, m, n, k) of both GEMM kernels for shapes (M, K, N) of layers, each once."""
    found = []
    for m, k, n in shapes:
        for dtype in dtypes:
            found.append(("linear_act", dtype, m, n, k))
            # The backward of this layer's input: dz (M, N) times W (N, K).
            found.append(("dgrad_act", dtype, m, k, n))
    return list(dict.fromkeys(found))


def tune(
    shapes: Iterable[tuple[int, int, int]],
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    device: int = 0,
    progress: Callable[[str], None] = print,
) -> None:
    """Tunes both GEMM kernels ahead, for shapes (M, K, N) of layers, as `fusedmlp tune` does."""
    for job in jobs(shapes, tuple(dtypes)):
        tune_one(*job, device, progress)
