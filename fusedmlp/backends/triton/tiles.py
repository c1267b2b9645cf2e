"""Tile sizes: which exist, which a device can hold, and which is the default for a size.

Numbers only: nothing here imports Triton, allocates or launches.
"""

from __future__ import annotations

import functools
from typing import NamedTuple


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes 2 us a call."""
    return -(-a // b)


# Elements of an elementwise tile: 16 for each of 128 threads, so that several 16-byte loads of a
# thread are in flight; with 32, forward kernels of prelu on odd rows spilled. Small tensors take
# small tiles: below it there are fewer programs than multiprocessors. So do backward kernels, which
# read two tensors: of odd rows a thread holds elements of many rows, each with a 64-bit address in
# three tensors, and with 16 of them or more they spilled.
_TILE, _SMALL_TILE, _SMALL = 2048, 1024, 1 << 19

# Backward kernels that also sum over rows: about so many programs, so that a GPU is filled and the
# second stage stays short. Not the device's size: the order of sums is part of the result.
_SUM_PROGRAMS = 1024


def elementwise_tile(m: int, n: int, backward: bool = False) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, warps) for an (m, n) tensor; BLOCK_N is a multiple of 8."""
    tile = _SMALL_TILE if backward or m * n <= _SMALL else _TILE
    block_n = max(8, min(_power_of_two(n), tile))
    block_m = max(1, min(_power_of_two(m), tile // block_n))
    return block_m, block_n, 4


def column_tile(m: int, n: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, warps) of a backward kernel that sums over rows: narrow, many rows."""
    block_n = max(8, min(_power_of_two(n), 32))
    block_m = max(1, min(_power_of_two(m), _SMALL_TILE // block_n))
    return block_m, block_n, 4


def row_splits(m: int, block_m: int, tiles_n: int, sums: bool) -> tuple[int, int]:
    """(steps, splits): tiles that one program walks down, programs for each column of tiles."""
    tiles_m = -(-m // block_m)
    if not sums:
        return 1, tiles_m
    # Up to four tiles in one program are cheaper than a second kernel.
    splits = 1 if tiles_m <= 4 else max(1, min(tiles_m, _SUM_PROGRAMS // tiles_n))
    steps = -(-tiles_m // splits)
    return steps, -(-tiles_m // steps)


def column_sum_tile(s: int, n: int) -> tuple[int, int, int]:
    """(BLOCK_S, BLOCK_N, warps) for the sum of (s, n) over s."""
    block_n = min(_power_of_two(n), 32)
    block_s = max(1, min(_power_of_two(s), 2048 // block_n))
    return block_s, block_n, 4


def row_tile(m: int, n: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, warps) for kernels that reduce whole rows of an (m, n) tensor."""
    block_n = min(_power_of_two(n), 4096)
    block_m = max(1, min(_power_of_two(m), 1024 // block_n))
    return block_m, block_n, 8 if block_n >= 2048 else 4


@functools.cache
def _parts(m: int, n: int, warps: int) -> int:
    return max(1, min(4, m * n // (16 * 32 * warps), n // 16))


class Tile(NamedTuple):
    """One configuration of a GEMM kernel."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    descriptors: bool = False  # tensor descriptors (TMA) where device and operands allow them
    splits: int = 1  # along K

    @property
    def parts(self) -> int:
        """Parts of its columns that the epilogue takes in turn: about 16 elements a thread each."""
        return _parts(self.m, self.n, self.warps)

    @property
    def backward_parts(self) -> int:
        """The same where the epilogue also holds a saved tensor and sums over rows."""
        return max(1, min(2 * self.parts, self.n // 16))


class Target(NamedTuple):
    """What the choice of a tile needs to know of a device."""

    backend: str  # 'cuda' or 'hip'
    arch: int  # 10 major + minor, 0 for hip
    processors: int  # multiprocessors
    shared: int  # bytes of shared memory that one program may have


# Bytes of shared memory a block can have, by compute capability.
SHARED = {
    80: 166_912,
    86: 101_376,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    120: 101_376,
    "hip": 65_536,
}


def target(arch: int, processors: int = 132) -> Target:
    """The Target of an NVIDIA GPU of compute capability arch / 10."""
    known = max((a for a in SHARED if a != "hip" and a <= arch), default=80)
    return Target("cuda", arch, processors, SHARED[known])


GROUP_M = 8

# Beyond this many multiplications the library's GEMM is taken for ieee fp32, which Triton does
# without tensor cores and the library's register blocking, and for operands with odd rows, for
# which only narrow tiles are there.
LARGEST_SLOW_PRODUCT = 1 << 27

# What can be chosen, by kind: 'half' (fp16, bf16), 'tf32', 'ieee'. From wide to narrow.
TILES: dict[str, tuple[Tile, ...]] = {
    "half": (
        Tile(128, 256, 64, 8, 4, True),
        Tile(128, 256, 64, 8, 3),
        Tile(256, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4, True),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 4, 4),
        Tile(64, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(128, 32, 64, 4, 4),
        Tile(64, 32, 64, 4, 4),
        Tile(128, 16, 64, 4, 4),
        Tile(64, 16, 128, 4, 3),
        Tile(32, 64, 64, 4, 4),
        Tile(16, 64, 128, 4, 3),
        Tile(16, 16, 128, 4, 3),
    ),
    "tf32": (
        Tile(128, 128, 32, 8, 4, True),
        Tile(128, 128, 32, 8, 3),
        Tile(128, 64, 32, 4, 4),
        Tile(64, 128, 32, 4, 4),
        Tile(64, 64, 32, 4, 4),
        Tile(128, 16, 32, 4, 4),
        Tile(64, 32, 32, 4, 4),
        Tile(64, 16, 64, 4, 3),
        Tile(16, 64, 64, 4, 3),
        Tile(16, 16, 64, 4, 3),
    ),
    "ieee": (
        Tile(64, 64, 16, 4, 3),
        Tile(64, 32, 32, 4, 3),
        Tile(64, 16, 32, 4, 3),
        Tile(32, 32, 32, 4, 3),
        Tile(16, 64, 32, 4, 3),
        Tile(16, 16, 32, 2, 3),
    ),
}


def shared_bytes(tile: Tile, itemsize: int) -> int:
    """Shared memory of the main loop's buffers."""
    return tile.stages * (tile.m + tile.n) * tile.k * itemsize


@functools.cache
def fitting(kind: str, itemsize: int, target: Target) -> tuple[Tile, ...]:
    """The tiles of a kind that a device can hold, with the stages its shared memory allows."""
    fit = []
    for tile in TILES[kind]:
        if tile.descriptors and not (target.backend == "cuda" and target.arch >= 90):
            continue
        # Barriers and the epilogue's exchange need some of it too.
        while tile.stages > 2 and shared_bytes(tile, itemsize) > target.shared - 1024:
            tile = tile._replace(stages=tile.stages - 1)
        # The widest tiles spill registers with less than three stages (seen for sm_120).
        wide = tile.m * tile.n > 128 * 128 and tile.stages < 3
        if shared_bytes(tile, itemsize) <= target.shared - 1024 and not wide:
            fit.append(tile)
    return tuple(dict.fromkeys(fit))


# Multiplications a cycle and multiprocessor, and bytes a cycle from L2 to one: the H200's, by its
# data sheet. They only rank tiles against each other.
_MULTIPLY_ADDS = {"half": 2048, "tf32": 1024, "ieee": 128}
_L2_BYTES = 64
_DRAM_BYTES = 2700
# Cycles of a program outside its main loop, and of another kernel.
_PROGRAM_CYCLES = 2000
_KERNEL_CYCLES = 4000


def cycles(tile: Tile, kind: str, m: int, n: int, k: int, itemsize: int, target: Target) -> float:
    """A model of a product's time: waves of tiles, each bound by arithmetic or by its loads."""
    k_split = -(-k // tile.splits)
    arithmetic = max(tile.m, 64) * tile.n * k_split / _MULTIPLY_ADDS[kind]
    loads = (tile.m + tile.n) * k_split * itemsize / _L2_BYTES
    steps = 60 * -(-k_split // tile.k)
    waves = -(-(-(-m // tile.m) * -(-n // tile.n) * tile.splits) // target.processors)
    total = waves * (max(arithmetic, loads, steps) + _PROGRAM_CYCLES)
    if tile.splits > 1:
        total += _KERNEL_CYCLES + 8 * tile.splits * m * n / _DRAM_BYTES
    return total


# Elements of a thread, of both operands and the sums, up to which a kernel that reads its operands
# element by element keeps them in registers: found by compiling (docs/kernels.md).
_MOST_ELEMENTS = {"half": 95, "tf32": 96, "ieee": 40}


# (kind, m, n) that have no more and spill all the same: first compute capability -> tiles.
_SPILLED = {
    0: {("half", 64, 32), ("tf32", 128, 128)},
    90: set(),
    100: {("half", 128, 16), ("tf32", 128, 16), ("tf32", 64, 16)},
    120: {("tf32", 128, 128)},
}


def for_odd_rows(tile: Tile, kind: str, target: Target) -> bool:
    """Whether a tile is for operands whose rows are not multiples of 16 elements apart."""
    if target.backend == "cuda":
        known = max(arch for arch in _SPILLED if arch <= target.arch)
        if (kind, tile.m, tile.n) in _SPILLED[known]:
            return False
    elements = (tile.m + tile.n) * tile.k + tile.m * tile.n
    return not tile.descriptors and elements <= _MOST_ELEMENTS[kind] * 32 * tile.warps


def can_split(tile: Tile, target: Target) -> bool:
    """Whether a tile's product may be split along K. With tcgen05 two of them spill then."""
    with_tcgen05 = target.backend == "cuda" and 100 <= target.arch < 120
    return not tile.descriptors and not (
        with_tcgen05 and (tile.m, tile.n) in ((64, 64), (256, 128))
    )


def candidates(
    op: str,
    kind: str,
    m: int,
    n: int,
    k: int,
    itemsize: int,
    target: Target,
    odd: bool = False,
) -> list[Tile]:
    """Every tile that can be chosen for a size, split along K where that can pay.

    odd  rows of an operand are not multiples of 16 elements apart: no vector instruction reads them
    """
    found = []
    for tile in fitting(kind, itemsize, target):
        if odd and not for_odd_rows(tile, kind, target):
            continue
        # Descriptors are made on the host for each call; they pay where the kernel is long.
        if tile.descriptors and m * n * k < 1 << 30:
            continue
        found.append(tile)
        if op != "linear_act" or not can_split(tile, target):
            continue
        for splits in (2, 4, 8, 16, 32):
            if k >= splits * max(256, 2 * tile.k) and m * n <= 1 << 20:
                found.append(tile._replace(splits=splits))
    return found


@functools.lru_cache(maxsize=4096)
def default_tile(
    op: str,
    kind: str,
    m: int,
    n: int,
    k: int,
    itemsize: int,
    target: Target,
    odd: bool = False,
) -> Tile:
    """The tile that the model ranks first: what is used where nothing was tuned."""
    found = candidates(op, kind, m, n, k, itemsize, target, odd)
    return min(found, key=lambda t: cycles(t, kind, m, n, k, itemsize, target))
