"""Times the ops and networks of cases.py against PyTorch, and writes one results file.

    python -m bench.run --op bias_act_dropout --m 1024 --dims 1024 --p 0.5 --threads 2
    python -m bench.run --suite cpu --threads 2 --out bench/results/cpu.json
    python -m bench.run --suite gpu --seconds 420 --out bench/results/gpu/ops.json --resume

Prints ratios: on a shared machine the times themselves mean little. How it is timed: timing.py.
Never the place of a claim: tables come from the results file through report.py.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
import warnings
from pathlib import Path

import torch
import torch._functorch.config as functorch_config

from fusedmlp.backends import registry

from . import cases, record, timing
from .cases import Case
from .check import wrong
from .providers import Problem, Provider, Unavailable, default_names, route

# A cell of the grid below this is measured again, longer, and the new figure replaces the old one.
REMEASURE_BELOW = 0.98
NEVER_BELOW = 0.97


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.run", description=__doc__.splitlines()[0])
    p.add_argument("--suite", choices=sorted(cases.SUITES), help="a ready list of cases")
    p.add_argument("--group", nargs="+", help="only these groups of the suite")
    p.add_argument("--op", choices=cases.OPS, help="instead of a suite: one op")
    p.add_argument("--mode", nargs="+", choices=sorted(cases.MODES))
    p.add_argument("--m", type=int, nargs="+", default=[256], help="rows")
    p.add_argument("--dims", default="784-256", help="N, K-N, or in-hidden-out, as 784-256-10")
    p.add_argument("--act", nargs="+", default=["relu"])
    p.add_argument("--p", type=float, nargs="+", default=[0.0], help="one, or one per hidden layer")
    p.add_argument("--dtype", nargs="+", choices=sorted(cases.DTYPES), default=["fp32"])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--cache", choices=("warm", "cold"), default="warm")
    p.add_argument("--providers", nargs="+", help="only these, eager first")
    p.add_argument("--threads", type=int, help="torch.set_num_threads")
    p.add_argument(
        "--budget", type=float, help="seconds a provider and case (1; GPU 0.2; grid 0.15 of it)"
    )
    p.add_argument("--seconds", type=float, help="start no new case after this many")
    p.add_argument("--resume", action="store_true", help="keep the rows that --out already has")
    p.add_argument(
        "--fail-below", type=float, help=f"exit 1 if the grid goes below, as {NEVER_BELOW}"
    )
    p.add_argument("--out", type=Path, help="results file (JSON); none: only print")
    args = p.parse_args(argv)
    if args.suite and args.suite.startswith("gpu"):
        args.device = "cuda"
    if args.suite is None and args.op is None:
        if args.device == "cpu":
            p.error("--suite or --op must be given")
        args.suite = "gpu"
    if args.budget is None:
        args.budget = 1.0 if args.device == "cpu" else 0.2
    return args


def wanted(args: argparse.Namespace) -> list[Case]:
    """The cases that the arguments ask for."""
    if args.suite:
        return cases.select(cases.suite(args.suite), args.group)
    modes = args.mode or (["step"] if args.op == "net" else ["infer", "fwd", "bwd", "fwd+bwd"])
    dims = tuple(int(n) for n in args.dims.split("-"))
    p = tuple(args.p)
    if args.op == "net" and len(p) == 1:
        p *= max(1, len(dims) - 2)
    return [
        Case(args.op, args.op, mode, m, dims, act, p, dtype, args.device, args.cache)
        for m in args.m
        for act in args.act
        for dtype in args.dtype
        for mode in modes
    ]


@contextlib.contextmanager
def _settings(case: Case):
    """What a case needs of torch's global state."""
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
    # `bwd` runs backward many times on one graph; compiled backwards then may not reuse its memory.
    donated = functorch_config.patch(donated_buffer=case.mode != "bwd")
    try:
        with donated:
            yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


def run_case(case: Case, names: list[str] | None, budget_s: float) -> list[dict]:
    """The rows of one case: a figure for each provider, or the reason why there is none."""
    torch.manual_seed(0)
    with _settings(case), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = Problem(case)
        usable, rows = {}, []
        names = names or default_names(case)
        for name in names:
            reason = None
            try:
                provider = problem.provider(name)
                reason = wrong(problem, provider)
            except (Unavailable, registry.BackendError) as refusal:
                rows.append(case.columns() | {"provider": name, "unavailable": str(refusal)})
                continue
            except Exception as error:  # a baseline that cannot run is a row, not the end
                told = str(error).strip().splitlines() or [""]
                reason = f"{type(error).__name__}: {told[0]}"
            if reason:
                rows.append(case.columns() | {"provider": name, "error": reason})
            else:
                usable[name] = provider
        made = _timed(case, usable, budget_s)
        del problem, usable
    if {"compile", "max-autotune"} & set(names):
        torch.compiler.reset()
    gc.collect()
    return made + rows


def _timed(case: Case, usable: dict[str, Provider], budget_s: float) -> list[dict]:
    if not usable:
        return []
    runs = {name: provider.run for name, provider in usable.items()}
    cold = case.cache == "cold"
    timings = {"device": timing.measure(runs, timing.timer(case.device, cold), budget_s=budget_s)}
    state = record.clocks() if case.device == "cuda" else {}
    if case.device == "cuda" and case.mode == "step":
        wall = timing.timer(case.device, cold, wall=True)
        timings["wall"] = timing.measure(runs, wall, budget_s=budget_s / 2)
    made = []
    for clock, measured in timings.items():
        for name, t in measured.items():
            row = case.columns() | {"provider": name}
            row["clock"] = "wall" if case.device == "cpu" else clock
            ms, p20, p80 = timing.spread(t.ms)
            row |= {"ms": ms, "ms_p20": p20, "ms_p80": p80, "rounds": len(t.ms)}
            row["rounds_left_out"] = t.left_out
            if case.device == "cuda":
                row |= {"host_ms": timing.spread(t.host_ms)[0], "peak_mb": _peak(name, runs[name])}
            row |= _counted(case, ms)
            if "eager" in measured:
                row["eager_over_this"] = timing.ratio(measured["eager"], t)
            if "floor" in measured and name != "floor":
                row["over_floor"] = timing.ratio(t, measured["floor"])
            if usable[name].saved is not None:
                row["saved_bytes"] = usable[name].saved
            if name == "auto":
                row["route"] = route(case)
            made.append(row | state)
    return made


def _counted(case: Case, ms: float) -> dict:
    """FLOPs or bytes of the case, and their rate."""
    moved, work = cases.bytes_moved(case), cases.flops(case)
    if moved:
        return {"bytes": moved, "gb_per_s": moved / ms / 1e6}
    return {"flops": work, "tflop_per_s": work / ms / 1e9}


def _peak(name: str, run) -> float | None:
    """MB that one call needs beyond what was there; None where a CUDA graph holds its own pool."""
    if "graph" in name or name == "max-autotune":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _line(row: dict) -> str:
    if "ms" not in row:
        return f"    {row['provider']:13} {row.get('unavailable') or 'WRONG: ' + row['error']}"
    parts = [f"    {row['provider']:13} {row['ms']:10.4f} ms"]
    if "eager_over_this" in row:
        parts.append("eager/this {:6.2f} [{:.2f}, {:.2f}]".format(*row["eager_over_this"]))
    if "over_floor" in row:
        parts.append("this/floor {:6.2f} [{:.2f}, {:.2f}]".format(*row["over_floor"]))
    if row.get("clock") == "wall" and row["device"] == "cuda":
        parts.append("wall clock")
    return "  ".join(parts + ([row["route"]] if "route" in row else []))


def grid_row(rows: list[dict]) -> dict | None:
    """The row of automatic choice in one cell of the grid."""
    return next((r for r in rows if r["provider"] == "auto" and "eager_over_this" in r), None)


def grid_summary(rows: list[dict]) -> tuple[str, float]:
    """One line on the lowest cell of the grid, and its ratio."""
    cells = [r for r in rows if r["group"] == "grid" and r["provider"] == "auto"]
    timed = sorted((r for r in cells if "ms" in r), key=lambda r: r["eager_over_this"][0])
    if not timed:
        return "grid: no cell was timed", float("nan")
    low, mid = timed[0], timed[len(timed) // 2]
    lowest = low["eager_over_this"][0]
    below = sum(r["eager_over_this"][0] < NEVER_BELOW for r in timed)
    return (
        f"grid: eager / fused over {len(timed)} cells: lowest {lowest:.3f} at {describe(low)}, "
        f"median {mid['eager_over_this'][0]:.2f}, highest {timed[-1]['eager_over_this'][0]:.2f}; "
        f"{below} below {NEVER_BELOW}; {len(cells) - len(timed)} without a figure"
    ), lowest


def describe(row: dict) -> str:
    """A row's case in a few words."""
    p = "/".join(f"{p:g}" for p in row["p"])
    dims = "-".join(map(str, row["dims"]))
    return (
        f"{row['op']} {row['M']} x {dims} {row.get('act', '')} p={p} {row['dtype']} {row['mode']}"
    )


_CASE_COLUMNS = ("group", "op", "mode", "M", "dims", "act", "p", "dtype", "device", "cache")


def key(columns: dict) -> tuple:
    """What tells a case from another in a results file."""
    return tuple(str(columns.get(name)) for name in _CASE_COLUMNS)


def measure_all(args: argparse.Namespace, todo: list[Case], found: dict) -> list[Case]:
    """Adds the rows of each case to `found`, writing as it goes; returns what was left out."""
    started = time.monotonic()
    done = {key(row) for row in found["rows"]}
    todo = [case for case in todo if key(case.columns()) not in done]
    for i, case in enumerate(todo):
        if args.seconds is not None and time.monotonic() - started > args.seconds:
            return todo[i:]
        budget = args.budget * (0.15 if case.group == "grid" else 1.0)
        names = args.providers or default_names(case)
        rows = run_case(case, args.providers, budget * len(names))
        cell = grid_row(rows) if case.group == "grid" else None
        if cell and cell["eager_over_this"][0] < REMEASURE_BELOW:
            rows = run_case(case, args.providers, 4 * budget * len(names))
            rows = [row | {"remeasured": True} for row in rows]
        if case.group == "grid" and args.suite:
            cell = grid_row(rows)
            ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*cell["eager_over_this"]) if cell else "none"
            print(f"[{i + 1}/{len(todo)}] {case}: eager/auto {ratio}", flush=True)
            rows = [r for r in rows if "unavailable" not in r]
        else:
            print(f"[{i + 1}/{len(todo)}] {case}", *map(_line, rows), sep="\n", flush=True)
        found["rows"] += rows
        if args.out and (case.group != "grid" or i % 20 == 0):
            record.write(args.out, found)
    return []


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    todo = wanted(args)
    device = args.device
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "bench: --device cuda was asked for, but no GPU is available to torch", file=sys.stderr
        )
        return 2
    found = record.header(args.suite or args.op, "bench.run", argv, device) | {"rows": []}
    if args.resume and args.out and args.out.exists():
        before = record.read(args.out)
        if (before["commit"], before["machine"]) == (found["commit"], found["machine"]):
            found["rows"] = before["rows"]
    left = measure_all(args, todo, found)
    found["left_out"] = [str(case) for case in left]
    if left:
        print(f"bench: time was spent; {len(left)} cases left, first: {left[0]}")
    for row in (row for row in found["rows"] if "error" in row):
        print(f"bench: no figure for {row['provider']}, {describe(row)}: {row['error']}")
    status = 0
    if any(row["group"] == "grid" for row in found["rows"]):
        summary, lowest = grid_summary(found["rows"])
        print(summary)
        if args.fail_below is not None and not lowest >= args.fail_below:
            status = 1
    if args.out:
        record.write(args.out, found)
        print(f"bench: {len(found['rows'])} rows in {args.out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
