"""Whole trainings on Fashion-MNIST, ours against other ways: their time, their accuracy, and
whether our parameters are those of PyTorch's loop.

    python -m bench.train --data-dir DIR --threads 2
    python -m bench.train --data-dir DIR --threads 2 --ways JAX --resume
    python -m bench.train --data-dir DIR --part seeds parity --resume

All ways begin with data that is read and unpacked, train as many epochs and test after each.
train.json    wall time. In rounds: each runs every way once, in random order, with a seed of its
              own; ratios are taken within a round. What a way compiles, it has compiled before, and
              has been held against fp64; `compile, s` is what that took. With --resume the rows of
              ways that do not run now are kept
seeds.json    mean and deviation over seeds of the test accuracy after the last epoch; `ours off by`
              is the distance of our mean from this way's, in standard errors. Ways that are in it
              are kept with --resume
parity.json   error of all parameters after some steps, against an fp64 run of the same weights,
              order and masks, over that of plain PyTorch in fp32; at most 2 is promised. Medians
              over seeds: at lr 0.5 two runs that differ in one rounding part by a factor of 1e5 in
              50 steps, so the ratio of two single runs is a matter of luck
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmlp.train import TrainConfig, build, engines, fit
from fusedmlp.train.data import datasets, defaults, images, types

from . import record, rivals, timing, ways
from .ways import Network

PARTS = ("time", "seeds", "parity")
CHECKED = 8  # steps that a rival is held against fp64
# Of the errors of all parameters.
SIZES = {"max": lambda e: e.abs().max(), "RMS": lambda e: e.square().mean().sqrt()}


@dataclass(frozen=True)
class Job:
    """One network on Fashion-MNIST, and how it is trained."""

    name: str
    config: TrainConfig

    def network(self, data: types.Data) -> Network:
        c = self.config
        dims = (data.in_features, *c.hidden, data.out_features)
        rate = c.learning_rate("cross_entropy")
        return Network(dims, c.dropout_per_layer(), c.batch_size, c.precision, rate)

    def seeded(self, seed: int) -> Job:
        return replace(self, config=self.config.replace(seed=seed))


def jobs(data_dir: Path | None, epochs: int, device: str) -> list[Job]:
    """The two networks that the project is measured by."""
    base = TrainConfig(dataset="fashion_mnist", data_dir=data_dir, batch_size=256, epochs=epochs)
    first = base.replace(device=device, hidden=(256,), dropout=(0.0,))
    second = first.replace(hidden=(256, 256), dropout=(0.2, 0.5), lr=0.5)
    return [Job("784-256-10", first), Job("784-256-256-10, dropout 0.2, 0.5", second)]


def data_or_noise(job: Job, rows: int | None) -> types.Data:
    """Fashion-MNIST where it is on disk and no number of rows is asked for, else noise."""
    root = job.config.data_dir or images.default_folder()
    if rows is None and images.find_files(images.IMAGE_SETS["fashion_mnist"], root):
        return datasets.load(job.config)
    rows = rows or 60_000
    return ways.noise(rows, max(1, rows // 6))


class Ours:
    """fusedmlp.train.fit, the work of `fusedmlp train` without its files."""

    name = "fusedmlp"

    def __init__(self, job: Job, data: types.Data):
        self.job, self.data = job, data

    def run(self, seed: int) -> float:
        config = self.job.seeded(seed).config
        result = fit(build.build_network(config, self.data), self.data, config)
        if result.interrupted:
            raise KeyboardInterrupt
        return result.history[-1]["test_accuracy"]


class OursBf16(Ours):
    name = "fusedmlp, bf16"

    def __init__(self, job: Job, data: types.Data):
        if reason := engines.native_op.reason_against("bf16"):
            raise RuntimeError(reason)
        super().__init__(replace(job, config=job.config.replace(precision="bf16")), data)


class InMemory:
    """A careful eager loop: fp32 images in memory, one permutation an epoch, nothing else."""

    name = "PyTorch, in-memory loop"
    way: type = ways.Eager

    def __init__(self, job: Job, data: types.Data):
        self.job, self.data = job, data
        case, self.x_test = job.network(data), data.scaling(data.x_test)
        self.loop = self.way(case, data, x=data.scaling(data.x_train))
        self.compiling = ways.compiling(self.loop, self._epoch)
        if self.way is not ways.Eager:
            checker = ways.Checker(case, data, self._order()[: CHECKED * case.batch])
            if reason := checker.wrong(self.loop):
                raise RuntimeError(reason)

    def _order(self) -> Tensor:
        return torch.randperm(len(self.data.x_train), device=self.x_test.device)

    def _epoch(self) -> float:
        self.loop.steps(self._order())
        return self.loop.accuracy(self.x_test, self.data.y_test)

    def run(self, seed: int) -> float:
        torch.manual_seed(seed)
        net = build.build_network(self.job.seeded(seed).config, self.data)
        self.loop.net.load_state_dict(nn.Sequential(*net.children()).state_dict())
        return [self._epoch() for _ in range(self.job.config.epochs)][-1]


class Medium(InMemory):
    name, way = "PyTorch, in-memory loop, precision medium", rivals.Medium


class CompiledStep(InMemory):
    name, way = "PyTorch, compiled step", rivals.CompiledStep


class Jax(InMemory):
    name, way = "JAX, jitted epoch", rivals.Jax


class NumPy(InMemory):
    name, way = "NumPy by hand", rivals.NumPy


class DataLoaders:
    """The usual script: torchvision's data set, ToTensor, a shuffling DataLoader."""

    name = "PyTorch, torchvision + DataLoader"

    def __init__(self, job: Job, data: types.Data):
        from torchvision import datasets, transforms

        self.job, self.data = job, data
        self.folder = tempfile.TemporaryDirectory()
        ways.unpack(job.config.data_dir, Path(self.folder.name))
        made = ((self.folder.name, part, transforms.ToTensor()) for part in (True, False))
        self.sets = [datasets.FashionMNIST(*arguments) for arguments in made]

    def run(self, seed: int) -> float:
        from torch.utils.data import DataLoader

        torch.manual_seed(seed)
        case, device = self.job.network(self.data), self.data.x_train.device
        train = DataLoader(self.sets[0], case.batch, shuffle=True)
        test = DataLoader(self.sets[1], case.batch)
        layers = build.build_network(self.job.seeded(seed).config, self.data).children()
        net = nn.Sequential(nn.Flatten(), *layers).to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=case.rate)
        for _ in range(self.job.config.epochs):
            net.train()
            for x, y in train:
                loss = F.cross_entropy(net(x.to(device)), y.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            net.eval()
            right = 0
            with torch.no_grad():
                for x, y in test:
                    right += (net(x.to(device)).argmax(1) == y.to(device)).sum().item()
        return right / len(self.sets[1])


class ScikitLearn:
    """MLPClassifier of the same sizes; it knows no dropout, and tests once at the end."""

    name = "scikit-learn MLPClassifier"

    def __init__(self, job: Job, data: types.Data):
        self.job, self.case = job, job.network(data)
        parts = data.scaling(data.x_train), data.y_train, data.scaling(data.x_test), data.y_test
        self.x, self.y, self.x_test, self.y_test = (t.cpu().numpy() for t in parts)

    def run(self, seed: int) -> float:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        epochs = self.job.config.epochs
        settings = dict(solver="sgd", momentum=0.0, alpha=0.0, tol=0.0, random_state=seed)
        settings |= dict(learning_rate_init=self.case.rate, batch_size=self.case.batch)
        settings |= dict(max_iter=epochs, n_iter_no_change=epochs + 1)
        net = MLPClassifier(self.job.config.hidden, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is to stop after max_iter
            net.fit(self.x, self.y)
        return float(net.score(self.x_test, self.y_test))


WAYS = (Ours, OursBf16, Jax, InMemory, Medium, CompiledStep, NumPy, ScikitLearn, DataLoaders)


def time_rows(job: Job, data: types.Data, compared: list, rounds: int, **limits) -> list[dict]:
    """A row a way: wall time, and the accuracies of the rounds; limits: of timing.rounds."""
    compared[0].run(seed=rounds)  # threads, libraries and kernels are loaded
    made, device = {way.name: way for way in compared}, data.x_train.device.type
    runs = {name: way.run for name, way in made.items()}
    found = timing.rounds(runs, rounds, device, **limits)
    rows = []
    for name, (seconds, accuracies) in found.items():
        if seconds:
            row = {"network": job.name, "way": name, "seconds": timing.spread(seconds)}
            row["time over fusedmlp's"] = timing.over(seconds, found[compared[0].name][0])
            if compiling := getattr(made[name], "compiling", None):
                row["compile, s"] = compiling
            row |= {"epochs": job.config.epochs, "rounds": len(seconds), "data": data.name}
            if data.name != "noise":
                row["test accuracy"] = statistics.mean(accuracies)
                row["deviation"] = statistics.stdev(accuracies) if len(seconds) > 1 else None
            rows.append(row)
    return rows


def epoch_rows(job: Job, data: types.Data, precision: str, seeds: int, until: float) -> list[dict]:
    """Two rows: ours and the eager loop, each with every seed, in random order within a seed."""
    engine = "graph" if data.x_train.is_cuda else "auto"
    job = replace(job, config=job.config.replace(precision=precision, engine=engine))
    with timing.products(precision):
        compared = [Ours(job, data), InMemory(job, data)]
        compared[1].run(seed=seeds)
        rows = time_rows(job, data, compared, seeds, until=until)
    return [{"table": "epochs", "precision": precision} | row for row in rows]


def ready(job: Job, data: types.Data, asked: list[str]) -> list:
    """Ours, and the ways whose names begin so; of one that cannot run here the reason is told."""
    found = []
    for make in WAYS:
        if make is Ours or make.name.startswith(tuple(asked)):
            try:
                found.append(make(job, data))
            except (ImportError, RuntimeError) as error:
                print(f"bench.train: {make.name} is left out: {error}", file=sys.stderr)
    return found


def put(times: record.Results, rows: list[dict]) -> None:
    """Adds rows in place of those of the same job and way."""

    def which(row: dict) -> tuple:
        return tuple(row.get(name) for name in ("network", "way", "epochs", "busy"))

    new = {which(row) for row in rows}
    place = {way.name: i for i, way in enumerate(WAYS)}
    times.rows = [row for row in times.rows if which(row) not in new]
    times.add(*rows)
    times.rows.sort(key=lambda row: (row["network"], place.get(row["way"], len(place))))
    times.write()


def seed_row(job: Job, way, seeds: int) -> dict:
    values = [way.run(seed) for seed in range(seeds)]
    row = {"network": job.name, "way": way.name, "epochs": job.config.epochs, "seeds": seeds}
    row |= {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}
    return row | {"lowest": min(values), "highest": max(values)}


def compare(rows: list[dict], name: str = Ours.name) -> None:
    """Adds the distance of the mean of way `name` from each other way's, in standard errors."""
    ours = {row["network"]: row for row in rows if row["way"] == name}
    for row in rows:
        us = ours.get(row["network"])
        if us is not None and us is not row:
            error = math.hypot(*(r["deviation"] / math.sqrt(r["seeds"]) for r in (us, row)))
            row["ours off by"] = (us["mean"] - row["mean"]) / error


def parity_rows(job: Job, data: types.Data, at: list[int], seeds: int) -> list[dict]:
    """One row for each number of steps; ratios as median, p20 and p80 over seeds."""
    found: dict[int, list[list[Tensor]]] = {steps: [] for steps in at}
    for seed in range(seeds):
        for steps, errors in _errors(job.seeded(seed), data, at):
            found[steps].append(errors)
    rows = []
    for steps, errors in found.items():
        row = {"network": job.name, "steps": steps, "seeds": seeds}
        for kind, size in SIZES.items():
            ours, theirs = ([size(pair[side]).item() for pair in errors] for side in (0, 1))
            row[f"{kind} error"] = statistics.median(ours)
            row[f"{kind} error of PyTorch"] = statistics.median(theirs)
            row[f"{kind} ratio"] = timing.over(ours, theirs)
        rows.append(row)
    return rows


def _errors(job: Job, data: types.Data, at: list[int]) -> Iterator[tuple[int, list[Tensor]]]:
    """(steps, [ours, PyTorch's]): differences from fp64 of all parameters."""
    case, config = job.network(data), defaults.resolved(job.config, data)
    net = build.build_network(config, data).to(data.x_train.device)
    truth, plain = (
        ways.Masked(case, data, dtype, net, config.seed) for dtype in (torch.float64, torch.float32)
    )
    task = ways.task_of(case, data, net)
    task.optimizer = build.optimizer_for(net, config, "cross_entropy")
    task.seed = config.seed
    engine = engines.choose(config.engine, task)
    engine.set_step(0)
    done, epoch = 0, 0
    while done < max(at, default=0):
        order = types.permutation(config.seed, epoch, len(data.x_train))
        epoch += 1
        for rows in order.to(data.x_train.device).split(config.batch_size):
            for loop in (truth, plain, engine):
                loop.step(rows)
            done += 1
            if done in at:
                engine.sync()
                exact = ways.flat(truth.net)
                yield done, [ways.flat(model) - exact for model in (net, plain.net)]
            if done == max(at):
                return


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["time"])
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    parser.add_argument("--resume", action="store_true", help="keep what the files have")
    parser.add_argument(
        "--ways", nargs="+", default=[""], help="ours, and those whose names begin so"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5, help="of `time`")
    parser.add_argument("--busy", type=int, default=0, help="programs that run beside `time`")
    # The DataLoader script takes ten times as long as the others together.
    parser.add_argument("--loader-rounds", type=int, default=1, help="of the DataLoader script")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--parity-seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 50, 500], help="of `parity`")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: as torch has it")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {}
    for name in ("train", "seeds", "parity"):
        head = record.header(name, "bench.train", argv, args.device, rivals.PACKAGES)
        make = record.resumed if args.resume and name != "parity" else record.Results
        results[name] = make(head, args.out / f"{name}.json")
    times, seeds, parity = results.values()
    for job in jobs(args.data_dir, args.epochs, args.device):
        data = datasets.load(job.config).to(args.device)
        if "parity" in args.part:
            parity.add(*parity_rows(job, data, args.steps, args.parity_seeds))
        if args.part == ["parity"]:
            continue
        compared = ready(job, data, args.ways)
        if "time" in args.part:
            fewer = {DataLoaders.name: args.loader_rounds}
            with timing.busy(args.busy):
                rows = time_rows(job, data, compared, args.rounds, only_first=fewer)
            put(times, [row | ({"busy": args.busy} if args.busy else {}) for row in rows])
        for way in compared if "seeds" in args.part else ():
            row = {"network": job.name, "way": way.name, "epochs": args.epochs}
            row["seeds"] = args.seeds
            if not any(row.items() <= found.items() for found in seeds.rows):
                seeds.add(seed_row(job, way, args.seeds))
                compare(seeds.rows)
                seeds.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
