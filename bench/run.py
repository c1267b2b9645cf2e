"""Times the ops and networks of cases.py against PyTorch, and writes one results file.

    python -m bench.run --op bias_act_dropout --m 1024 --dims 1024 --p 0.5 --threads 2
    python -m bench.run --suite cpu --threads 2 --out bench/results/cpu.json
    python -m bench.run --suite gpu --seconds 420 --out bench/results/gpu/ops.json --resume

Prints ratios: on a shared machine the times themselves mean little. How it is timed: timing.py.
Never the place of a claim: tables come from the results file through report.py.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from pathlib import Path

import torch
import torch._functorch.config as functorch_config

from fusedmlp.backends import registry

from . import cases, record, tables, timing
from .cases import Case
from .check import wrong
from .providers import Problem, Provider, Unavailable, default_names, ran_on, route

# A cell of the grid below this is measured again, longer, and the new figure replaces the old one.
REMEASURE_BELOW = 0.98


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
        "--fail-below", type=float, help=f"exit 1 if the grid goes below, as {tables.NEVER_BELOW}"
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
        found = cases.SUITES[args.suite]()
        return [case for case in found if not args.group or case.group in args.group]
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


def run_case(case: Case, names: list[str] | None, budget_s: float) -> list[dict]:
    """The rows of one case: a figure for each provider, or the reason why there is none."""
    torch.manual_seed(0)
    names = names or default_names(case)
    usable, rows = {}, []
    # `bwd` runs backward many times on one graph; compiled backwards then may not reuse its memory.
    donated = functorch_config.patch(donated_buffer=case.mode != "bwd")
    with timing.products(case.dtype), donated, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = Problem(case)
        for name in names:
            row = case.columns() | {"provider": name}
            try:
                provider = problem.provider(name)
                reason = wrong(problem, provider)
            except (Unavailable, registry.BackendError) as refusal:
                rows.append(row | {"unavailable": str(refusal)})
                continue
            except Exception as error:  # a baseline that cannot run is a row, not the end
                told = str(error).strip().splitlines() or [""]
                reason = f"{type(error).__name__}: {told[0]}"
            if reason:
                rows.append(row | {"error": reason})
            else:
                usable[name] = provider
        made = _timed(case, usable, budget_s) if usable else []
        del problem, usable
    if {"compile", "max-autotune"} & set(names):
        torch.compiler.reset()
    gc.collect()
    return made + rows


def _timed(case: Case, usable: dict[str, Provider], budget_s: float) -> list[dict]:
    runs = {name: provider.run for name, provider in usable.items()}
    cold, cuda = case.cache == "cold", case.device == "cuda"
    clock = "device" if cuda else "wall"
    timings = {clock: timing.measure(runs, timing.timer(case.device, cold), budget_s=budget_s)}
    state = record.clocks() if cuda else {}
    if cuda and case.mode == "step":
        wall = timing.timer(case.device, cold, wall=True)
        timings["wall"] = timing.measure(runs, wall, budget_s=budget_s / 2)
    made = []
    for clock, measured in timings.items():
        for name, t in measured.items():
            row = case.columns() | {"provider": name, "clock": clock}
            ms, p20, p80 = timing.spread(t.ms)
            row |= {"ms": ms, "ms_p20": p20, "ms_p80": p80, "rounds": len(t.ms)}
            row["rounds_left_out"] = t.left_out
            if cuda:
                row |= {"host_ms": timing.spread(t.host_ms)[0], "peak_mb": _peak(name, runs[name])}
            row |= _counted(case, ms)
            if "eager" in measured:
                row["eager_over_this"] = timing.ratio(measured["eager"], t)
            if "floor" in measured and name != "floor":
                row["over_floor"] = timing.ratio(t, measured["floor"])
            if usable[name].saved is not None:
                row["saved_bytes"] = usable[name].saved
            if name == "auto":
                fused = usable[name].fused
                row["route"] = route(case) if fused is None else ran_on(fused)
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


_SHOWN = ("provider", "ms", "eager_over_this", "over_floor", "clock", "route", "unavailable")
_SHOWN += ("error",)


def measure_all(args: argparse.Namespace, todo: list[Case], results: record.Results) -> list[Case]:
    """Adds the rows of each case; returns the cases that there was no time for."""
    started = time.monotonic()
    done = {tables.key(row) for row in results.rows}
    todo = [case for case in todo if tables.key(case.columns()) not in done]
    for i, case in enumerate(todo):
        if args.seconds is not None and time.monotonic() - started > args.seconds:
            return todo[i:]
        is_grid = case.group == "grid"
        budget = args.budget * (0.15 if is_grid else 1.0)
        budget *= len(args.providers or default_names(case))
        rows = run_case(case, args.providers, budget)
        ratios = [r["eager_over_this"][0] for r in rows if r["provider"] == "auto" and "ms" in r]
        if is_grid and any(ratio < REMEASURE_BELOW for ratio in ratios):
            rows = run_case(case, args.providers, 4 * budget)
            rows = [row | {"remeasured": True} for row in rows]
        if is_grid and args.suite:
            rows = [r for r in rows if "unavailable" not in r]
        print(f"[{i + 1}/{len(todo)}] {case}", flush=True)
        results.add(*rows, columns=_SHOWN)
    return []


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    todo = wanted(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        told = "--device cuda was asked for, but no GPU is available to torch"
        print(f"bench: {told}", file=sys.stderr)
        return 2
    head = record.header(args.suite or args.op, "bench.run", argv, args.device)
    results = record.Results(head, args.out)
    if args.resume and args.out and args.out.exists():
        before = record.read(args.out)
        if (before["commit"], before["machine"]) == (head["commit"], head["machine"]):
            results.rows = before["rows"]
    left = measure_all(args, todo, results)
    head["left_out"] = [str(case) for case in left]
    results.write()
    if left:
        print(f"bench: time was spent; {len(left)} cases left, first: {left[0]}")
    for row in (row for row in results.rows if "error" in row):
        print(f"bench: no figure for {row['provider']}, {tables.describe(row)}: {row['error']}")
    if not any(row["group"] == "grid" for row in results.rows):
        return 0
    summary, lowest = tables.grid_summary(results.rows)
    print(summary)
    return 0 if args.fail_below is None or lowest >= args.fail_below else 1


if __name__ == "__main__":
    sys.exit(main())
