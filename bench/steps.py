"""Times a training step: the native engine and its rivals on a CPU, and every way to write a step
on a GPU.

    python -m bench.steps --threads 2 --starts 8 --out bench/results/engine_step.json
    python -m bench.steps --group batch width depth threads ensemble --threads 1 2
    python -m bench.steps --group rivals --threads 2 --busy 0 1 2 --out bench/results/rivals.json
    python -m bench.steps --device cuda --seconds 120 --out bench/results/gpu/steps.json
    python -m bench.steps --group ways epochs --dims 12-16-3 --rows 512 --steps 4  # that, on a CPU

One process, rounds in which each function is timed once, in random order (timing.py); ratios are
what to read. Groups on a CPU, of the native engine, which gathers and scales uint8 rows itself:
  main, batch, width, depth  against eager (nn.Sequential on rows in memory as floats) and GEMMs:
                  its products by torch.mm into memory that is there, in the faster orientation;
                  main also in bf16, where the processor has VDPBF16PS
  threads         the main cases with 1 thread and with each of --threads, in the same rounds
  ensemble        a step of 1 to 64 networks at once (native_many.py) against a step of one
  rivals          --steps steps of the engine, of eager, and of the others in rivals.py, held
                  against fp64 first as below; what a way compiles is in a column of its own. The
                  first two of the main cases: beside busy programs the others take minutes
Of these, a share of the processor's peak in their dtype, measured in the same run (peak.py).
--busy 1 times each case beside a process that is never idle; --busy 0 1 also over the time without.
--starts 8 does it all in so many processes: then [median, lowest, highest] of their medians.
Groups on a GPU:
  ways            --steps steps by the wall clock with one wait at the end; every way has the data
                  on the device, takes row numbers, and sums its losses:
                    eager          nn.Sequential under autocast or not, fp32 images in memory
                    eager graph    the same step captured by hand in one CUDA graph
                    compile        forward and loss by torch.compile(mode="reduce-overhead")
                    compile graph  forward and loss by torch.compile, the step captured by hand
                    graph          ours: the engine `graph` on the images as bytes
                  Correctness first: parameters after some steps against an fp64 loop, of ways with
                  masks of their own the loss; a way that is wrong, or that cannot run, has a row
                  with the reason instead of a time
  epochs          ten epochs of Fashion-MNIST, each with a test: ours and the eager loop, by seeds
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fusedmlp.backends import native
from fusedmlp.train.data import types
from fusedmlp.train.engines.native import Share
from fusedmlp.train.engines.native_many import NativeMany

from . import peak, record, rivals, starts, timing, train, ways
from .ways import Network, network

PRECISIONS = ("bf16", "tf32", "fp32")
CHECKED = 8  # steps before the clock starts
OURS = "graph"
RIVALLED = "native"
Counts = Sequence[int]
MAIN = (
    network("784-256-10"),
    network("784-256-256-10", (0.2, 0.5)),
    network("784-1024-1024-10", (0.2, 0.5)),
    network("20-64-64-10", batch=32),
)
SCALING = {
    "main": MAIN,
    "batch": [network("784-256-10", batch=n) for n in (1, 4, 16, 64, 256, 1024, 4096, 8192)],
    "width": [network(f"784-{w}-10") for w in (16, 64, 256, 512, 1024, 2048)],
    "depth": [network("-".join(["784", *["256"] * d, "10"])) for d in (1, 2, 4, 8)],
}
ENSEMBLE = (network("784-256-10"), network("20-64-64-10", batch=32))
MEMBERS = (1, 2, 4, 8, 16, 32, 64)
GROUPS = (*SCALING, "threads", "ensemble", "rivals", "ways", "epochs")


def _gemms(net: Network, steps: int) -> Callable[[], None]:
    """All products of as many steps as the other functions take."""
    chosen, m = [], net.batch
    for i, (k, n) in enumerate(zip(net.dims, net.dims[1:], strict=False)):
        x, w, dz = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        products = [(x, w.t()), (dz.t(), x), (dz, w)][: 2 + (i > 0)]
        for a, b in products:
            ways_of_it = {}
            for name, (left, right) in {"as it is": (a, b), "transposed": (b.t(), a.t())}.items():
                out = torch.empty(len(left), right.shape[1])
                ways_of_it[name] = lambda p=(left, right), out=out: torch.mm(*p, out=out)
            taken = timing.measure(ways_of_it, timing.CpuTimer(), budget_s=0.05, min_rounds=5)
            fastest = min(taken, key=lambda name: timing.spread(taken[name].ms)[0])
            chosen.append(ways_of_it[fastest])

    def run() -> None:
        for _ in range(steps):
            for product in chosen:
                product()

    return run


def _native(net: Network, steps: int) -> tuple[Callable[[], None], types.Data, torch.Tensor]:
    """Steps of the engine as one call, its data, and the order of the rows."""
    data = ways.noise(net.batch * steps, 1, net.dims[0], net.dims[-1])
    engine, order = ways.native(net, data), torch.randperm(net.batch * steps)
    return (lambda: engine.steps(order, net.batch)), data, order


def _steps(net: Network) -> int:
    """Enough of them a call that the call itself does not count; few of those that take long."""
    return max(2, min(64, 8192 // net.batch, round(1e10 / net.flops)))


def _row(group: str, net: Network, threads: int, t: timing.Timing, steps: int) -> dict:
    row = {"group": group, "case": str(net), "threads": threads, "rounds": len(t.ms)}
    return row | {"left_out": t.left_out, "native_us": _micros(t, steps)}


def _micros(t: timing.Timing, steps: int) -> list[float]:
    return [1e3 * ms / steps for ms in timing.spread(t.ms)]


def _share(t: timing.Timing, flops: int, threads: int, dtype: str = "fp32") -> dict:
    """The share that calls of so many operations have of the peak; nothing where that is not known,
    or where none of its samples reached what the calls did."""
    if (top := peak.gflops(threads, dtype)) is None:
        return {}
    share = timing.spread([flops / (1e6 * ms * top) for ms in t.ms])
    return {"peak_gflops": top, "share of peak": share} if share[0] <= 1 else {}


def _beside(
    functions: dict[str, Callable[[], None]],
    budget: float,
    busy: Counts,
    device: str = "cpu",
    **more,
) -> Iterator[tuple[int, dict[str, timing.Timing]]]:
    """Times of the functions beside each number of busy programs."""
    for programs in busy:
        with timing.busy(programs):
            more["every_round"] = programs > 0
            # Engines have pools of threads of their own.
            clock = (
                timing.CpuTimer(rest=0.03) if device == "cpu" else timing.timer(device, wall=True)
            )
            taken = timing.measure(functions, clock, budget_s=budget, **more)
        yield programs, taken


def _over_quiet(rows: list[dict], micros: str) -> list[dict]:
    """The rows of one case; beside busy programs with their median over that without."""

    def which(row: dict) -> tuple:
        return tuple(row.get(name) for name in ("way", "threads", "members"))

    quiet = {which(row): row[micros][0] for row in rows if row.get("busy") == 0}
    for row in rows:
        if row.get("busy") and which(row) in quiet:
            row["over_quiet"] = row[micros][0] / quiet[which(row)]
    return rows


def engine_rows(
    net: Network, threads: int, budget: float, group: str, busy: Counts = (0,)
) -> list[dict]:
    """The engine against eager and against its GEMMs."""
    torch.set_num_threads(threads)
    steps, rows = _steps(net), []
    peak.gflops(threads)  # and again in each row
    run, data, order = _native(net, steps)
    eager = ways.Eager(net, data)
    functions = {"native": run, "eager": lambda: eager.steps(order), "gemms": _gemms(net, steps)}
    if has_bf16 := group == "main" and native.bf16_isa() == "avx512_bf16":
        functions["bf16"] = _native(replace(net, precision="bf16"), steps)[0]
    for programs, taken in _beside(functions, budget, busy):
        row = _row(group, net, threads, taken["native"], steps) | {"busy": programs}
        row |= {"dims": list(net.dims), "dropout": list(net.dropout), "batch": net.batch}
        row["over_gemms"] = timing.ratio(taken["native"], taken["gemms"])
        row["over_eager"] = timing.ratio(taken["eager"], taken["native"])
        row |= {f"{name}_us": _micros(taken[name], steps) for name in ("eager", "gemms")}
        if has_bf16:
            t = taken["bf16"]
            row |= {"bf16_us": _micros(t, steps), "over_bf16": timing.ratio(taken["native"], t)}
            share = _share(t, steps * net.flops, threads, "bf16")
            row |= {f"bf16 {name}": x for name, x in share.items()}
        rows.append(row | _share(taken["native"], steps * net.flops, threads))
    return _over_quiet(rows, "native_us")


def thread_rows(net: Network, counts: list[int], budget: float, busy: Counts = (0,)) -> list[dict]:
    """One case with each number of threads; the first number is what others are over."""

    def with_threads(count: int):
        run = _native(net, _steps(net))[0]

        def function() -> None:
            torch.set_num_threads(count)
            run()

        return function

    functions, steps = {str(n): with_threads(n) for n in counts}, _steps(net)
    rows = []
    for programs, taken in _beside(functions, budget, busy):
        for n in counts:
            t = taken[str(n)]
            row = _row("threads", net, n, t, steps) | {"busy": programs}
            row["faster"] = timing.ratio(taken[str(counts[0])], t)
            rows.append(row | _share(t, steps * net.flops, n))
    return _over_quiet(rows, "native_us")


def ensemble_rows(net: Network, threads: int, budget: float, busy: Counts = (0,)) -> list[dict]:
    """Each number of networks in one call, over the time of one network."""
    torch.set_num_threads(threads)
    steps = max(8, 2048 // net.batch)  # few for a long step: 127 networks are timed a round
    data = ways.noise(net.batch * steps, 1, net.dims[0], net.dims[-1])

    def together(members: int):
        orders = (torch.randperm(net.batch * steps) for _ in range(members))
        shares = [Share(ways.native(net, data), order, net.batch) for order in orders]
        many = NativeMany()
        return lambda: many.run(shares)

    functions = {str(n): together(n) for n in MEMBERS}
    rows = []
    for programs, taken in _beside(functions, budget, busy):
        for n in MEMBERS:
            t = taken[str(n)]
            row = _row("ensemble", net, threads, t, steps) | {"members": n, "busy": programs}
            row["over_one"] = timing.ratio(t, taken["1"])
            rows.append(row | _share(t, n * steps * net.flops, threads))
    return _over_quiet(rows, "native_us")


def way_rows(
    net: Network,
    data: types.Data,
    steps: int,
    budget: float,
    known: dict | None = None,
    ours: str = OURS,
    busy: Counts = (0,),
) -> list[dict]:
    """A row for each way and number of busy programs: its times, or the reason why it has none."""
    about = {"network": str(net), "precision": net.precision}
    rows, made, timed, compiling = [], {}, {}, {}
    device, count = data.x_train.device.type, len(data.x_train)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    order = order.repeat(-(-steps * net.batch // count))[: steps * net.batch].to(device)
    # Functions of one name share a limit of recompilations, beyond which they run as eager.
    torch.compiler.reset()
    with timing.products(net.precision):
        checker = ways.Checker(net, data, order[: CHECKED * net.batch])
        for name, make in (known or ways.WAYS).items():
            try:
                way = make(net, data)
                compiling[name] = ways.compiling(way, lambda way=way: way.steps(order))
                reason = checker.wrong(way)
            except Exception as error:  # a baseline that cannot run is a row, not the end
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            if reason:
                rows.append(about | {"way": name, "left out": reason})
                continue
            made[name], timed[name] = way, lambda way=way: way.steps(order)
        for programs, taken in _beside(timed, budget, busy, device, min_rounds=5):
            for name, t in taken.items():
                # The engine says by its name where its graphs could not be captured.
                called = made[name].engine.name if name == OURS else name
                row = about | {"way": called} | ({"busy": programs} if any(busy) else {})
                row["us a step"] = _micros(t, steps)
                if ours in taken:
                    row[f"time over {ours}'s"] = timing.ratio(t, taken[ours])
                if device == "cpu":
                    row |= _share(t, steps * net.flops, torch.get_num_threads())
                if compiling[name] is not None:
                    row["compile, s"] = compiling[name]
                rows.append(row | {"rounds": len(t.ms)})
    return _over_quiet(rows, "us a step")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.steps", description=__doc__.splitlines()[0])
    p.add_argument(
        "--group", nargs="+", choices=GROUPS, help="default: main; on a GPU ways, epochs"
    )
    p.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    p.add_argument("--dims", nargs="+", help="networks, as 784-256-10, instead of the group's")
    p.add_argument("--batch", type=int, default=256, help="rows a step, with --dims and on a GPU")
    p.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    p.add_argument("--budget", type=float, help="seconds of timing a case (5; rivals 10, ways 2)")
    p.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: all of the device")
    p.add_argument("--ways", nargs="+", default=[""], help="those whose names begin so, and ours")
    p.add_argument("--busy", type=int, nargs="+", default=[0], help="programs that run beside it")
    p.add_argument("--starts", type=starts.count, default=1, help="processes, one after the other")
    p.add_argument("--steps", type=int, default=128, help="of a timed call of ways and rivals")
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--seeds", type=int, default=10)
    p.add_argument("--rows", type=int, help="noise instead of Fashion-MNIST, so many rows")
    p.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST")
    p.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after this many")
    p.add_argument("--out", type=Path, help="results file (JSON); none: only print")
    args = p.parse_args(argv)
    args.group = args.group or (["main"] if args.device == "cpu" else ["ways", "epochs"])
    apart = [{"ways", "epochs"}, {"rivals"}, set(GROUPS) - {"ways", "epochs", "rivals"}]
    if not any(set(args.group) <= part for part in apart):
        p.error("--group ways epochs, rivals, and the others are measured apart")
    by_any_device = set(args.group) <= apart[0]
    if not by_any_device and args.device == "cuda":
        p.error("--group ways epochs are measured apart from the others, which are a CPU's")
    if by_any_device and args.busy != [0]:
        p.error("--busy is for the groups of a CPU")
    if args.budget is None:
        args.budget = 2.0 if by_any_device else 10.0 if args.group == ["rivals"] else 5.0
    if args.precision is None:
        args.precision = [x for x in PRECISIONS if args.device == "cuda" or x != "tf32"]
    return args


def _rivals(args: argparse.Namespace, results: record.Results) -> None:
    asked = (RIVALLED, *args.ways)
    known = {name: way for name, way in rivals.WAYS.items() if name.startswith(asked)}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for net in [network(dims, batch=args.batch) for dims in args.dims or ()] or MAIN[:2]:
            data = ways.noise(args.rows or 60_000, 1, net.dims[0], net.dims[-1])
            rows = way_rows(net, data, args.steps, args.budget, known, RIVALLED, args.busy)
            results.add(*({"threads": threads} | row for row in rows))


def on_a_cpu(args: argparse.Namespace, results: record.Results) -> None:
    if args.group == ["rivals"]:
        _rivals(args, results)
        return
    for threads in args.threads:
        for group in args.group:
            asked = [network(dims, batch=args.batch) for dims in args.dims or ()]
            for net in asked or SCALING.get(group, ()):
                name = "asked" if asked else group
                results.add(*engine_rows(net, threads, args.budget, name, args.busy))
            for net in ENSEMBLE if group == "ensemble" else ():
                results.add(*ensemble_rows(net, threads, args.budget, args.busy))
    for net in MAIN if "threads" in args.group else ():
        results.add(*thread_rows(net, sorted({1, *args.threads}), args.budget, args.busy))


def by_ways(args: argparse.Namespace, results: record.Results) -> None:
    start = time.perf_counter()

    def spent(share: float) -> bool:
        return time.perf_counter() - start > share * args.seconds

    if "epochs" in args.group:
        # A third of the time at most where steps follow, which take the longest to compile.
        share = 0.3 if "ways" in args.group else 0.8
        for precision in args.precision:
            for job in train.jobs(args.data_dir, args.epochs, args.device):
                if spent(share):
                    break
                data = train.data_or_noise(job, args.rows).to(args.device)
                until = start + (share + 0.05) * args.seconds
                results.add(*train.epoch_rows(job, data, precision, args.seeds, until))
    if "ways" not in args.group:
        return
    asked = (OURS, *args.ways)
    known = {name: way for name, way in ways.WAYS.items() if name.startswith(asked)}
    networks = {dims: () for dims in args.dims or ()}
    for precision in args.precision:
        for dims, p in (networks or {"784-256-10": (), "784-256-256-10": (0.2, 0.5)}).items():
            if spent(0.8):
                break
            net = network(dims, p, precision=precision, batch=args.batch)
            data = ways.noise(args.rows or 60_000, 1, net.dims[0], net.dims[-1]).to(args.device)
            rows = way_rows(net, data, args.steps, args.budget, known)
            results.add(*({"table": "steps"} | row for row in rows))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.steps: torch sees no GPU; --group ways runs the same code", file=sys.stderr)
        return 2
    has_ways = bool({"ways", "epochs"} & set(args.group))
    name = "gpu_steps" if args.device == "cuda" else "cpu_steps" if has_ways else "engine_step"
    name = "rivals" if args.group == ["rivals"] else name
    torch.set_num_threads(max(args.threads))  # what the head says
    packages = rivals.PACKAGES[:2] if args.group == ["rivals"] else ()
    head = record.header(name, "bench.steps", argv, args.device, packages)
    results = record.Results(head, args.out)
    if args.starts > 1:
        given = sys.argv[1:] if argv is None else argv
        results.add(*starts.rows("bench.steps", [*given, "--starts", "1"], args.starts))
        return 0
    (by_ways if has_ways else on_a_cpu)(args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
