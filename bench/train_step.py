"""Wall time of ten epochs of Fashion-MNIST with a test after each: ours, and three other ways.

    python -m bench.train_step --data-dir DIR --out bench/results/train.json

In one process and in rounds: each round runs every way once, in random order, with a seed of its
own. Ratios are taken within a round. Reading the files is in nobody's time. Accuracies over seeds
are bench.train_proof's; here the last epoch's are only printed.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch

from fusedmlp.train.data import datasets

from . import record
from .timing import spread
from .train_baselines import DataLoaders, InMemory, Job, Ours, ScikitLearn, jobs

SLOW_ROUNDS = 1  # of the DataLoader script, which takes ten times as long as the others together


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("bench/results/train.json"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loader-rounds", type=int, default=SLOW_ROUNDS, help="0 leaves it out")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: as torch has it")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs(args.data_dir, args.epochs, args.device):
            loaded = datasets.load(job.config).to(args.device)
            ways = [Ours(job, loaded), InMemory(job, loaded), ScikitLearn(job, loaded)]
            if args.loader_rounds:
                ways.append(DataLoaders(job, loaded, Path(folder)))
            rows += _rows(job, ways, args)
    record.write(
        args.out, record.header("train", "bench.train_step", argv, args.device) | {"rows": rows}
    )
    return 0


def _rows(job: Job, ways: list, args) -> list[dict]:
    seconds = {way.name: [] for way in ways}
    ways[0].run(seed=0)  # threads, libraries and kernels are loaded; nothing else is warm
    for number in range(args.rounds):
        now = [w for w in ways if number < args.loader_rounds or not isinstance(w, DataLoaders)]
        random.Random(number).shuffle(now)
        for way in now:
            _wait(args.device)
            start = time.perf_counter()
            accuracy = way.run(seed=number)
            _wait(args.device)
            seconds[way.name].append(time.perf_counter() - start)
            print(
                f"{job.name}  {way.name:<34} {seconds[way.name][-1]:7.2f} s  {accuracy:.4f}",
                flush=True,
            )
    ours = seconds[Ours.name]
    found = []
    for way in ways:
        taken = seconds[way.name]
        ratios = [a / b for a, b in zip(taken, ours, strict=False)]
        found.append(
            {
                "network": job.name,
                "way": way.name,
                "seconds": list(spread(taken)),
                "time over fusedmlp's": list(spread(ratios)),
                "epochs": job.epochs,
                "rounds": len(taken),
            }
        )
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
