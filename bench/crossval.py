"""Model selection: folds and candidates trained together against one after the other, and a
GridSearchCV of our estimator against scikit-learn's MLPClassifier.

    python -m bench.crossval --data-dir DIR --threads 2 --out bench/results/crossval.json

In one process and in rounds: each round runs every way once, in random order; ratios are taken
within a round. Before anything is timed, folds trained together must score as those trained alone.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier

from fusedmlp.sklearn import FusedMLPClassifier
from fusedmlp.train import Data, TrainConfig, build, crossval, fit
from fusedmlp.train.crossvalidation import candidate_configs, splits_of
from fusedmlp.train.data import datasets

from . import record, timing

FOLDS = 5
COMPARED = {"hidden": [64, 128], "dropout": [0.0, 0.2], "weight_decay": [0.0, 1e-4, 1e-3]}
GRID = {"hidden_layer_sizes": [(50,), (100,), (200,)], "alpha": [1e-4, 1e-2, 1.0]}
PARTS = ("crossval", "digits", "fashion_mnist")  # of the benchmark; the last two are searches
IMAGES, IMAGE_EPOCHS = 10_000, 20  # rows of Fashion-MNIST, and passes over them


def together(config: TrainConfig) -> list[float]:
    """Mean validation error of each candidate, by crossval; its refit is in the time."""
    return [c.mean("val") for c in crossval(config, COMPARED, folds=FOLDS).candidates]


def one_by_one(config: TrainConfig) -> list[float]:
    """The same by a loop of fit, the last network on all rows included."""
    loaded = datasets.load(config)
    whole = replace(loaded, x_test=None, y_test=None)
    x, y = loaded.x_train, loaded.y_train
    errors, candidates = [], candidate_configs(config, COMPARED)
    for candidate in candidates:
        parts = splits_of(loaded, FOLDS)[0]
        wrong = [
            _error(candidate, replace(whole, x_train=x[kept], y_train=y[kept]), x[held], y[held])
            for kept, held in parts
        ]
        errors.append(sum(wrong) / len(wrong))
    best = candidates[min(range(len(errors)), key=errors.__getitem__)]
    _error(best, whole, loaded.x_test, loaded.y_test)
    return errors


def _error(config: TrainConfig, part: Data, x, y) -> float:
    net = build.build_network(config, part)
    fit(net, part, config)
    build.evaluate(net, part.x_train, part.y_train, part.scaling, "cross_entropy")
    return 1 - build.evaluate(net, x, y, part.scaling, "cross_entropy")[1]


def search(kind, x, y, x_test, y_test, epochs: int):
    """A function of a seed that returns the test score of the best of the grid."""

    def run(seed: int) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            estimator = kind(max_iter=epochs, random_state=seed)
            return GridSearchCV(estimator, GRID, cv=FOLDS).fit(x, y).score(x_test, y_test)

    return run


def rows_of(what: str, ways: dict, rounds: int, score: str) -> list[dict]:
    """Time each way once a round, the first being ours."""
    found = timing.rounds(ways, rounds)
    ours = next(iter(found.values()))[0]
    rows = []
    for name, (seconds, scores) in found.items():
        row = {"what": what, "way": name, "seconds": timing.spread(seconds)}
        row["time over fusedmlp's"] = timing.over(seconds, ours)
        row |= {"score": statistics.mean(scores), "score is": score}
        rows.append(row | {"rounds": rounds})
    return rows


def fold_rows(config: TrainConfig, rounds: int) -> list[dict]:
    first, second = together(config), one_by_one(config)  # warms both as well
    if any(abs(a - b) > 1e-9 for a, b in zip(first, second, strict=True)):
        raise SystemExit(f"together and one by one must agree, got {first} and {second}")
    count = len(list(itertools.product(*COMPARED.values())))
    ways = {
        "crossval": lambda seed: min(together(config.replace(seed=seed))),
        "fit, one after the other": lambda seed: min(one_by_one(config.replace(seed=seed))),
    }
    what = f"{count} candidates x {FOLDS} folds, digits"
    return rows_of(what, ways, rounds, "validation error")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.crossval", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST; else digits only")
    parser.add_argument("--out", type=Path, default=Path("bench/results/crossval.json"))
    parser.add_argument("--rounds", type=int, default=3, help="of the cross-validation")
    # A search is 46 fits already, and takes a minute where a cross-validation takes a second.
    parser.add_argument("--grid-rounds", type=int, default=1, help="of GridSearchCV")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--epochs", type=int, default=30, help="of the cross-validated networks")
    parser.add_argument("--grid-epochs", type=int, default=200, help="at most, on digits")
    parser.add_argument("--threads", type=int, help="default: as torch has it")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = record.Results(record.header("crossval", "bench.crossval", argv), args.out)
    config = TrainConfig(dataset="digits", device="cpu", epochs=args.epochs)
    if "crossval" in args.parts:
        results.add(*fold_rows(config, args.rounds))
    for name, epochs in (("digits", args.grid_epochs), ("fashion_mnist", IMAGE_EPOCHS)):
        if name not in args.parts or (name != "digits" and args.data_dir is None):
            continue
        loaded = datasets.load(config.replace(dataset=name, data_dir=args.data_dir))
        top = float(loaded.scaling.divisor)
        x, x_test = (t.flatten(1).numpy() / top for t in (loaded.x_train[:IMAGES], loaded.x_test))
        parts = x, loaded.y_train[:IMAGES].numpy(), x_test, loaded.y_test.numpy(), epochs
        # Rows are fp64, in which ours would be no faster; it is asked for fp32.
        kinds = {"FusedMLPClassifier": partial(FusedMLPClassifier, engine="native")}
        kinds["MLPClassifier"] = MLPClassifier
        ways = {name: search(kind, *parts) for name, kind in kinds.items()}
        what = f"GridSearchCV 3 x 3 x {FOLDS}, {name}, {len(x)} rows"
        results.add(*rows_of(what, ways, args.grid_rounds, "test accuracy"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
