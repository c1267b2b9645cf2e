"""The table of cases: that nothing is left out of it."""

import re
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from fusedmlp.commands import cases
from fusedmlp.spec import activations

from ..made_data import ROOT

KINDS = [(op, dtype) for op in cases.OPS for dtype in cases.DTYPES]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind), scope="module")
def table(request):
    op, dtype = request.param
    return list(cases.table(op, cases.DTYPES[dtype]))


def _values(found, i):
    return {case.axes[i] for case in found}


def test_every_activation_meets_every_p_and_every_shape(table):
    met = {(c.act, c.alpha, c.slope_elements, c.p, c.m, c.k, c.n) for c in table}
    assert len(met) == len(cases.ACTS) * len(cases.PS) * len(set(cases.shapes(table[0].op)))
    assert _values(table, 2) == set(cases.LAYOUTS) and _values(table, 3) == set(cases.NEEDS)
    assert {c.act for c in table} == set(activations.NAMES)


ACT, P, LAYOUT, NEEDS, INTEGERS, BIAS = range(6)


def test_any_two_values_of_two_axes_meet(table):
    exact = [c for c in table if cases._is_exact(c.act, c.alpha, c.p, c.dtype)]
    kinds = [(table, i, j) for i, j in combinations((ACT, P, LAYOUT, NEEDS, BIAS), 2)]
    kinds += [(exact, i, INTEGERS) for i in (ACT, P, LAYOUT, NEEDS, BIAS)]
    for of, i, j in kinds:
        met = {(c.axes[i], c.axes[j]) for c in of}
        assert met == set(product(_values(of, i), _values(of, j)))
    of_shapes = {(c.m, c.k, c.n, c.layout) for c in table}
    assert len(of_shapes) == len(set(cases.shapes(table[0].op))) * len(cases.LAYOUTS)


def test_the_spread_holds_every_pair_and_every_shape_of_the_table(table):
    def pairs(found):
        return {pair for c in found for pair in combinations(enumerate(c.axes), 2)}

    few, fewest = cases.spread(table), cases.spread(table, pairs=False)
    assert pairs(few) == pairs(table)
    assert {v for c in fewest for v in enumerate(c.axes)} == {
        v for c in table for v in enumerate(c.axes)
    }
    for found in (few, fewest):
        assert {(c.m, c.k, c.n) for c in found} == set(cases.shapes(table[0].op))
    assert len(fewest) < len(few) < len(table) / 15


def _constants(folder, pattern):
    texts = [path.read_text() for path in sorted(Path(ROOT, folder).rglob("*.h"))]
    texts += [path.read_text() for path in sorted(Path(ROOT, folder).rglob("*.c*"))]
    return {int(n) for text in texts for n in re.findall(pattern, text)}


def test_every_tile_of_the_sources_has_its_edges_in_the_table():
    rows = _constants("csrc/cpu", r"\b(?:kMR|kBlockRows|kPieceRows|kFewRows|kSumRows) = (\d+);")
    vectors = _constants("csrc/cpu/vec", r"\bVL = (\d+);")
    assert rows and vectors
    assert rows <= set(cases.ROWS)
    assert _constants("csrc/cpu", r"\bkDepth = (\d+);") <= set(cases.INNER)
    assert {2 * n for n in vectors} <= set(cases.COLUMNS)
    assert _constants("csrc/cpu", r"\bkBlockCols = (\d+);") <= set(cases.COLUMNS)
    assert _constants("csrc/cpu", r"\bk(?:MaxWidth|FlatWidth) =\s+(\d+);") == {1024, 2048}
    assert {1024, 2048} <= set(cases.WIDE)


def test_every_tile_of_triton_has_its_edges_in_the_table():
    pytest.importorskip("triton", reason="Triton is not installed")
    from fusedmlp.backends.triton import tiles

    every = [tile for kind in tiles.TILES.values() for tile in kind]
    assert {tile.m for tile in every} <= set(cases.ROWS)
    assert {tile.n for tile in every} <= set(cases.COLUMNS)
    assert {tile.k for tile in every} <= set(cases.INNER)
    assert {tiles._TILE, tiles._SMALL_TILE} <= set(cases.WIDE)


def test_sizes_are_0_and_1_and_around_each_tile():
    for op in cases.OPS:
        m, k, n = ({shape[i] for shape in cases.shapes(op)} for i in range(3))
        tiles = [(m, cases.ROWS), (n, cases.COLUMNS)]
        tiles += [(k, cases.INNER)] if op != "bias_act_dropout" else [(n, cases.WIDE)]
        for sizes, edges in tiles:
            assert {0, 1} | {tile + i for tile in edges for i in (-1, 0, 1)} <= sizes


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_layout_has_the_same_values_in_other_places(layout):
    def made(layout):
        return cases.Case(
            "linear_act", 6, 5, 7, "prelu", 0.3, torch.float32, layout=layout
        ).inputs()

    for (name, t), plain in zip(made(layout).items(), made("contiguous").values(), strict=True):
        if layout == "expanded" and name == "x":
            assert t.stride(0) == 0 and torch.equal(t, plain[:1].expand(6, -1))
        elif layout == "3-D" and name in ("x", "dy"):
            assert t.shape == (3, 2, plain.shape[1]) and torch.equal(t.view(plain.shape), plain)
        else:
            assert name == "dy" or torch.equal(t, plain)
        if layout in ("transposed", "rows apart", "every second") and t.dim() == 2:
            assert not t.is_contiguous()
        assert (layout == "odd address") == (t.data_ptr() % 16 != 0)


def test_integers_are_exact_in_any_order():
    """So that equality can be asked for: all sums are integers that fp32 holds."""
    for op in cases.OPS:
        for case in cases.spread(cases.table(op, torch.float32)):
            if case.integers:
                inputs = {name: t.double() for name, t in case.inputs().items() if t.numel()}
                assert all(torch.equal(t.mul(4), t.mul(4).round()) for t in inputs.values())
                largest = {name: t.abs().max().item() for name, t in inputs.items()}
                z = case.k * largest.get("w", 1) * largest.get("x", 0) + largest.get("b", 0)
                terms = max(case.m, case.n, case.m * case.n * (case.act == "prelu"))
                assert 32 * terms * largest.get("dy", 0) * max(1, z) < 2**53


@pytest.mark.parametrize("slopes, terms", [(0, 37), (1, 37 * 29)], ids=["each column", "one"])
def test_a_slopes_gradient_is_the_sum_of_what_shares_it(slopes, terms):
    case = cases.Case("linear_act", 37, 5, 29, "prelu", 0.3, torch.float32, slope_elements=slopes)
    assert case.terms == {"y": 1, "dx": 29, "dw": 37, "db": 37, "dslope": terms}
