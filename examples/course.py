"""What the lessons share: their command line, the images, and where pictures go."""

import argparse
from pathlib import Path

from fusedmlp.train import TrainConfig, drawing
from fusedmlp.train.data import datasets
from fusedmlp.train.data.defaults import resolved
from fusedmlp.train.data.types import permutation

BLUE, RED, GREEN, GREY = "#1f6fb4", "#c0261c", "#1a7f37", "#808080"


def arguments(argv, doc, *, epochs=None, dataset=None, seed=0):
    """--out and --seed; --epochs and --dataset for the lessons that train, or read images."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="for the picture")
    parser.add_argument("--seed", type=int, default=seed, help=f"default {seed}")
    if epochs is not None or dataset is not None:
        shown = epochs or "10 for Fashion-MNIST, 30 for the digits"
        parser.add_argument("--epochs", type=int, default=epochs, help=f"default {shown}")
    if dataset is not None:
        parser.add_argument("--dataset", default=dataset, help=f"default {dataset}")
    return parser.parse_args(argv)


def images(args):
    """The data set of --dataset; 'auto' is Fashion-MNIST, or scikit-learn's digits without it.

    Sets args.epochs, where it was left open, and args.batch to what suits the number of rows.
    """
    data = datasets.load(TrainConfig(dataset=args.dataset))
    config = resolved(TrainConfig(epochs=args.epochs), data)
    args.epochs, args.batch = config.epochs, config.batch_size
    for note in data.notes:
        print(note)
    print(f"{data.name}: {len(data.x_train)} training rows, {len(data.x_test)} test rows")
    return data


def inputs(data, rows):
    """Rows (n, ...) of pixels as they are stored -> inputs (n, pixels) from 0 to 1."""
    return data.scaling(rows).flatten(1)


def order(args, epoch, rows):
    """Row numbers in the order in which `fit` takes them, so that lessons can be compared."""
    return permutation(args.seed, epoch, rows)


def figure(width, height):
    drawing.import_matplotlib()
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def save(picture, args, name):
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.png"
    picture.savefig(path, dpi=80)
    print(f"picture: {path}")
