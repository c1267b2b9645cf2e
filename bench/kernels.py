"""`make kernels`: compiles every Triton kernel for every target and lists what its code needs.

    python -m bench.kernels                    everything, about half an hour on two cores
    python -m bench.kernels --quick            one of each kind, a minute
    python -m bench.kernels --target sm_90 --out bench/results/kernels.json --resume
    python -m bench.kernels --out bench/results/kernels.json --check
    python -m bench.kernels --dropout-instructions --out bench/results/dropout_instructions.json

No GPU is needed and none is asked for. Exit status 1 if a kernel for an NVIDIA GPU uses local
memory, needs more shared memory than the device has, or misses the tensor-core instruction it
should have.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import record
from .kernel_cases import TARGETS, Kernel, kernels, sample

_PARTIAL_EVERY = 30.0  # seconds between two writings of a results file that is being made


def _launch(kernel: Kernel) -> Any:
    from . import triton_build

    with torch_setting(kernel.kind):
        return triton_build.launches_of(kernel.target, kernel.call)[kernel.part]


def code_of(kernel: Kernel) -> str:
    """A hash of all that decides a kernel's machine code; compiles nothing."""
    from . import triton_build

    return triton_build.code_hash(_launch(kernel), kernel.target)


def report(kernel: Kernel) -> dict[str, Any]:
    """Compiles one kernel; its row of the table."""
    from . import triton_build

    row = {
        "case": kernel.case,
        "op": kernel.op,
        "dtype": kernel.dtype,
        "kind": kernel.kind,
        "act": kernel.act,
        "p": kernel.p,
        "tile": "x".join(map(str, kernel.tile[:3])),
        "sizes": "aligned" if kernel.aligned else "odd",
    }
    launch = _launch(kernel)
    row["code"] = triton_build.code_hash(launch, kernel.target)
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
        row = report(kernel)
        row.pop("counts")
        return row
    except Exception as error:  # a kernel that does not compile is a finding, not the end
        text = (str(error).splitlines() or [""])[0]
        return {
            "case": kernel.case,
            "op": kernel.op,
            "target": kernel.target,
            "dtype": kernel.dtype,
            "act": kernel.act,
            "p": kernel.p,
            "tile": str(kernel.tile),
            "wrong": f"{type(error).__name__}: {text}",
        }


def dropout_instructions(target: str, small: bool = False) -> list[dict[str, Any]]:
    """Instructions an element that dropout adds to straight-line epilogues of one tile."""
    rows = []
    tile = (64, 64, 64, 4, 4) if small else (128, 128, 64, 8, 3)
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
        top = sorted(more.items(), key=lambda item: (-item[1], item[0]))[:8]
        rows.append(
            {
                "kernel": dropped["kernel"],
                "dtype": kernel.dtype,
                "target": target,
                "tile": "x".join(map(str, size[:2])),
                "elements_a_thread": int(elements),
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


class Results:
    """The rows that are there, written to a file every so often, so that a stop loses nothing."""

    def __init__(self, out: Path | None, head: dict[str, Any], todo: list[Kernel], resume: bool):
        self.out, self.head, self.cases = out, head, [k.case for k in todo]
        self._codes = {k.case: code_of(k) for k in todo} if resume else {}
        self.found: dict[str, dict[str, Any]] = {}
        if resume:
            self.found = {row["case"]: row for row in self._kept()}
        self._written = time.monotonic()

    def _kept(self) -> list[dict[str, Any]]:
        """Rows of an earlier run whose code is the same; those that were wrong are made again."""
        try:
            before = json.loads(self.out.read_text())["rows"]
        except (OSError, ValueError):
            return []
        same = self._codes
        return [r for r in before if r.get("code") == same.get(r["case"], "") and not r["wrong"]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """In the order of the list of cases."""
        return [self.found[case] for case in self.cases if case in self.found]

    def add(self, row: dict[str, Any]) -> None:
        self.found[row["case"]] = row
        if time.monotonic() - self._written > _PARTIAL_EVERY:
            self.write()

    def write(self) -> None:
        if self.out:
            left = len(self.cases) - len(self.found)
            record.write(self.out, self.head | {"left": left, "rows": self.rows})
        self._written = time.monotonic()


def _compile(todo: list[Kernel], workers: int) -> Iterator[dict[str, Any]]:
    # Fresh processes, one at least: what LLVM does to a process is not this one's end.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_report_or_error, todo)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one of each kind")
    parser.add_argument("--sample", action="store_true", help="what the test suite compiles")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated")
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has")
    parser.add_argument(
        "--check", action="store_true", help="compile nothing: is --out complete and of this code?"
    )
    parser.add_argument(
        "--dropout-instructions", action="store_true", help="count what dropout adds, sm_90"
    )
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    if (args.resume or args.check) and not args.out:
        parser.error("--resume and --check need --out")
    targets = tuple(args.target or TARGETS)
    name = "dropout_instructions" if args.dropout_instructions else "kernels"
    head = record.header(name, "bench.kernels", argv)
    with tempfile.TemporaryDirectory() as cache:
        # Its own cache: what is timed is compiled here and now.
        os.environ["TRITON_CACHE_DIR"] = cache
        start = time.perf_counter()
        if args.dropout_instructions:
            return _count_dropout(args, head)
        todo = sample() if args.sample else kernels(targets, args.quick)
        results = Results(args.out, head, list(todo), args.resume or args.check)
        if args.check:
            print(f"{len(results.found)} of {len(todo)} kernels are in {args.out}, right")
            return 0 if len(results.found) == len(todo) else 1
        for row in _compile([k for k in todo if k.case not in results.found], args.workers):
            results.add(row)
            if sys.stderr.isatty():
                print(f"\r{len(results.found)} of {len(todo)}", end="", file=sys.stderr, flush=True)
        results.write()
    rows = results.rows
    print(table(rows))
    wrong = [row for row in rows if row["wrong"]]
    print(f"{len(rows)} kernels in {time.perf_counter() - start:.0f} s, {len(wrong)} wrong")
    return 1 if wrong else 0


def _count_dropout(args: argparse.Namespace, head: dict[str, Any]) -> int:
    rows = dropout_instructions("sm_90", args.sample)
    for r in rows:
        print(
            f"{r['target']} {r['kernel']} {r['dtype']} {r['tile']}: dropout adds "
            f"{r['per_element']} instructions an element: {r['by_instruction']}"
        )
    if args.out:
        record.write(args.out, head | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
