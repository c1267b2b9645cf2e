"""Tiles taken apart by columns, in Triton's interpreter: every number of parts, left to right."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language

from fusedmlp.backends.triton.layout import column_parts  # noqa: E402


@triton.jit
def _parts_kernel(x_ptr, y_ptr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    WIDTH: tl.constexpr = N // PARTS
    rows = tl.arange(0, M)[:, None] * N
    parts = column_parts(tl.load(x_ptr + rows + tl.arange(0, N)[None, :]), PARTS, M, N)
    for i in tl.static_range(PARTS):
        tl.store(y_ptr + rows + (i * WIDTH + tl.arange(0, WIDTH))[None, :], parts[i])


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_parts_of_a_tile_are_its_columns_from_left_to_right(count, device):
    x = torch.arange(16.0 * 64, device=device).view(16, 64)
    y = torch.full_like(x, -1)
    _parts_kernel[(1,)](x, y, count, 16, 64)
    assert torch.equal(x, y)
