"""Networks drawn at random, eager PyTorch against automatic choice after `fuse`: how often, and by
how much, it is the slower one.

    python -m bench.never_slower --threads 2 --out bench/results/never_slower.json

Sizes are log-uniform, 4 to 1024, of 1 to 3 layers and 1 to 512 rows, with four activations, with
and without dropout: sizes that nobody tuned for. Each is a training step (forward, mean of squares,
backward and SGD) and inference. How it is timed: timing.py; a cell that looks slow is measured
again, longer, up to twice, and the new figure replaces the old one.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import fusedmlp
from fusedmlp.tuning import classes

from . import record, timing
from .cases import Case
from .providers import ran_on

BOUNDS = 0.97, 0.93
_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "sigmoid": nn.Sigmoid}
_AGAIN_BELOW = 0.98
_AGAIN = 2  # times, each four times as long as the one before


def draw(nets: int, seed: int) -> list[Case]:
    """A step and an inference of each network."""
    rnd, found = random.Random(seed), []
    for _ in range(nets):
        rows, widths, act, drops = classes.random_net(rnd)
        ps = (0.5 * drops,) * max(1, len(widths) - 2)
        for mode in ("step", "infer"):
            op = "net" if len(widths) > 2 else "layer"
            if op == "layer" and mode == "step":
                mode = "fwd+bwd"
            found.append(Case("never_slower", op, mode, rows, tuple(widths), act, ps))
    return found


def plain(case: Case) -> nn.Sequential:
    modules = []
    for k, n, act, p in case.layers:
        modules.append(nn.Linear(k, n))
        if act != "none":
            modules.append(_ACTIVATIONS[act]())
        if p > 0:
            modules.append(nn.Dropout(p))
    return nn.Sequential(*modules)


def calls(case: Case) -> tuple[dict, nn.Module]:
    """({'eager', 'auto'}: what is timed, the fused module)."""
    torch.manual_seed(0)
    eager = plain(case)
    fused = fusedmlp.fuse(copy.deepcopy(eager))
    x = torch.randn(case.m, case.dims[0])
    found = {}
    for name, model in (("eager", eager), ("auto", fused)):
        if case.mode == "infer":
            found[name] = _inference(model.eval(), x)
        else:
            found[name] = _step(model.train(), x)
    return found, fused


def _inference(model: nn.Module, x: torch.Tensor):
    def run():
        with torch.no_grad():
            return model(x)

    return run


def _step(model: nn.Module, x: torch.Tensor):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, foreach=True)

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return run


def measured(case: Case, budget_s: float) -> dict:
    """The row of one cell."""
    runs, fused = calls(case)
    for again in range(_AGAIN + 1):
        found = timing.measure(runs, timing.timer("cpu"), budget_s=budget_s * 4**again)
        ratio = timing.ratio(found["eager"], found["auto"])
        if ratio[0] >= _AGAIN_BELOW:
            break
    ms = {f"{name}_ms": timing.spread(t.ms)[0] for name, t in found.items()}
    row = (
        {k: v for k, v in case.columns().items() if k != "group"}
        | {"eager_over_this": ratio, "route": ran_on(fused)}
        | ms
    )
    row["mode"] = "infer" if case.mode == "infer" else "step"
    return row | {"measured": again + 1, "rounds": len(found["eager"].ms)}


def summary(rows: list[dict]) -> str:
    """The shares of cells below the bounds, the worst cells, and what ran."""
    lines = []
    for name in ("step", "infer"):
        part = [row for row in rows if (row["mode"] == "infer") == (name == "infer")]
        ratios = sorted(row["eager_over_this"][0] for row in part)
        if not ratios:
            continue
        below = ", ".join(
            f"{sum(r < b for r in ratios) / len(ratios):.1%} below {b:g}" for b in BOUNDS
        )
        ran = Counter(row["route"] for row in part)
        told = ", ".join(f"{route} {count}" for route, count in ran.most_common())
        lines.append(
            f"{name}: {len(ratios)} networks, eager / automatic: lowest {ratios[0]:.3f}, median "
            f"{ratios[len(ratios) // 2]:.2f}, highest {ratios[-1]:.2f}; {below}; ran on {told}"
        )
    for row in sorted(rows, key=lambda row: row["eager_over_this"][0])[:5]:
        dims = "-".join(map(str, row["dims"]))
        lines.append(
            f"  {row['eager_over_this'][0]:.3f}: {row['M']} x {dims} {row['act']} "
            f"p={row['p'][0]:g} {row['mode']} on {row['route']}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="bench.never_slower", description=__doc__.split("\n\n")[0])
    p.add_argument("--nets", type=int, default=300, help="networks that are drawn (300)")
    p.add_argument("--seed", type=int, default=1, help="of the draw (1)")
    p.add_argument("--threads", type=int, help="torch.set_num_threads")
    p.add_argument("--budget", type=float, default=0.1, help="seconds a cell (0.1)")
    p.add_argument("--seconds", type=float, help="start no new cell after this many")
    p.add_argument("--out", type=Path, help="results file (JSON); rows that it has are kept")
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    head = record.header("never_slower", "bench.never_slower", argv)
    results = record.resumed(head | {"seed": args.seed}, args.out)
    todo = draw(args.nets, args.seed)[len(results.rows) :]
    started = time.monotonic()
    print(f"{args.nets} networks, seed {args.seed}; {len(todo)} cells to measure")
    for case in todo:
        if args.seconds is not None and time.monotonic() - started > args.seconds:
            break
        results.add(measured(case, args.budget), columns=("route", "eager_over_this"))
    print(summary(results.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
