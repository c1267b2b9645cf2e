"""`make kernels`: compiles every Triton kernel for every target and lists what its code needs.

    python -m bench.kernels                    everything, about half an hour on two cores
    python -m bench.kernels --quick            one of each kind, a minute
    python -m bench.kernels --target sm_90 --out bench/results/kernels.json

No GPU is needed and none is asked for. Exit status 1 if a kernel for an NVIDIA GPU uses local
memory, needs more shared memory than the device has, or misses the tensor-core instruction it
should have.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from fusedmlp import activations, rng

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Kernel:
    """One thing to compile. tile: fields of configs.Tile, () where the op has its own."""

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
        from fusedmlp.kernels.triton import bias_act_dropout as epilogue
        from fusedmlp.kernels.triton import configs, linear_act
        from fusedmlp.kernels.triton.cross_entropy import cross_entropy
        from fusedmlp.kernels.triton.dgrad_act import dgrad_act

        # Sizes: multiples of every tile, or odd ones, whose rows no vector instruction can load.
        m, n, k = (4096, 4096, 4096) if self.aligned else (4095, 4093, 4091)
        dtype = _DTYPES[self.dtype]

        def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=kind, device="meta")

        act = activations.IDS[self.act]
        threshold, scale = rng.threshold_and_scale(self.p)
        slope = empty(n) if self.act == "prelu" else None
        state = empty(2, kind=torch.int64)
        numbers = act, 0.01, threshold, scale, 0, 0
        saves = activations.saves(act, 0.01, dtype, self.p > 0)
        sums = True, slope is not None
        tile = configs.Tile(*self.tile) if self.tile else None
        vectors = empty(n), slope, state
        if self.op == "linear_act":
            w = empty(n, k) if self.descriptors < 2 else empty(k, n).t()
            linear_act.run(empty(m, k), w, *vectors, *numbers, keep_h=True, tile=tile)
        elif self.op == "dgrad_act":
            saved = empty(m, n) if saves else None
            dgrad_act(empty(m, k), empty(k, n), saved, *vectors, *numbers, saves, *sums, tile=tile)
        elif self.op == "bias_act_dropout_fwd":
            epilogue.bias_act_dropout_fwd(empty(m, n), *vectors, *numbers)
        elif self.op == "bias_act_dropout_bwd":
            saved = empty(m, n) if saves else None
            epilogue.bias_act_dropout_bwd(empty(m, n), saved, *vectors, *numbers, saves, *sums)
        elif self.op == "dropout":
            epilogue.bias_act_dropout_fwd(empty(m, n), None, None, state, 0, 0.0, *numbers[2:])
        else:
            columns = 10 if self.op == "cross_entropy" else 50_257
            cross_entropy(empty(m, columns), empty(m, kind=torch.int64), 0.1)

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


def _products(target: str, quick: bool) -> Iterator[Kernel]:
    """Every tile that can be chosen: heaviest epilogue, backward, split; on sm_90 also the rest."""
    from fusedmlp.kernels.triton import configs

    from .triton_build import tile_target

    full = target == "sm_90" and not quick
    for kind, dtype in (("half", "bf16"), ("half", "fp16"), ("tf32", "fp32"), ("ieee", "fp32")):
        tiles = configs.fitting(kind, 2 if kind == "half" else 4, tile_target(target))
        plain = [t for t in tiles if not t.descriptors]
        if dtype == "fp16":
            # The same code as bf16 but for the conversions.
            tiles = tiles[::4] if full else ()
        elif quick:
            tiles = tiles[:: len(tiles) // 2]
        for tile in tiles:
            made = dict(target=target, dtype=dtype, kind=kind, tile=tuple(tile))
            yield Kernel("linear_act", **made, descriptors=int(tile.descriptors))
            yield Kernel("dgrad_act", **made, descriptors=2 * tile.descriptors)
            if full:
                # A tile with descriptors then goes by pointers too, as operands are not aligned.
                yield Kernel("linear_act", **made, aligned=False)
                yield Kernel("dgrad_act", **made, aligned=False)
            if not quick and not tile.descriptors:
                yield Kernel("linear_act", **made | {"tile": tuple(tile._replace(splits=4))})
        if dtype == "bf16":
            split = tuple(plain[0]._replace(splits=4))
            yield Kernel("linear_act", target, dtype, kind=kind, part=1, tile=split)
        if full and dtype == "bf16":
            tile = tuple(next(t for t in plain if (t.m, t.n) == (128, 128)))
            for act, p in itertools.product(activations.NAMES, (0.0, 0.1)):
                yield Kernel("linear_act", target, dtype, act, p, kind, tile)
                yield Kernel("dgrad_act", target, dtype, act, p, kind, tile)


def _elementwise(target: str, quick: bool) -> Iterator[Kernel]:
    for dtype in _DTYPES if target == "sm_90" and not quick else ("bf16",):
        for op in ("dropout", "cross_entropy", "cross_entropy of long rows"):
            yield Kernel(op, target, dtype)
        yield Kernel("bias_act_dropout_bwd", target, dtype, part=1)  # the second stage of its sums
        for op in ("bias_act_dropout_fwd", "bias_act_dropout_bwd"):
            for act in ("gelu",) if quick else activations.NAMES:
                yield Kernel(op, target, dtype, act)
            if not quick:
                yield Kernel(op, target, dtype, "gelu", aligned=False)


def _sample() -> tuple[Kernel, ...]:
    """What the test suite compiles: every kernel once, every target, each kind of product."""
    small = (64, 32, 64, 4, 4)
    return (
        Kernel("linear_act", "sm_90", "bf16", kind="half", tile=(64, 64, 64, 4, 4)),
        Kernel(
            "linear_act", "sm_90", "bf16", "relu", kind="half", tile=(*small, True), descriptors=1
        ),
        Kernel("linear_act", "sm_90", "fp16", "silu", kind="half", tile=small, aligned=False),
        Kernel("linear_act", "sm_90", "fp32", "tanh", kind="tf32", tile=(64, 32, 32, 4, 4)),
        Kernel("linear_act", "sm_90", "fp32", "elu", kind="ieee", tile=(64, 16, 32, 4, 3)),
        Kernel("linear_act", "sm_90", "bf16", kind="half", tile=(*small, False, 4)),
        Kernel("linear_act", "sm_90", "bf16", kind="half", tile=(*small, False, 4), part=1),
        Kernel("dgrad_act", "sm_90", "bf16", kind="half", tile=small),
        Kernel("bias_act_dropout_fwd", "sm_90", "fp32", "softplus"),
        Kernel("bias_act_dropout_bwd", "sm_90", "bf16", "prelu"),
        Kernel("bias_act_dropout_bwd", "sm_90", "bf16", part=1),
        Kernel("dropout", "sm_90", "bf16"),
        Kernel("cross_entropy", "sm_90", "bf16"),
        *(
            Kernel("linear_act", t, "bf16", kind="half", tile=small)
            for t in TARGETS
            if t != "sm_90"
        ),
    )


def kernels(targets: tuple[str, ...], quick: bool) -> list[Kernel]:
    """What is compiled, each once."""
    made = [k for t in targets for k in (*_products(t, quick), *_elementwise(t, quick))]
    return list(dict.fromkeys(made))


def report(kernel: Kernel) -> dict[str, Any]:
    """Compiles one kernel; its row of the table."""
    from . import triton_build

    row = {
        "op": kernel.op,
        "dtype": kernel.dtype,
        "kind": kernel.kind,
        "act": kernel.act,
        "p": kernel.p,
        "tile": "x".join(map(str, kernel.tile[:3])),
        "sizes": "aligned" if kernel.aligned else "odd",
    }
    with torch_setting(kernel.kind):
        launch = triton_build.launches_of(kernel.target, kernel.call)[kernel.part]
    row |= triton_build.build(launch, kernel.target)
    row["descriptors"] = launch.constants.get("DESCRIPTORS", 0)
    row["tile"] = row["tile"] or "x".join(
        str(launch.constants[c]) for c in ("BLOCK_M", "BLOCK_S", "BLOCK_N") if c in launch.constants
    )
    row["expected"] = kernel.expects()
    row["wrong"] = _wrong(row)
    return row


class torch_setting:
    """torch's fp32 precision as the kind of product says, for as long as the host code runs."""

    def __init__(self, kind: str):
        self._kind = kind if kind in ("ieee", "tf32") else None

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.fp32_precision
        if self._kind:
            torch.backends.cuda.matmul.fp32_precision = self._kind

    def __exit__(self, *exc: object) -> None:
        torch.backends.cuda.matmul.fp32_precision = self._before


def _wrong(row: dict[str, Any]) -> str:
    """What a kernel must not do; '' when all is right. For AMD that it compiles is what counts."""
    if row["target"].startswith("gfx"):
        return ""
    found = []
    if row["local_bytes"] or row["local_accesses"]:
        found.append(f"{row['local_bytes']} bytes of local memory")
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, {row['shared_limit']} allowed")
    if row["expected"] not in row["tensor_core"].split(", "):
        found.append(f"no {row['expected']}, only {row['tensor_core'] or 'FFMA'}")
    return "; ".join(found)


def _report_or_error(kernel: Kernel) -> dict[str, Any]:
    try:
        return report(kernel)
    except Exception as error:  # a kernel that does not compile is a finding, not the end
        text = (str(error).splitlines() or [""])[0]
        return {
            "op": kernel.op,
            "target": kernel.target,
            "dtype": kernel.dtype,
            "act": kernel.act,
            "p": kernel.p,
            "tile": str(kernel.tile),
            "wrong": f"{type(error).__name__}: {text}",
        }


def dropout_instructions(target: str, sample: bool = False) -> list[dict[str, Any]]:
    """Instructions an element that dropout adds to straight-line epilogues of one tile."""
    rows = []
    tile = (64, 64, 64, 4, 4) if sample else (128, 128, 64, 8, 3)
    made = [Kernel("linear_act", target, "bf16", "relu", kind="half", tile=tile)]
    for dtype in ("bf16", "fp32"):
        made.append(Kernel("bias_act_dropout_fwd", target, dtype, "relu"))
    for kernel in made:
        fields = {f: getattr(kernel, f) for f in kernel.__dataclass_fields__}
        plain, dropped = (report(Kernel(**fields | {"p": p})) for p in (0.0, 0.1))
        size = [int(n) for n in dropped["tile"].split("x")]
        elements = size[0] * size[1] / (32 * dropped["warps"])
        names = plain["counts"].keys() | dropped["counts"].keys()
        more = {n: dropped["counts"].get(n, 0) - plain["counts"].get(n, 0) for n in names}
        top = sorted(more.items(), key=lambda item: -item[1])[:8]
        rows.append(
            {
                "op": kernel.op,
                "dtype": kernel.dtype,
                "target": target,
                "tile": dropped["tile"],
                "elements_per_thread": elements,
                "without": plain["instructions"],
                "with": dropped["instructions"],
                "per_element": round(sum(more.values()) / elements, 2),
                "by_instruction": {n: round(c / elements, 2) for n, c in top if c > 0},
            }
        )
    return rows


_COLUMNS = (
    "target",
    "op",
    "dtype",
    "kind",
    "act",
    "p",
    "tile",
    "warps",
    "stages",
    "descriptors",
    "sizes",
    "registers",
    "local_bytes",
    "shared_bytes",
    "tensor_core",
    "instructions",
    "seconds",
    "wrong",
)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, columns as wide as they need to be."""
    lines = [list(_COLUMNS)] + [[str(row.get(c, "")) for c in _COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one of each kind")
    parser.add_argument("--sample", action="store_true", help="what the test suite compiles")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated")
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    targets = tuple(args.target or TARGETS)
    with tempfile.TemporaryDirectory() as cache:
        # Its own cache: what is timed is compiled here and now.
        os.environ["TRITON_CACHE_DIR"] = cache
        start = time.perf_counter()
        todo = list(_sample()) if args.sample else kernels(targets, args.quick)
        rows = []
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            for row in pool.imap_unordered(_report_or_error, todo, chunksize=4):
                rows.append(row)
                if sys.stderr.isatty():
                    print(f"\r{len(rows)} of {len(todo)}", end="", file=sys.stderr, flush=True)
        rows.sort(key=lambda row: [str(row.get(c, "")) for c in _COLUMNS])
        counted = [r for t in targets if t == "sm_90" for r in dropout_instructions(t, args.sample)]
        seconds = time.perf_counter() - start
    print(table(rows))
    for r in counted:
        print(
            f"{r['target']} {r['op']} {r['dtype']} {r['tile']}: dropout adds {r['per_element']} "
            f"instructions an element: {r['by_instruction']}"
        )
    wrong = [row for row in rows if row["wrong"]]
    print(f"{len(rows)} kernels in {seconds:.0f} s, {len(wrong)} wrong")
    if args.out:
        for row in rows:
            row.pop("counts", None)
        args.out.write_text(
            json.dumps(
                {
                    "triton": triton.__version__,
                    "torch": torch.__version__,
                    "seconds": round(seconds),
                    "dropout_instructions": counted,
                    "kernels": rows,
                },
                indent=1,
            )
            + "\n"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
