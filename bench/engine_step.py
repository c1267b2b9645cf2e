"""Times the `native` step engine against eager PyTorch and against its own bare GEMMs.

    python -m bench.engine_step --threads 2 --out bench/results/engine_step.json
    python -m bench.engine_step --scaling batch width depth threads ensemble --threads 1 2

One process, rounds in which each function is timed once, in random order (timing.py). Eager is a
plain nn.Sequential with nn.Dropout over the same rows, in memory as floats, no DataLoader; the
engine gathers and scales uint8 rows as part of its step. The floor is each product of the step by
torch.mm into memory that is there, in the faster of its two orientations, both timed first.
Times are those of one step; ratios are what to read. Needs the extension.

The group `threads` times the main cases with 1 thread and with each of --threads, in the same
rounds; `ensemble` times a step of 1 to 64 networks at once (native_many.py) against a step of one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmlp.nn import FusedMLP
from fusedmlp.train.data.types import Scaling
from fusedmlp.train.engines.native import Native
from fusedmlp.train.engines.native_many import NativeMany, Share
from fusedmlp.train.task import Task

from . import record, timing


@dataclass(frozen=True)
class Network:
    """A case: its layers, dropout after the hidden ones, and the rows of a step."""

    dims: tuple[int, ...]
    dropout: tuple[float, ...]
    batch: int

    def __str__(self) -> str:
        p = "/".join(f"{p:g}" for p in self.dropout)
        dropout = f" dropout {p}" if any(self.dropout) else ""
        return f"{'-'.join(map(str, self.dims))}{dropout} batch {self.batch}"


def network(dims: str, dropout: tuple[float, ...] = (), batch: int = 256) -> Network:
    sizes = tuple(int(n) for n in dims.split("-"))
    return Network(sizes, dropout or (0.0,) * (len(sizes) - 2), batch)


MAIN = (
    network("784-256-10"),
    network("784-256-256-10", (0.2, 0.5)),
    network("784-1024-1024-10", (0.2, 0.5)),
    network("20-64-64-10", batch=32),
)
SCALING = {
    "batch": [network("784-256-10", batch=n) for n in (1, 4, 16, 64, 256, 1024, 4096, 8192)],
    "width": [network(f"784-{w}-10") for w in (16, 64, 256, 512, 1024, 2048)],
    "depth": [network("-".join(["784", *["256"] * d, "10"])) for d in (1, 2, 4, 8)],
}
ENSEMBLE = (network("784-256-10"), network("20-64-64-10", batch=32))
MEMBERS = (1, 2, 4, 8, 16, 32, 64)


GROUPS = (*SCALING, "threads", "ensemble")


def step_rows(net: Network) -> int:
    """Rows of the data: enough steps a call that the call itself does not count."""
    return net.batch * max(2, min(64, 8192 // net.batch))


def model_of(net: Network) -> nn.Module:
    torch.manual_seed(0)
    return FusedMLP(net.dims[0], net.dims[1:-1], net.dims[-1], dropout=net.dropout)


def task_of(net: Network, model: nn.Module) -> Task:
    generator = torch.Generator().manual_seed(1)
    rows = step_rows(net)
    x = torch.randint(0, 256, (rows, net.dims[0]), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, net.dims[-1], (rows,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Task(
        model.train(), optimizer, "cross_entropy", torch.device("cpu"), x, y, Scaling(255.0)
    )


def eager(net: Network):
    """A plain nn.Sequential over the same rows; one call is one pass over them."""
    model = model_of(net)
    plain = nn.Sequential(*model.children()).train()
    task = task_of(net, model)
    inputs = task.scaling(task.x)  # in memory as floats: eager has no gather of bytes to pay for
    order = torch.randperm(len(task.y))

    def run() -> Tensor:
        for rows in order.split(net.batch):
            loss = F.cross_entropy(plain(inputs[rows]), task.y[rows])
            task.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            task.optimizer.step()
        return loss.detach()

    return run


def engine_of(task: Task) -> Native:
    if reasons := Native.reasons_against(task):
        raise SystemExit(f"bench.engine_step: the native engine cannot run: {'; '.join(reasons)}")
    return Native(task)


def native(net: Network):
    engine = engine_of(task_of(net, model_of(net)))
    order = torch.randperm(len(engine.task.y))
    return lambda: engine.steps(order, net.batch)


def products(net: Network) -> list[tuple]:
    """The GEMMs of one step, each as (out, a, b) in both orientations."""
    pairs = []
    for i, (k, n) in enumerate(zip(net.dims, net.dims[1:], strict=False)):
        m = net.batch
        x, w, dz = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        pairs.append(((torch.empty(m, n), x, w.t()), (torch.empty(n, m), w, x.t())))
        pairs.append(((torch.empty(n, k), dz.t(), x), (torch.empty(k, n), x.t(), dz)))
        if i > 0:
            pairs.append(((torch.empty(m, k), dz, w), (torch.empty(k, m), w.t(), dz.t())))
    return pairs


def bare(net: Network):
    """All products of as many steps as the other functions take."""
    chosen = []
    for pair in products(net):
        functions = {str(i): lambda p=p: torch.mm(p[1], p[2], out=p[0]) for i, p in enumerate(pair)}
        taken = timing.measure(functions, timing.CpuTimer(), budget_s=0.05, min_rounds=5)
        median = {name: timing.spread(t.ms)[0] for name, t in taken.items()}
        chosen.append(pair[int(min(median, key=median.get))])
    steps = step_rows(net) // net.batch

    def run() -> None:
        for _ in range(steps):
            for out, a, b in chosen:
                torch.mm(a, b, out=out)

    return run


def measure(net: Network, threads: int, budget: float, group: str) -> dict:
    torch.set_num_threads(threads)
    functions = {"native": native(net), "eager": eager(net), "gemms": bare(net)}
    taken = timing.measure(functions, timing.CpuTimer(), budget_s=budget)
    steps = step_rows(net) // net.batch
    row = {
        "group": group,
        "case": str(net),
        "dims": list(net.dims),
        "dropout": list(net.dropout),
        "batch": net.batch,
        "threads": threads,
        "rounds": len(taken["native"].ms),
        "left_out": taken["native"].left_out,
        "over_gemms": timing.ratio(taken["native"], taken["gemms"]),
        "over_eager": timing.ratio(taken["eager"], taken["native"]),
    }
    for name, t in taken.items():
        row[f"{name}_us"] = [1e3 * ms / steps for ms in timing.spread(t.ms)]
    return row


def measure_threads(net: Network, counts: list[int], budget: float) -> list[dict]:
    """Rows of one case with each number of threads; the first number is what others are over."""

    def with_threads(count: int):
        run = native(net)

        def function() -> None:
            torch.set_num_threads(count)
            run()

        return function

    taken = timing.measure(
        {str(n): with_threads(n) for n in counts}, timing.CpuTimer(), budget_s=budget
    )
    steps, one = step_rows(net) // net.batch, taken[str(counts[0])]
    return [
        {
            "group": "threads",
            "case": str(net),
            "threads": n,
            "rounds": len(taken[str(n)].ms),
            "left_out": taken[str(n)].left_out,
            "native_us": [1e3 * ms / steps for ms in timing.spread(taken[str(n)].ms)],
            "faster": timing.ratio(one, taken[str(n)]),
        }
        for n in counts
    ]


def ensemble_steps(net: Network) -> int:
    """Of each network in a call: few for a long step, 127 networks are timed a round."""
    return max(8, 2048 // net.batch)


def many(net: Network, members: int):
    """One call: steps of each of so many networks on the same data."""
    rows = net.batch * ensemble_steps(net)
    first = task_of(net, model_of(net))
    engines = []
    for _ in range(members):
        task = task_of(net, model_of(net))
        task.x, task.y = first.x[:rows], first.y[:rows]
        engines.append(engine_of(task))
    together = NativeMany()
    shares = [Share(engine, torch.randperm(rows), net.batch) for engine in engines]
    return lambda: together.run(shares)


def measure_ensemble(net: Network, threads: int, budget: float) -> list[dict]:
    """Rows of one case with each number of networks, over the time of one network."""
    torch.set_num_threads(threads)
    functions = {str(n): many(net, n) for n in MEMBERS}
    taken = timing.measure(functions, timing.CpuTimer(), budget_s=budget)
    steps = ensemble_steps(net)
    return [
        {
            "group": "ensemble",
            "case": str(net),
            "threads": threads,
            "members": n,
            "rounds": len(taken[str(n)].ms),
            "left_out": taken[str(n)].left_out,
            "native_us": [1e3 * ms / steps for ms in timing.spread(taken[str(n)].ms)],
            "over_one": timing.ratio(taken[str(n)], taken["1"]),
        }
        for n in MEMBERS
    ]


def shown(row: dict) -> str:
    time = f"{row['case']:44} {row['threads']} threads: {row['native_us'][0]:9.1f} us"
    if row["group"] == "threads":
        return f"{time}, {'{:.2f} ({:.2f} to {:.2f})'.format(*row['faster'])} times faster"
    if row["group"] == "ensemble":
        cost = "{:.2f} ({:.2f} to {:.2f})".format(*row["over_one"])
        return f"{time} for {row['members']:2} networks, {cost} times one"
    gemms, faster = row["over_gemms"], row["over_eager"]
    return (
        f"{time}, {gemms[0]:5.2f} ({gemms[1]:.2f} to {gemms[2]:.2f}) times its GEMMs, "
        f"{faster[0]:5.2f} ({faster[1]:.2f} to {faster[2]:.2f}) times faster than eager"
    )


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="bench.engine_step", description=__doc__.splitlines()[0])
    p.add_argument("--dims", nargs="+", help="networks, as 784-256-10, instead of the main four")
    p.add_argument("--batch", type=int, default=256, help="rows a step, with --dims")
    p.add_argument("--scaling", nargs="+", choices=GROUPS, help="tables instead")
    p.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    p.add_argument("--budget", type=float, default=5.0, help="seconds a case")
    p.add_argument("--out", type=Path, help="results file (JSON); none: only print")
    args = p.parse_args(argv)
    cases = [("main", net) for net in MAIN]
    if args.dims:
        cases = [("asked", network(dims, batch=args.batch)) for dims in args.dims]
    elif args.scaling:
        cases = [(group, net) for group in args.scaling for net in SCALING.get(group, ())]
    rows = []

    def add(found: list[dict]) -> None:
        rows.extend(found)
        print("\n".join(map(shown, found)), flush=True)

    for threads in args.threads:
        for group, net in cases:
            add([measure(net, threads, args.budget, group)])
        if "ensemble" in (args.scaling or ()):
            for net in ENSEMBLE:
                add(measure_ensemble(net, threads, args.budget))
    if "threads" in (args.scaling or ()):
        for net in MAIN:
            add(measure_threads(net, sorted({1, *args.threads}), args.budget))
    if args.out:
        found = record.header("engine_step", "bench.engine_step", argv)
        record.write(args.out, found | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
