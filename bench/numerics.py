"""Runs the whole table of cases on a CPU, for docs/kernels.md: what is right, and what has the same
bits. A GPU's cases are run there by `fusedmlp verify --full`.

    python -m bench.numerics                      # minutes; make numerics
    python -m bench.numerics --only bits          # one part again

Parts: `table`, every case on every backend and instruction set; `interpreter`, a spread of them on
Triton's interpreter; `bits`, the same bits in other circumstances; `large`, tensors of more than
2^31 elements, for which 13 GiB of memory must be free; `dropout`, mean and correlations of 2^28
draws, and masks with known faults, which they must find. Exits with 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fusedmlp import functional as FF
from fusedmlp.backends import native
from fusedmlp.commands import cases, repeats, verify
from fusedmlp.ops import BY_BACKEND
from fusedmlp.spec import activations, dtypes, philox
from tests import mask_statistics

from . import record

RESULTS = record.ROOT / "bench" / "results" / "numerics.json"
_COLUMNS = ("part", "backend", "op", "dtype", "what", "cases", "equal", "worst", "wrong", "error")
_FREE = 13 << 30


def _row(part: str, v: verify.Verdict) -> dict:
    row = {"part": part, "backend": str(v.runner), "op": v.op, "dtype": v.dtype, "what": "values"}
    row |= {"cases": v.cases, "equal": v.equal, "worst": v.worst, "wrong": v.wrong}
    return row | {"masks": v.masks, "error": v.error}


def table() -> Iterator[dict]:
    for verdict in verify.verify(full=True):
        yield _row("table", verdict)


# In a process of its own: Triton reads TRITON_INTERPRET when it is first imported.
_INTERPRETED = """
import json, pytest
from bench import numerics
from fusedmlp.commands import cases, verify
from tests import interpreter

assert not interpreter.unusable(), interpreter.unusable()
with pytest.MonkeyPatch.context() as patch:
    interpreter.use_triton(patch)
    for op in cases.OPS:
        for dtype in cases.DTYPES.values():
            found = cases.spread(cases.table(op, dtype))
            for v in verify.verify_cases([verify.Runner("triton")], found):
                print("row", json.dumps(numerics._row("interpreter", v)), flush=True)
"""


def interpreter() -> Iterator[dict]:
    command = [sys.executable, "-W", "ignore", "-c", _INTERPRETED]
    environ = os.environ | {"TRITON_INTERPRET": "1"}
    options = dict(env=environ, cwd=record.ROOT, text=True, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **options) as process:
        for line in process.stdout:
            if line.startswith("row "):
                yield json.loads(line[4:])
    if process.returncode:
        raise SystemExit("numerics: the interpreter's process failed (see above)")


def bits() -> Iterator[dict]:
    for op in cases.OPS:
        for dtype in cases.DTYPES.values():
            for runner in verify.runners(op, dtype, "cpu"):
                if runner.backend != "native":
                    continue
                found = [*cases.shared(op, dtype), *cases.spread(cases.table(op, dtype))]
                results = lambda case, r=runner: verify.run(case, r.backend)  # noqa: E731
                with runner.set():
                    for what, wrong in repeats.changed(found, results, repeats.promised(op, "cpu")):
                        yield {
                            "part": "bits", "backend": str(runner), "op": op,
                            "dtype": dtypes.SHORT[dtype], "what": what, "cases": len(found),
                            "wrong": len(wrong), "error": str(wrong[0]) if wrong else "",
                        }  # fmt: skip


_COLUMNS_OF_LARGE, _ROWS_OF_LARGE = 1 << 15, (1 << 16) + 3


def _pattern(rows: int, columns: int, first: int = 0) -> torch.Tensor:
    """(rows, columns) bf16: small integers that no short distance repeats; rows from `first` on."""
    row = torch.arange(first, first + rows).unsqueeze(1)
    return ((row * 7 + torch.arange(columns) * 5 + row // 64) % 23 - 11).to(torch.bfloat16)


def _blocks() -> Iterator[slice]:
    """Rows in blocks."""
    for first in range(0, _ROWS_OF_LARGE, 512):
        yield slice(first, min(first + 512, _ROWS_OF_LARGE))


def _large_elementwise(p: float) -> list[str]:
    """What is wrong with y and dz of more than 2^31 elements, each compared with its block alone
    and with the mask of the specification."""
    rows, columns, wrong = _ROWS_OF_LARGE, _COLUMNS_OF_LARGE, []
    x = torch.empty(rows, columns, dtype=torch.bfloat16)
    for block in _blocks():
        x[block] = _pattern(block.stop - block.start, columns, block.start)
    b = _pattern(1, columns)[0]
    threshold, scale = philox.threshold_and_scale(p)
    state = torch.tensor([verify.SEED, verify.STREAM])
    numbers = (activations.IDS["relu"], 0.0, threshold, scale, 0, 0)
    ops = BY_BACKEND["native"]
    y = ops.bias_act_dropout_fwd(x, b, None, state, *numbers)
    del x
    dy = _pattern(1, columns, 5).expand(rows, columns)
    dz, db, _ = ops.bias_act_dropout_bwd(dy, y, b, None, state, *numbers, 1, True, False)
    total = torch.zeros(columns, dtype=torch.float64)
    # A few blocks of the mask: it takes plain PyTorch minutes to draw all of it.
    drawn = {0, 1 << 15, (1 << 15) - 512, 1 << 16, (1 << 16) - 512}
    for block in _blocks():
        z = _pattern(block.stop - block.start, columns, block.start).float() + b.float()
        keep = y[block] != 0
        if p and block.start in drawn:
            mask = philox.keep_mask(state, 0, len(z), columns, threshold, block.start)
            wrong += ["y"] * (not torch.equal(keep, mask & (z > 0)))
        if not torch.equal(y[block], torch.where(keep | (p == 0), z.relu() * scale, 0).bfloat16()):
            wrong.append("y")
        gradient = torch.where(keep, dy[block].float() * scale, 0)
        wrong += ["dz"] * (not torch.equal(dz[block], gradient.bfloat16()))
        total += gradient.sum(0)
    return wrong + ["db"] * (not torch.equal(db, total.bfloat16()))


def _large_product(op: str, dtype: torch.dtype) -> list[str]:
    """What is wrong with the (M, N) of a product, by blocks of its rows."""
    n, rows = 512, (1 << 22) + 5
    x, w, b = _pattern(rows, 4), _pattern(n, 4, 3), _pattern(1, n)[0]
    case = cases.Case(op, rows, 4, n, "relu", 0.0, dtype)
    leaves = {"x": x.to(dtype), "w": w.to(dtype), "b": b.to(dtype)}
    with torch.no_grad():
        y = verify.call(case, leaves, "native")
        for first in range(0, rows, 1 << 17):
            block = slice(first, first + (1 << 17))
            want = FF.linear_act(
                *(t.float() for t in (x[block], w, b)), "relu", backend="reference"
            )
            if not torch.equal(y[block], want.to(dtype)):
                return ["y"]
    return []


def large() -> Iterator[dict]:
    elements = _ROWS_OF_LARGE * _COLUMNS_OF_LARGE
    made = {
        ("bias_act_dropout", "bf16", f"{elements} elements"): lambda: _large_elementwise(0.0),
        ("bias_act_dropout", "bf16", f"{elements} elements, p = 0.5"): lambda: _large_elementwise(
            0.5
        ),
        ("linear_act", "bf16", f"{((1 << 22) + 5) * 512} outputs"): lambda: _large_product(
            "linear_act", torch.bfloat16
        ),
        ("mlp", "fp32", f"{((1 << 22) + 5) * 512} outputs"): lambda: _large_product(
            "mlp", torch.float32
        ),
    }
    for (op, dtype, what), check in made.items():
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = max(free, _available())
        if free < _FREE:
            raise SystemExit(f"numerics: large needs {_FREE >> 30} GiB, {free >> 30} are free")
        wrong = check()
        yield {
            "part": "large", "backend": f"native {native.cpu_isa()}", "op": op, "dtype": dtype,
            "what": what, "cases": 1, "equal": 1, "wrong": int(bool(wrong)),
            "error": ", ".join(dict.fromkeys(wrong)),
        }  # fmt: skip


def _available() -> int:
    """Bytes that Linux would give, what it keeps of files included."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


_SIDE = 1 << 14  # rows and columns of 2^28 draws


def dropout() -> Iterator[dict]:
    row = {"part": "dropout", "backend": f"native {native.cpu_isa()}", "op": "bias_act_dropout"}
    row |= {"dtype": "bf16", "cases": mask_statistics.LOOKS}
    masks = {}
    for p in (0.001, 0.05, 0.1, 0.3, 0.5, 0.9):
        with FF.dropout_state(torch.tensor([verify.SEED, verify.STREAM])):
            x = torch.ones(_SIDE, _SIDE, dtype=torch.bfloat16)
            masks[p] = FF.bias_act_dropout(x, p=p, backend="native") != 0
        found = mask_statistics.suspicious(masks[p], philox.threshold_and_scale(p)[1], p)
        what = f"{_SIDE * _SIDE} draws of p = {p}"
        yield row | {"what": what, "wrong": len(found), "error": ", ".join(found)}
        masks = {0.1: masks[0.1]} if 0.1 in masks else {}
    for what, sign, keep in (
        ("a threshold of one byte is found", "mean", mask_statistics.byte_wide(_SIDE, _SIDE, 0.1)),
        ("rows that repeat are found", "lag (32, 0)", mask_statistics.repeating(masks[0.1])),
    ):
        found = mask_statistics.suspicious(keep, 1 / 0.9, 0.1)
        yield row | {"what": what, "wrong": int(sign not in found), "error": ""}


PARTS = {
    "table": table, "interpreter": interpreter, "bits": bits, "large": large, "dropout": dropout,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.numerics", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file (JSON)")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part again")
    args = parser.parse_args(argv)
    asked = args.only or list(PARTS)
    head = record.header("numerics", "bench.numerics", argv)
    results = record.resumed(head, args.out) if args.only else record.Results(head, args.out)
    results.rows = [row for row in results.rows if row["part"] not in asked]
    for part in asked:
        start = time.perf_counter()
        for row in PARTS[part]():
            results.add(row, columns=_COLUMNS)
        print(f"numerics: {part} took {time.perf_counter() - start:.0f} s", flush=True)
    wrong = sum(row["wrong"] for row in results.rows)
    print(f"numerics: {sum(row['cases'] for row in results.rows)} cases, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
