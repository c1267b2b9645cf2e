"""Times the tiles of the GEMM kernels ahead of use, on random data: what `fusedmlp tune` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ...spec import activations, philox
from ...spec.layers import Epilogue
from . import tile_cache, tiles
from .dgrad_act import dgrad_act
from .gemm import kind_of
from .launch import capability
from .linear_act import run


@dataclass(frozen=True)
class Job:
    """One product to tune.

    op  'linear_act' or 'dgrad_act'; m, n of its output, k the length of its sums
    """

    op: str
    dtype: torch.dtype
    m: int
    n: int
    k: int
    device: int

    @property
    def _size(self) -> tuple:
        return self.op, kind_of(self.dtype), self.m, self.n, self.k

    @property
    def _odd(self) -> bool:
        """Whether the operands that are timed have odd rows (gemm.py); w of dgrad_act is (k, n)."""
        return bool(self.k % 16 or (self.op == "dgrad_act" and self.n % 16))

    def candidates(self) -> list[tiles.Tile]:
        """Every tile that can be chosen, in the order of timing."""
        target = capability(torch.empty(0, device=f"cuda:{self.device}"))
        return tiles.candidates(*self._size, self.dtype.itemsize, target, self._odd)

    def is_kept(self) -> bool:
        """Whether the file has a tile for this size."""
        return tile_cache.is_kept(*self._size, self._odd)

    def call(self) -> Callable[[tiles.Tile], object]:
        """One call of the op with relu and dropout on random data, by tile."""

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=self.dtype, device=f"cuda:{self.device}")

        m, n, k = self.m, self.n, self.k
        threshold, scale = philox.threshold_and_scale(0.1)
        state = torch.zeros(2, dtype=torch.int64, device=f"cuda:{self.device}")
        e = Epilogue(randn(n), None, state, activations.RELU, 0.0, threshold, scale, 0, 0)
        x = randn(m, k)
        if self.op == "linear_act":
            w = randn(n, k)
            return lambda tile: run(x, w, e, False, tile)
        w, saved = randn(k, n), randn(m, n)
        rest = activations.SAVE_Y, True, False
        return lambda tile: dgrad_act(x, w, saved, e, *rest, tile)

    def tune(self, progress: Callable[[str], None]) -> tuple[tiles.Tile, dict] | None:
        """(the fastest tile, which is kept, and the milliseconds of all); None if none ran."""
        name = f"{self.op} {self.m}x{self.n}x{self.k}"
        times = tile_cache.time_tiles(self.call(), self.candidates(), name, progress)
        if not times:
            return None
        return tile_cache.keep(*self._size, times, self._odd), times


def jobs(
    shapes: Iterable[tuple[int, int, int]], dtypes: Iterable[torch.dtype], device: int = 0
) -> list[Job]:
    """The jobs of both GEMM kernels for shapes (M, K, N) of layers, each once."""
    found = []
    for m, k, n in shapes:
        for dtype in dtypes:
            found.append(Job("linear_act", dtype, m, n, k, device))
            # The backward of this layer's input: dz (M, N) times W (N, K).
            found.append(Job("dgrad_act", dtype, m, k, n, device))
    return list(dict.fromkeys(found))
