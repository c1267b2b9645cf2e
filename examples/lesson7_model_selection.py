"""Lesson 7: choosing a model by cross-validation, and what generalisation hangs on.

scikit-learn's digits, made hard: only 400 rows to learn from, and one in five of their labels is
wrong. Rows on which a model is evaluated have the right ones.
"""

import itertools

import torch
from course import BLUE, GREEN, RED, arguments, figure, images, inputs, save

import fusedmlp
from fusedmlp.train import TrainConfig, fit

ROWS = 400
CANDIDATES = [
    {"width": width, "dropout": dropout, "decay": decay}
    for width, dropout, decay in itertools.product((4, 32, 256), (0.0, 0.5), (0.0, 1.0))
]
WIDTHS = (2, 4, 8, 16, 32, 64, 128, 256)
DECAYS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
SIZES = (50, 100, 200, 400, 800)


def make_data(args):
    """Training rows with labels as found and as they are, and a test set nobody has looked at."""
    data = images(args)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(data.x_train), generator=generator)
    x, truth = inputs(data, data.x_train)[order], data.y_train[order]
    wrong = torch.rand(len(truth), generator=generator) < 0.2
    guesses = torch.randint(data.out_features, truth.shape, generator=generator)
    return x, torch.where(wrong, guesses, truth), truth, inputs(data, data.x_test), data.y_test


def train(x, found, x_held, y_held, args, width=256, dropout=0.0, decay=0.0):
    """(network, share of training rows that it gets wrong, share of held-out rows)."""
    torch.manual_seed(args.seed)
    net = fusedmlp.FusedMLP(x.shape[1], [width], 10, dropout=dropout)
    config = TrainConfig(
        epochs=args.epochs,
        batch_size=32,
        optimizer="adamw",
        lr=0.005,
        weight_decay=decay,
        seed=args.seed,
    )
    held = fit(net, (x, found, x_held, y_held), config).history[-1]["test_accuracy"]
    with torch.no_grad():
        wrong = net.eval()(x).argmax(1) != found
    return net, float(wrong.float().mean()), 1 - held


def cross_validate(x, found, truth, args, candidate, folds=5):
    """Validation error of each fold: every row is held out once."""
    errors = []
    for held in torch.arange(len(x)).chunk(folds):
        kept = torch.ones(len(x), dtype=torch.bool)
        kept[held] = False
        errors.append(train(x[kept], found[kept], x[held], truth[held], args, **candidate)[2])
    return torch.tensor(errors)


def choose(x, found, truth, args):
    """The candidate with the lowest mean validation error, and a table of all."""
    print("width  dropout  weight decay   validation error")
    results = []
    for candidate in CANDIDATES:
        errors = cross_validate(x, found, truth, args, candidate)
        results.append((float(errors.mean()), candidate))
        width, dropout, decay = candidate.values()
        text = f"{errors.mean():.1%} +- {errors.std():.1%}"
        print(f"{width:5}  {dropout:7}  {decay:12}   {text}")
    return min(results, key=lambda result: result[0]), results


def sweep(axis, data, args, label, cases):
    """Training and validation error over `cases`: what to vary, and where it is drawn."""
    x, found, x_held, y_held = data
    points = []
    for rows, options, place in cases:
        net, *errors = train(x[:rows], found[:rows], x_held, y_held, args, **options)
        points.append((place(net, rows), *errors))
    points.sort()
    places, training, validation = zip(*points, strict=True)
    axis.plot(places, training, "o-", color=BLUE, label="training")
    axis.plot(places, validation, "o-", color=RED, label="validation")
    axis.set(xscale="linear" if label == "training rows" else "log", xlabel=label)
    axis.set_ylim(-0.02, 0.8)
    axis.grid(alpha=0.3)
    axis.legend()
    return points


def parameters(net, rows):
    return sum(p.numel() for p in net.parameters())


def squared_norm(net, rows):
    return sum(float(p.detach().square().sum()) for p in net.parameters())


def main(argv=None):
    args = arguments(argv, __doc__, epochs=60, dataset="digits")
    x, found, truth, x_test, y_test = make_data(args)
    # The rows after the first 800 are the validation set of the sweeps; the test set has to wait.
    data = x[:800], found[:800], x[800:], truth[800:]
    figures = {}
    picture = figure(15, 4)
    axes = picture.subplots(1, 4)
    sweeps = {
        "parameters": [(ROWS, {"width": width}, parameters) for width in WIDTHS],
        "squared norm of the weights": [(ROWS, {"decay": d}, squared_norm) for d in DECAYS],
        "training rows": [(rows, {}, lambda net, rows: rows) for rows in SIZES],
    }
    for axis, (label, cases) in zip(axes, sweeps.items(), strict=False):
        figures[label] = sweep(axis, data, args, label, cases)
        print(label + ", training and validation error:")
        for place, training, validation in figures[label]:
            print(f"{place:10.0f}  {training:6.1%}  {validation:6.1%}")
    axes[0].set_ylabel("error")

    (error, best), results = choose(x[:ROWS], found[:ROWS], truth[:ROWS], args)
    _, _, test_error = train(x[:ROWS], found[:ROWS], x_test, y_test, args, **best)
    figures |= {"best": best, "validation": error, "test": test_error, "results": results}
    print(f"chosen: {best}, refit on all {ROWS} rows")
    print(f"test error, looked at once: {test_error:.1%}; in cross-validation it was {error:.1%}")

    names = ["-".join(f"{v:g}" for v in candidate.values()) for _, candidate in results]
    colours = [GREEN if candidate is best else BLUE for _, candidate in results]
    axes[3].barh(names, [e for e, _ in results], color=colours)
    axes[3].axvline(test_error, color=RED, label="test error of the chosen one")
    axes[3].set(xlabel="validation error", title="width-dropout-decay")
    axes[3].invert_yaxis()
    axes[3].legend(loc="lower right", fontsize=9)
    save(picture, args, "lesson7_model_selection")
    return figures


if __name__ == "__main__":
    main()
