"""Training on a GPU: microseconds a step, and ten epochs, in the ways there are to write a step.

    python -m bench.gpu_step --out bench/results/gpu/steps.json --seconds 120
    python -m bench.gpu_step --device cpu --dims 12-16-3 --rows 512 --steps 4   # the same, small

Rows of table `steps`: a step of each network and precision at batch 256 by the wall clock, over
`--steps` steps with one wait at the end, in interleaved rounds (timing.py). Every way has the data
set on the device, a batch given by row numbers, SGD in torch's fused kernel, and sums its losses:
  eager            nn.Sequential under autocast or not, fp32 images in memory
  eager graph      the same step captured by hand in one CUDA graph, row numbers copied in
  compile          forward and loss by torch.compile(mode="reduce-overhead"), which makes graphs
  compile graph    forward and loss by torch.compile, the whole step captured by hand
  graph            ours: the engine `graph` on the images as bytes
Correctness first: parameters after some steps against an fp64 loop, of ways with masks of their own
the loss; a way that is wrong, or that cannot run, has a row with the reason instead of a time.

Rows of table `epochs`: ten epochs of Fashion-MNIST with a test after each, `fit` with our engine
and the eager in-memory loop, by seeds: wall time and test accuracy, mean and deviation of both.
Without Fashion-MNIST the images are noise, and there is a time only.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fusedmlp.train.data import datasets, images, types

from . import record, step_ways, timing
from .step_ways import Case
from .train_baselines import InMemory, Job, Ours, jobs

PRECISIONS = ("bf16", "tf32", "fp32")
NETWORKS = {"784-256-10": (), "784-256-256-10": (0.2, 0.5)}
CHECKED = 8  # steps before the clock starts
OURS = "graph"


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """torch's setting for fp32 products on a GPU."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def made(rows: int, tests: int, features: int = 784, classes: int = 10) -> types.Data:
    """Noise of Fashion-MNIST's kind."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (rows + tests, features), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, classes, (rows + tests,), generator=generator)
    names = tuple(str(i) for i in range(classes))
    parts = x[:rows], y[:rows], x[rows:], y[rows:]
    return types.Data("noise", *parts, classes=names, scaling=types.Scaling(255.0))


def step_rows(case: Case, loaded: types.Data, steps: int, budget: float) -> list[dict]:
    """A row for each way: its times, or the reason why it has none."""
    about = {"table": "steps", "network": str(case), "precision": case.precision}
    rows, ways, timed = [], {}, {}
    order = torch.randperm(len(loaded.x_train), generator=torch.Generator().manual_seed(2))
    order = order.repeat(-(-steps * case.batch // len(order)))[: steps * case.batch]
    order = order.to(loaded.x_train.device)
    if loaded.x_train.is_cuda:
        # Functions of one name share a limit of recompilations, beyond which they run as eager.
        torch.compiler.reset()
    with products(case.precision):
        checker = step_ways.Checker(case, loaded, order[: CHECKED * case.batch])
        for name, make in step_ways.WAYS.items():
            try:
                way = make(case, loaded)
                reason = checker.wrong(way)
            except Exception as error:  # a baseline that cannot run is a row, not the end
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            if reason:
                rows.append(about | {"way": name, "left out": reason})
                continue
            ways[name] = way
            timed[name] = lambda way=way: way.steps(order)
        device = loaded.x_train.device.type
        clock = timing.timer(device, wall=True)
        taken = timing.measure(timed, clock, budget_s=budget, min_rounds=5)
    for name, t in taken.items():
        # The engine says by its name where its graphs could not be captured.
        called = ways[name].engine.name if name == OURS else name
        times = [1e3 * ms / steps for ms in timing.spread(t.ms)]
        row = about | {"way": called, "us a step": times}
        if OURS in taken:
            row["time over graph's"] = list(timing.ratio(t, taken[OURS]))
        rows.append(row | {"rounds": len(t.ms)})
    return rows


def epoch_rows(
    job: Job, loaded: types.Data, precision: str, seeds: int, until: float
) -> list[dict]:
    """Two rows: ours and the eager loop, each with every seed, in random order within a seed."""
    job = replace(job, config=job.config.replace(precision=precision))
    ways = [Ours(job, loaded), InMemory(job, loaded)]
    found = {way.name: ([], []) for way in ways}
    device = loaded.x_train.device.type
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with products(precision):
        for way in ways:  # libraries and kernels are loaded
            way.run(seed=seeds)
        for seed in range(seeds):
            if seed and time.perf_counter() > until:
                break
            random.Random(seed).shuffle(ways)
            for way in ways:
                wait()
                start = time.perf_counter()
                accuracy = way.run(seed=seed)
                wait()
                found[way.name][0].append(time.perf_counter() - start)
                found[way.name][1].append(accuracy)
    rows = []
    ours = found[Ours.name][0]
    for name, (seconds, right) in found.items():
        row = {"table": "epochs", "network": job.name, "precision": precision, "way": name}
        row |= {"epochs": job.epochs, "data": loaded.name, "seeds": len(right)}
        row["milliseconds"] = [1e3 * s for s in timing.spread(seconds)]
        row["time over fusedmlp's"] = list(
            timing.spread([a / b for a, b in zip(seconds, ours, strict=True)])
        )
        if loaded.name != "noise":
            row["test accuracy"] = statistics.mean(right)
            row["deviation"] = statistics.stdev(right) if len(right) > 1 else None
        rows.append(row)
    return rows


def shown(row: dict) -> str:
    """A row as one line of the printed table."""
    text = f"{row['network']:<34} {row['precision']:<5} {row['way']:<24}"
    if "left out" in row:
        return f"{text} left out: {row['left out']}"
    if row["table"] == "steps":
        us, over = row["us a step"], row.get("time over graph's")
        more = f", {over[0]:.2f} times graph's" if over else ""
        return f"{text} {us[0]:9.2f} us a step ({us[1]:.2f} to {us[2]:.2f}){more}"
    text += f" {row['milliseconds'][0]:9.1f} ms for {row['epochs']} epochs of {row['data']}"
    if row.get("deviation") is not None:
        text += f", accuracy {row['test accuracy']:.4f} +- {row['deviation']:.4f}"
    return text


def loaded_for(args, job: Job) -> types.Data:
    """Fashion-MNIST where it is on disk, else noise of its sizes."""
    root = args.data_dir or images.default_folder()
    has_files = images.find_files(images.IMAGE_SETS["fashion_mnist"], root)  # never downloaded here
    if args.rows is None and has_files:
        return datasets.load(job.config)
    rows = args.rows or 60_000
    return made(rows, max(1, rows // 6))


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.gpu_step", description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--dims", nargs="+", help="networks, as 784-256-10, instead of the two")
    p.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: all of the device")
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--steps", type=int, default=128, help="of a timed call")
    p.add_argument("--budget", type=float, default=2.0, help="seconds of timing a case")
    p.add_argument("--epochs", type=int, default=10, help="0 leaves the table `epochs` out")
    p.add_argument("--seeds", type=int, default=10)
    p.add_argument("--rows", type=int, help="noise instead of Fashion-MNIST, so many rows")
    p.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST")
    p.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after this many")
    p.add_argument("--out", type=Path, help="results file (JSON); none: only print")
    args = p.parse_args(argv)
    if args.precision is None:
        args.precision = [x for x in PRECISIONS if args.device == "cuda" or x != "tf32"]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    start = time.perf_counter()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu_step: torch sees no GPU; --device cpu runs the same code", file=sys.stderr)
        return 2
    rows: list[dict] = []

    def add(found: list[dict]) -> None:
        rows.extend(found)
        print("\n".join(map(shown, found)), flush=True)
        if args.out:  # whatever comes later may be cut off
            name = "gpu_steps" if args.device == "cuda" else "cpu_steps"
            head = record.header(name, "bench.gpu_step", argv, args.device)
            record.write(args.out, head | {"rows": rows})

    def spent(share: float) -> bool:
        return time.perf_counter() - start > share * args.seconds

    # A third of the time at most: the steps come first, but compiling them takes the longest.
    if args.epochs:
        for precision in args.precision:
            for job in jobs(args.data_dir, args.epochs, args.device):
                if spent(0.3):
                    break
                engine = OURS if args.device == "cuda" else "auto"
                job = replace(job, config=job.config.replace(engine=engine))
                loaded = loaded_for(args, job).to(args.device)
                add(epoch_rows(job, loaded, precision, args.seeds, start + 0.35 * args.seconds))
    networks = {dims: () for dims in args.dims} if args.dims else NETWORKS
    for precision in args.precision:
        for dims, dropout in networks.items():
            if spent(0.8):
                break
            case = Case(tuple(map(int, dims.split("-"))), dropout, precision, args.batch)
            loaded = made(args.rows or 60_000, 1, case.dims[0], case.dims[-1]).to(args.device)
            add(step_rows(case, loaded, args.steps, args.budget))
    return 0


if __name__ == "__main__":
    sys.exit(main())
