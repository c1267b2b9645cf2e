"""`make kernels`: compiles every Triton kernel for every target and lists what its code needs.

    python -m bench.kernels                    everything, about half an hour on two cores
    python -m bench.kernels --quick            one of each kind, as the test suite, half a minute
    python -m bench.kernels --target sm_90 --out bench/results/kernels.json --resume
    python -m bench.kernels --out bench/results/kernels.json --check
    python -m bench.kernels --dropout-instructions --out bench/results/dropout_instructions.json

No GPU is needed and none is asked for. Exit status 1 if a kernel for an NVIDIA GPU uses local
memory, needs more shared memory than the device has, or misses the tensor-core instruction it
should have.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import record, timing
from .kernel_cases import TARGETS, Kernel, kernels, sample

_SHOWN = ("target", "op", "dtype", "kind", "act", "p", "tile", "warps", "stages", "descriptors")
_SHOWN += ("sizes", "registers", "local_bytes", "shared_bytes", "tensor_core", "instructions")
_SHOWN += ("seconds", "wrong")


def _launch(kernel: Kernel) -> Any:
    from . import triton_build

    with timing.products(kernel.kind):
        return triton_build.launches_of(kernel.target, kernel.call)[kernel.part]


def code_of(kernel: Kernel, version: str) -> str:
    """A hash of all that decides a kernel's machine code, by a Triton; compiles nothing."""
    from . import triton_build

    return triton_build.code_hash(_launch(kernel), kernel.target, version)


def report(kernel: Kernel) -> dict[str, Any]:
    """Compiles one kernel; its row of the table, and under `counts` its instructions by name."""
    from . import triton_build

    row = _about(kernel) | {"kind": kernel.kind, "tile": "x".join(map(str, kernel.tile[:3]))}
    row["sizes"] = "aligned" if kernel.aligned else "odd"
    launch = _launch(kernel)
    row["code"] = triton_build.code_hash(launch, kernel.target)
    row |= triton_build.build(launch, kernel.target)
    row["descriptors"] = launch.constants.get("DESCRIPTORS", 0)
    sizes = (launch.constants.get(name) for name in ("BLOCK_M", "BLOCK_S", "BLOCK_N"))
    row["tile"] = row["tile"] or "x".join(str(size) for size in sizes if size is not None)
    row["expected"] = kernel.expects()
    row["wrong"] = _wrong(row)
    return row


def _about(kernel: Kernel) -> dict[str, Any]:
    return {name: getattr(kernel, name) for name in ("case", "op", "target", "dtype", "act", "p")}


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
        wrong = f"{type(error).__name__}: {text}"
        return _about(kernel) | {"tile": str(kernel.tile), "wrong": wrong}


def dropout_instructions(target: str, small: bool = False) -> Iterator[dict[str, Any]]:
    """Instructions an element that dropout adds to straight-line epilogues of one tile."""
    tile = (64, 64, 64, 4, 4) if small else (128, 128, 64, 8, 3)
    made = [Kernel("linear_act", target, "bf16", "relu", kind="half", tile=tile)]
    made += [Kernel("bias_act_dropout_fwd", target, dtype, "relu") for dtype in ("bf16", "fp32")]
    for kernel in made:
        plain, dropped = (report(replace(kernel, p=p)) for p in (0.0, 0.1))
        size = [int(n) for n in dropped["tile"].split("x")]
        elements = size[0] * size[1] / (32 * dropped["warps"])
        names = plain["counts"].keys() | dropped["counts"].keys()
        more = {n: dropped["counts"].get(n, 0) - plain["counts"].get(n, 0) for n in names}
        top = sorted(more.items(), key=lambda item: (-item[1], item[0]))[:8]
        yield {
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


def kept(path: Path, todo: list[Kernel], version: str) -> list[dict[str, Any]]:
    """Rows of an earlier run whose code is the same by that Triton, and which were right."""
    codes = {kernel.case: code_of(kernel, version) for kernel in todo}
    return record.kept(path, lambda r: r.get("code") == codes.get(r["case"], "") and not r["wrong"])


def compile_all(results: record.Results, todo: list[Kernel], workers: int) -> None:
    """Adds the rows that `results` does not have; at the end they are in the order of the list."""
    order = {kernel.case: i for i, kernel in enumerate(todo)}
    done = {row["case"] for row in results.rows}
    # Fresh processes, one at least: what LLVM does to a process is not this one's end.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for row in pool.map(_report_or_error, [k for k in todo if k.case not in done]):
            results.head["left"] = len(todo) - len(results.rows) - 1
            results.add(row, columns=_SHOWN)
    results.rows.sort(key=lambda row: order[row["case"]])
    results.head["left"] = len(todo) - len(results.rows)
    results.write()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one of each kind")
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
    name = "dropout_instructions" if args.dropout_instructions else "kernels"
    results = record.Results(record.header(name, "bench.kernels", argv), args.out)
    with tempfile.TemporaryDirectory() as cache:
        # Its own cache: what is timed is compiled here and now.
        os.environ["TRITON_CACHE_DIR"] = cache
        start = time.perf_counter()
        if args.dropout_instructions:
            results.add(*dropout_instructions("sm_90", args.quick))
            return 0
        todo = sample() if args.quick else kernels()
        todo = [kernel for kernel in todo if kernel.target in (args.target or TARGETS)]
        if args.check:
            # Of the Triton that the file is of, whichever is installed.
            version = record.read(args.out)["versions"]["triton"]
            results.rows = kept(args.out, todo, version)
            print(f"{len(results.rows)} of {len(todo)} kernels are in {args.out}, right")
            return 0 if len(results.rows) == len(todo) else 1
        if args.resume:
            results.rows = kept(args.out, todo, results.head["versions"]["triton"])
        from . import triton_build

        results.head["kernels"] = triton_build.kernels_hash()[:16]
        compile_all(results, todo, args.workers)
    wrong = [row for row in results.rows if row["wrong"]]
    seconds = time.perf_counter() - start
    print(f"{len(results.rows)} kernels in {seconds:.0f} s, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
