"""That the trainer trains as PyTorch does, on Fashion-MNIST: accuracy over seeds, and parameters.

    python -m bench.train_proof --data-dir DIR --seeds 10

seeds.json    mean and deviation over seeds of the test accuracy after the last epoch, for every way
              of bench.train_step; `ours off by` is the distance of our mean from this way's, in
              standard errors. It is written after each way, and ways that are in it are kept with
              --resume
parity.json   error of all parameters after some steps, against an fp64 run of the same weights,
              order and masks, over that of plain PyTorch in fp32; at most 2 is promised. Medians
              over seeds: at lr 0.5 two runs that differ in one rounding part by a factor of 1e5 in
              50 steps, so the ratio of two single runs is a matter of luck
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fusedmlp.spec import philox
from fusedmlp.train import build, engines
from fusedmlp.train.data import datasets, types
from fusedmlp.train.task import Task

from . import record
from .timing import percentile, spread
from .train_baselines import DataLoaders, InMemory, Job, Ours, ScikitLearn, jobs, plain_network


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    parser.add_argument("--seeds", type=int, default=10, help="0 leaves the accuracies out")
    parser.add_argument("--resume", action="store_true", help="keep the ways that seeds.json has")
    parser.add_argument("--ways", nargs="*", help="only those whose names begin so")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--parity-seeds", type=int, default=5, help="0 leaves the parity out")
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 50, 500])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.seeds:
            _seeds(args, argv, Path(folder))
    rows = []
    for job in jobs(args.data_dir, args.epochs, args.device) if args.parity_seeds else ():
        loaded = datasets.load(job.config).to(args.device)
        rows += _parity(job, loaded, args.steps, args.parity_seeds)
    if rows:
        head = record.header("parity", "bench.train_proof", argv, args.device)
        record.write(args.out / "parity.json", head | {"rows": rows})
    return 0


def _seeds(args: argparse.Namespace, argv: list[str] | None, folder: Path) -> None:
    """One row for each network and way."""
    path = args.out / "seeds.json"
    found = record.read(path)["rows"] if args.resume and path.exists() else []
    for job in jobs(args.data_dir, args.epochs, args.device):
        loaded = datasets.load(job.config).to(args.device)
        ways = [Ours(job, loaded), InMemory(job, loaded), ScikitLearn(job, loaded)]
        for way in [*ways, DataLoaders(job, loaded, folder)]:
            asked = args.ways is None or any(way.name.startswith(name) for name in args.ways)
            if not asked or any(_is_of(row, job, way.name, args.seeds) for row in found):
                continue
            values = [way.run(seed) for seed in range(args.seeds)]
            print(job.name, way.name, [f"{value:.4f}" for value in values], flush=True)
            row = {"network": job.name, "way": way.name, "epochs": job.epochs, "seeds": len(values)}
            row |= {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}
            found.append(row | {"lowest": min(values), "highest": max(values)})
            _compare(found, Ours.name)
            head = record.header("seeds", "bench.train_proof", argv, args.device)
            record.write(path, head | {"rows": found})


def _is_of(row: dict, job: Job, way: str, seeds: int) -> bool:
    key = (row["network"], row["way"], row["epochs"], row["seeds"])
    return key == (job.name, way, job.epochs, seeds)


def _compare(rows: list[dict], name: str) -> None:
    """Adds the distance of the mean of way `name` from each other way's, in standard errors."""
    ours = {row["network"]: row for row in rows if row["way"] == name}
    for row in rows:
        us = ours.get(row["network"])
        if us is not None and us is not row:
            error = math.hypot(
                us["deviation"] / math.sqrt(us["seeds"]), row["deviation"] / math.sqrt(row["seeds"])
            )
            row["ours off by"] = (us["mean"] - row["mean"]) / error


class _Masked:
    """PyTorch's own loop in any dtype, with the package's masks put in by hand."""

    def __init__(self, job: Job, loaded: types.Data, dtype: torch.dtype):
        self.net = plain_network(job, loaded, job.config.seed).to(dtype)
        self.linears = [m for m in self.net if isinstance(m, nn.Linear)]
        self.ps, self.seed = job.config.dropout_per_layer(), job.config.seed
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=job.rate)
        self.data, self.dtype, self.step = loaded, dtype, 0

    def run(self, rows: torch.Tensor) -> None:
        # The division in the run's own dtype: the inputs' rounding is part of what is compared.
        x = self.data.x_train[rows].to(self.dtype) / self.data.scaling.divisor
        for layer, (linear, p) in enumerate(zip(self.linears, self.ps, strict=False)):
            x = F.relu(linear(x))
            if p > 0:
                stream = self.step * len(self.linears) + layer
                keep = philox.dropout_mask(
                    self.seed, stream, len(x), x.shape[1], p, device=x.device
                )
                x = torch.where(keep, x / (1 - p), torch.zeros_like(x))
        loss = F.cross_entropy(self.linears[-1](x), self.data.y_train[rows])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1


def _parity(job: Job, loaded: types.Data, at: list[int], seeds: int) -> list[dict]:
    """One row for each number of steps; ratios as median, p20 and p80 over seeds."""
    found: dict[int, list[list[torch.Tensor]]] = {steps: [] for steps in at}
    for seed in range(seeds):
        seeded = replace(job, config=job.config.replace(seed=seed))
        for steps, errors in _errors(seeded, loaded, at):
            found[steps].append(errors)
            print(job.name, seed, steps, [f"{_rms(e):.3g}" for e in errors], flush=True)
    rows = []
    for steps, errors in found.items():
        row = {"network": job.name, "steps": steps, "seeds": seeds}
        for kind, measure in (("max", _max), ("RMS", _rms)):
            ours, theirs = ([measure(pair[side]) for pair in errors] for side in (0, 1))
            row[f"{kind} error"] = percentile(ours, 50)
            row[f"{kind} error of PyTorch"] = percentile(theirs, 50)
            row[f"{kind} ratio"] = list(spread([a / b for a, b in zip(ours, theirs, strict=True)]))
        rows.append(row)
        print(row, flush=True)
    return rows


def _max(errors: torch.Tensor) -> float:
    return errors.abs().max().item()


def _rms(errors: torch.Tensor) -> float:
    return errors.square().mean().sqrt().item()


def _errors(
    job: Job, loaded: types.Data, at: list[int]
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """(steps, [ours, PyTorch's]): differences from fp64 of all parameters."""
    truth, plain = _Masked(job, loaded, torch.float64), _Masked(job, loaded, torch.float32)
    engine = _engine(job, loaded)
    done, epoch = 0, 0
    while done < max(at, default=0):
        order = types.permutation(job.config.seed, epoch, len(loaded.x_train))
        epoch += 1
        for rows in order.to(loaded.x_train.device).split(job.config.batch_size):
            for loop in (truth, plain):
                loop.run(rows)
            engine.step(rows)
            done += 1
            if done in at:
                engine.sync()
                exact = _flat(truth.net)
                yield done, [_flat(net) - exact for net in (engine.task.model, plain.net)]
            if done == max(at):
                return


def _engine(job: Job, loaded: types.Data):
    net = build.build_network(job.config, loaded).to(loaded.x_train.device).train()
    optimizer = build.optimizer_for(net, job.config, "cross_entropy")
    task = Task(net, optimizer, "cross_entropy", loaded.x_train.device)
    task.x, task.y, task.scaling = loaded.x_train, loaded.y_train, loaded.scaling
    task.seed = job.config.seed
    engine = engines.choose(job.config.engine, task)
    engine.set_step(0)
    return engine


def _flat(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


if __name__ == "__main__":
    raise SystemExit(main())
