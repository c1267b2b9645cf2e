"""What `make kernels` compiles: every kernel and tile that a call could choose, by target."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import torch

from fusedmlp.spec import activations, philox
from fusedmlp.spec.layers import Epilogue

from .cases import DTYPES

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass(frozen=True)
class Kernel:
    """One thing to compile. tile: fields of tiles.Tile, () where the op has its own."""

    op: str
    target: str
    dtype: str
    act: str = "gelu"
    p: float = 0.1
    kind: str = ""  # of the product: half, tf32, ieee
    tile: tuple = ()
    aligned: bool = True
    descriptors: int = 0
    part: int = 0  # which launch of the op

    def call(self) -> None:
        """Calls the op on meta tensors."""
        from fusedmlp.backends.triton import bias_act_dropout as epilogue
        from fusedmlp.backends.triton import linear_act, tiles
        from fusedmlp.backends.triton.cross_entropy import cross_entropy
        from fusedmlp.backends.triton.dgrad_act import dgrad_act

        # Sizes: multiples of every tile, or odd ones, whose rows no vector instruction can load.
        m, n, k = (4096, 4096, 4096) if self.aligned else (4095, 4093, 4091)
        dtype, act = DTYPES[self.dtype], activations.IDS[self.act]

        def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=kind, device="meta")

        slope, state = empty(n) if self.act == "prelu" else None, empty(2, kind=torch.int64)
        drop = *philox.threshold_and_scale(self.p), 0, 0
        saves = activations.saves(act, 0.01, dtype, self.p > 0)
        back = empty(m, n) if saves else None, Epilogue(empty(n), slope, state, act, 0.01, *drop)
        back += saves, True, slope is not None
        e, tile = back[1], tiles.Tile(*self.tile) if self.tile else None
        if self.op == "linear_act":
            w = empty(n, k) if self.descriptors < 2 else empty(k, n).t()
            linear_act.run(empty(m, k), w, e, keep_preact=True, tile=tile)
        elif self.op == "dgrad_act":
            dgrad_act(empty(m, k), empty(k, n), *back, tile=tile)
        elif self.op == "bias_act_dropout_fwd":
            epilogue.bias_act_dropout_fwd(empty(m, n), e)
        elif self.op == "bias_act_dropout_bwd":
            epilogue.bias_act_dropout_bwd(empty(m, n), *back)
        elif self.op == "bias_act_dropout_bwd without sums":
            epilogue.bias_act_dropout_bwd(empty(m, n), *back[:3], False, False)
        elif self.op == "dropout":
            alone = Epilogue(None, None, state, 0, 0.0, *drop)
            epilogue.bias_act_dropout_fwd(empty(m, n), alone)
        else:
            columns = 10 if self.op == "cross_entropy" else 50_257
            cross_entropy(empty(m, columns), empty(m, kind=torch.int64), 0.1)

    @property
    def case(self) -> str:
        """A name that tells all cases apart."""
        fields = (int(f) if isinstance(f, bool) else f for f in astuple(self))
        return "/".join(".".join(map(str, f)) if isinstance(f, tuple) else str(f) for f in fields)

    def expects(self) -> str:
        """The tensor-core instruction that must be there, '' for none."""
        if not self.kind or self.kind == "ieee" or (self.op == "linear_act" and self.part == 1):
            return ""
        m = self.tile[0]
        if self.target.startswith("gfx"):
            return "MFMA" if self.kind == "half" else ""
        if m >= 64 and self.target in ("sm_90", "sm_100"):
            return {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}[self.target]
        return "HMMA"


def _products(target: str) -> Iterator[Kernel]:
    """Every tile that can be chosen: heaviest epilogue, backward, splits, odd rows."""
    from fusedmlp.backends.triton import tiles as choices

    from .triton_build import tile_target

    full, device = target == "sm_90", tile_target(target)
    for kind, dtype in (("half", "bf16"), ("half", "fp16"), ("tf32", "fp32"), ("ieee", "fp32")):
        tiles = choices.fitting(kind, 2 if kind == "half" else 4, device)
        plain = [t for t in tiles if not t.descriptors]
        if dtype == "fp16":
            # The same code as bf16 but for the conversions.
            tiles = tiles[::4] if full else ()
        for tile in tiles:
            made = dict(target=target, dtype=dtype, kind=kind, tile=tuple(tile))
            yield Kernel("linear_act", **made, descriptors=int(tile.descriptors))
            yield Kernel("dgrad_act", **made, descriptors=2 * tile.descriptors)
            if choices.for_odd_rows(tile, kind, device):
                yield Kernel("linear_act", **made, aligned=False)
                yield Kernel("dgrad_act", **made, aligned=False)
            if choices.can_split(tile, device):
                yield Kernel("linear_act", **made | {"tile": tuple(tile._replace(splits=4))})
        if dtype == "bf16":
            split = tuple(plain[0]._replace(splits=4))
            yield Kernel("linear_act", target, dtype, kind=kind, part=1, tile=split)
        if full and dtype == "bf16":
            tile = tuple(next(t for t in plain if (t.m, t.n) == (128, 128)))
            for act, p in itertools.product(activations.NAMES, (0.0, 0.1)):
                yield Kernel("linear_act", target, dtype, act, p, kind, tile)
                yield Kernel("dgrad_act", target, dtype, act, p, kind, tile)


def _elementwise(target: str) -> Iterator[Kernel]:
    for dtype in ("fp32", "fp16", "bf16") if target == "sm_90" else ("bf16",):
        for op in ("dropout", "cross_entropy", "cross_entropy of long rows"):
            yield Kernel(op, target, dtype)
        yield Kernel("bias_act_dropout_bwd", target, dtype, part=1)  # the second stage of its sums
        for aligned in (True, False):
            for op in ("bias_act_dropout_fwd", "bias_act_dropout_bwd"):
                for act in activations.NAMES:
                    yield Kernel(op, target, dtype, act, aligned=aligned)
            for act in ("prelu", "gelu", "silu"):  # the most that are live
                op = "bias_act_dropout_bwd without sums"
                yield Kernel(op, target, dtype, act, aligned=aligned)


def sample() -> list[Kernel]:
    """Every kernel once, every target, each kind of product: --quick, and the test suite."""
    small = (64, 32, 64, 4, 4)
    half = dict(kind="half", tile=small)
    return [
        Kernel("linear_act", "sm_90", "bf16", kind="half", tile=(64, 64, 64, 4, 4)),
        Kernel("linear_act", "sm_90", "bf16", "relu", 0.1, "half", (*small, True), descriptors=1),
        Kernel("linear_act", "sm_90", "fp16", "silu", **half, aligned=False),
        Kernel("linear_act", "sm_90", "fp32", "tanh", kind="tf32", tile=(64, 32, 32, 4, 4)),
        Kernel("linear_act", "sm_90", "fp32", "elu", kind="ieee", tile=(64, 16, 32, 4, 3)),
        Kernel("linear_act", "sm_90", "bf16", kind="half", tile=(*small, False, 4)),
        Kernel("linear_act", "sm_90", "bf16", kind="half", tile=(*small, False, 4), part=1),
        Kernel("dgrad_act", "sm_90", "bf16", **half),
        Kernel("bias_act_dropout_fwd", "sm_90", "fp32", "softplus"),
        Kernel("bias_act_dropout_bwd", "sm_90", "bf16", "prelu"),
        Kernel("bias_act_dropout_bwd", "sm_90", "bf16", part=1),
        Kernel("dropout", "sm_90", "bf16"),
        Kernel("cross_entropy", "sm_90", "bf16"),
        *(Kernel("linear_act", t, "bf16", **half) for t in TARGETS if t != "sm_90"),
    ]


def kernels(targets: tuple[str, ...] = TARGETS) -> list[Kernel]:
    """Everything, each once."""
    made = (k for t in targets for k in (*_products(t), *_elementwise(t)))
    return list(dict.fromkeys(made))
