"""Times a training step: the native engine on a CPU, and every way to write a step on a GPU.

    python -m bench.steps --threads 2 --out bench/results/engine_step.json
    python -m bench.steps --group batch width depth threads ensemble --threads 1 2
    python -m bench.steps --device cuda --seconds 120 --out bench/results/gpu/steps.json
    python -m bench.steps --group ways epochs --dims 12-16-3 --rows 512 --steps 4  # that, on a CPU

One process, rounds in which each function is timed once, in random order (timing.py); ratios are
what to read. Groups on a CPU, of the native engine, which gathers and scales uint8 rows itself:
  main, batch, width, depth  against eager (nn.Sequential on rows in memory as floats) and GEMMs:
                  its products by torch.mm into memory that is there, in the faster orientation
  threads         the main cases with 1 thread and with each of --threads, in the same rounds
  ensemble        a step of 1 to 64 networks at once (native_many.py) against a step of one
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
from collections.abc import Callable
from pathlib import Path

import torch

from fusedmlp.train.data import types
from fusedmlp.train.engines.native import Share
from fusedmlp.train.engines.native_many import NativeMany

from . import record, timing, train, ways
from .ways import Network, network

PRECISIONS = ("bf16", "tf32", "fp32")
CHECKED = 8  # steps before the clock starts
OURS = "graph"
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
GROUPS = (*SCALING, "threads", "ensemble", "ways", "epochs")


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
    """Enough of them a call that the call itself does not count."""
    return max(2, min(64, 8192 // net.batch))


def _row(group: str, net: Network, threads: int, t: timing.Timing, steps: int) -> dict:
    row = {"group": group, "case": str(net), "threads": threads, "rounds": len(t.ms)}
    return row | {"left_out": t.left_out, "native_us": _micros(t, steps)}


def _micros(t: timing.Timing, steps: int) -> list[float]:
    return [1e3 * ms / steps for ms in timing.spread(t.ms)]


def engine_row(net: Network, threads: int, budget: float, group: str) -> dict:
    """The engine against eager and against its GEMMs."""
    torch.set_num_threads(threads)
    steps = _steps(net)
    run, data, order = _native(net, steps)
    eager = ways.Eager(net, data)
    functions = {"native": run, "eager": lambda: eager.steps(order), "gemms": _gemms(net, steps)}
    taken = timing.measure(functions, timing.CpuTimer(), budget_s=budget)
    row = _row(group, net, threads, taken["native"], steps)
    row |= {"dims": list(net.dims), "dropout": list(net.dropout), "batch": net.batch}
    row["over_gemms"] = timing.ratio(taken["native"], taken["gemms"])
    row["over_eager"] = timing.ratio(taken["eager"], taken["native"])
    return row | {f"{name}_us": _micros(taken[name], steps) for name in ("eager", "gemms")}


def thread_rows(net: Network, counts: list[int], budget: float) -> list[dict]:
    """One case with each number of threads; the first number is what others are over."""

    def with_threads(count: int):
        run = _native(net, _steps(net))[0]

        def function() -> None:
            torch.set_num_threads(count)
            run()

        return function

    functions = {str(n): with_threads(n) for n in counts}
    taken = timing.measure(functions, timing.CpuTimer(), budget_s=budget)
    one = taken[str(counts[0])]
    return [
        _row("threads", net, n, taken[str(n)], _steps(net))
        | {"faster": timing.ratio(one, taken[str(n)])}
        for n in counts
    ]


def ensemble_rows(net: Network, threads: int, budget: float) -> list[dict]:
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
    taken = timing.measure(functions, timing.CpuTimer(), budget_s=budget)
    rows = []
    for n in MEMBERS:
        row = _row("ensemble", net, threads, taken[str(n)], steps) | {"members": n}
        rows.append(row | {"over_one": timing.ratio(taken[str(n)], taken["1"])})
    return rows


def way_rows(net: Network, data: types.Data, steps: int, budget: float) -> list[dict]:
    """A row for each way: its times, or the reason why it has none."""
    about = {"table": "steps", "network": str(net), "precision": net.precision}
    rows, made, timed = [], {}, {}
    device, count = data.x_train.device.type, len(data.x_train)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    order = order.repeat(-(-steps * net.batch // count))[: steps * net.batch].to(device)
    if device == "cuda":
        # Functions of one name share a limit of recompilations, beyond which they run as eager.
        torch.compiler.reset()
    with timing.products(net.precision):
        checker = ways.Checker(net, data, order[: CHECKED * net.batch])
        for name, make in ways.WAYS.items():
            try:
                way = make(net, data)
                reason = checker.wrong(way)
            except Exception as error:  # a baseline that cannot run is a row, not the end
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            if reason:
                rows.append(about | {"way": name, "left out": reason})
                continue
            made[name], timed[name] = way, lambda way=way: way.steps(order)
        clock = timing.timer(device, wall=True)
        taken = timing.measure(timed, clock, budget_s=budget, min_rounds=5)
    for name, t in taken.items():
        # The engine says by its name where its graphs could not be captured.
        called = made[name].engine.name if name == OURS else name
        row = about | {"way": called, "us a step": _micros(t, steps)}
        if OURS in taken:
            row["time over graph's"] = timing.ratio(t, taken[OURS])
        rows.append(row | {"rounds": len(t.ms)})
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.steps", description=__doc__.splitlines()[0])
    p.add_argument(
        "--group", nargs="+", choices=GROUPS, help="default: main; on a GPU ways, epochs"
    )
    p.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    p.add_argument("--dims", nargs="+", help="networks, as 784-256-10, instead of the group's")
    p.add_argument("--batch", type=int, default=256, help="rows a step, with --dims and on a GPU")
    p.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    p.add_argument("--budget", type=float, help="seconds of timing a case (5; of `ways` 2)")
    p.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: all of the device")
    p.add_argument("--steps", type=int, default=128, help="of a timed call of `ways`")
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--seeds", type=int, default=10)
    p.add_argument("--rows", type=int, help="noise instead of Fashion-MNIST, so many rows")
    p.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST")
    p.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after this many")
    p.add_argument("--out", type=Path, help="results file (JSON); none: only print")
    args = p.parse_args(argv)
    cpu_only = set(args.group or ()) - {"ways", "epochs"}
    if cpu_only and (args.device == "cuda" or cpu_only != set(args.group)):
        p.error("--group ways epochs are measured apart from the others, which are a CPU's")
    args.group = args.group or (["main"] if args.device == "cpu" else ["ways", "epochs"])
    if args.precision is None:
        args.precision = [x for x in PRECISIONS if args.device == "cuda" or x != "tf32"]
    return args


def on_a_cpu(args: argparse.Namespace, results: record.Results) -> None:
    budget = args.budget or 5.0
    for threads in args.threads:
        for group in args.group:
            asked = [network(dims, batch=args.batch) for dims in args.dims or ()]
            for net in asked or SCALING.get(group, ()):
                results.add(engine_row(net, threads, budget, "asked" if asked else group))
            for net in ENSEMBLE if group == "ensemble" else ():
                results.add(*ensemble_rows(net, threads, budget))
    for net in MAIN if "threads" in args.group else ():
        results.add(*thread_rows(net, sorted({1, *args.threads}), budget))


def by_ways(args: argparse.Namespace, results: record.Results) -> None:
    start = time.perf_counter()

    def spent(share: float) -> bool:
        return time.perf_counter() - start > share * args.seconds

    # A third of the time at most: the steps come first, but compiling them takes the longest.
    if "epochs" in args.group:
        for precision in args.precision:
            for job in train.jobs(args.data_dir, args.epochs, args.device):
                if spent(0.3):
                    break
                data = train.data_or_noise(job, args.rows).to(args.device)
                until = start + 0.35 * args.seconds
                results.add(*train.epoch_rows(job, data, precision, args.seeds, until))
    if "ways" not in args.group:
        return
    networks = {dims: () for dims in args.dims or ()}
    for precision in args.precision:
        for dims, p in (networks or {"784-256-10": (), "784-256-256-10": (0.2, 0.5)}).items():
            if spent(0.8):
                break
            net = network(dims, p, precision=precision, batch=args.batch)
            data = ways.noise(args.rows or 60_000, 1, net.dims[0], net.dims[-1]).to(args.device)
            results.add(*way_rows(net, data, args.steps, args.budget or 2.0))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.steps: torch sees no GPU; --group ways runs the same code", file=sys.stderr)
        return 2
    has_ways = bool({"ways", "epochs"} & set(args.group))
    name = "gpu_steps" if args.device == "cuda" else "cpu_steps" if has_ways else "engine_step"
    head = record.header(name, "bench.steps", argv, args.device)
    (by_ways if has_ways else on_a_cpu)(args, record.Results(head, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
