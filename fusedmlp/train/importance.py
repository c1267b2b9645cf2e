"""Permutation importance: how much worse a network predicts once the cells of one column are
shuffled among the rows.

A column is one of the table's own, whatever number of inputs it became, and these are shuffled
together. Two columns that say the same stand in for each other, so that either looks unimportant.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import in_units
from .data.types import Data, seeded
from .drawing import PART_COLOURS, new_figure, png, readable

MOST_COLUMNS = 1_000  # of a table with more there is none, since each is predicted again
# Shuffles of each column, with many columns fewer; rows, and rows predicted in all.
REPEATS, MOST_SHUFFLES = 5, 500
MOST_ROWS, MOST_OUTPUTS, MANY_CLASSES = 10_000, 1_000_000, 50
MOST_BARS = 30


@dataclass(frozen=True)
class Importance:
    """worse: {what is measured: (columns, repeats) by how much it gets worse}; the columns in
    falling order of the first measure's mean."""

    columns: tuple[str, ...]
    worse: dict[str, Tensor]
    rows: int


def importance(data: Data, predict: Callable[[Tensor], Tensor]) -> Importance:
    """Of the test rows, or of some of them where there are many, by scikit-learn's metrics.

    data     with test rows (n, k) of a table
    predict  (n, C) outputs on the CPU of such rows
    """
    inputs = inputs_of_columns(data)
    repeats = max(1, min(REPEATS, MOST_SHUFFLES // len(inputs)))
    generator = seeded("importance", 0)
    order = torch.randperm(len(data.x_test), generator=generator)
    outputs = repeats * len(inputs) * max(1, len(data.classes or ()) // MANY_CLASSES)
    rows = order[: min(MOST_ROWS, MOST_OUTPUTS // outputs)]
    x, y = data.x_test[rows.to(data.x_test.device)], data.y_test[rows.to(data.y_test.device)].cpu()
    measure = _of_classes(data, y) if data.is_classes else _of_numbers(data, y)
    whole = measure(predict(x))
    worse = {name: torch.zeros(len(inputs), repeats, dtype=torch.float64) for name in whole}
    shuffles = [torch.randperm(len(x), generator=generator).to(x.device) for _ in range(repeats)]
    for number, of_column in enumerate(inputs.values()):
        kept = x[:, of_column].clone()
        for repeat, shuffle in enumerate(shuffles):
            x[:, of_column] = kept[shuffle]
            for name, value in measure(predict(x)).items():
                worse[name][number, repeat] = value - whole[name]
        x[:, of_column] = kept
    first = next(iter(worse.values())).mean(1)
    falling = first.argsort(descending=True, stable=True)
    names = list(inputs)
    return Importance(
        tuple(names[place] for place in falling.tolist()),
        {name: values[falling] for name, values in worse.items()},
        len(x),
    )


def inputs_of_columns(data: Data) -> dict[str, slice]:
    """{column of the table: the inputs that it became}."""
    if data.preparation is None:
        width = data.x_test[0].numel()
        names = data.features or tuple(f"column {number + 1}" for number in range(width))
        return {name: slice(place, place + 1) for place, name in enumerate(names)}
    found, start = {}, 0
    for part in data.preparation.parts:
        found[part.column.name] = slice(start, start + len(part.names))
        start += len(part.names)
    return found


# A measure is what rises when predictions get worse, under the name of its change.


def _of_classes(data: Data, y: Tensor) -> Callable[[Tensor], dict[str, float]]:
    from sklearn.metrics import accuracy_score, log_loss

    classes = range(len(data.classes))

    def measure(outputs: Tensor) -> dict[str, float]:
        shares = outputs.double().softmax(1)
        return {
            "log loss rise": log_loss(y, shares, labels=classes),
            "accuracy fall": -accuracy_score(y, shares.argmax(1)),
        }

    return measure


def _of_numbers(data: Data, y: Tensor) -> Callable[[Tensor], dict[str, float]]:
    from sklearn.metrics import r2_score, root_mean_squared_error

    def measure(outputs: Tensor) -> dict[str, float]:
        true, found = in_units(data, y, outputs)
        return {
            "R2 fall": -r2_score(true, found),
            "RMSE rise": root_mean_squared_error(true, found),
        }

    return measure


def importance_csv(found: Importance) -> str:
    """A row a column: of each measure the mean over the shuffles and their deviation."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measures = [name.lower().replace(" ", "_") for name in found.worse]
    heads = [head for name in measures for head in (name, f"{name}_deviation")]
    writer.writerow(["column", *heads])
    for number, name in enumerate(found.columns):
        each = [values[number] for values in found.worse.values()]
        figures = [
            value for row in each for value in (float(row.mean()), float(row.std(correction=0)))
        ]
        writer.writerow([name, *(f"{round(value, 9) + 0.0:.6g}" for value in figures)])
    return text.getvalue()


def bars(data: Data, found: Importance) -> bytes:
    """A panel for each measure, a bar for each column, the most important on top."""
    count = min(MOST_BARS, len(found.columns))
    figure, axes = new_figure(10, 1.4 + 0.24 * max(count, 5), 1, len(found.worse))
    places = range(count)
    for axis, (name, values) in zip(axes[0], found.worse.items(), strict=True):
        axis.barh(
            places,
            values.mean(1)[:count].tolist(),
            xerr=values.std(1, correction=0)[:count].tolist(),
            color=PART_COLOURS["train"],
            error_kw={"elinewidth": 1, "ecolor": "#444444"},
        )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(places, [])
        axis.set(xlabel=_axis_words(data, name), ylim=(count - 0.4, -0.6))
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0, 0].set_yticks(places, [readable(name) for name in found.columns[:count]])
    repeats = next(iter(found.worse.values())).shape[1]
    left = len(found.columns) - count
    figure.suptitle(
        f"{readable(data.name)}: columns that {readable(data.target or 'the target')} is "
        f"predicted from\nhow much worse {found.rows} rows are predicted with the column shuffled"
        + (f"; mean and deviation of {repeats} shuffles" if repeats > 1 else "")
        + (f"\nthe {count} most important of {len(found.columns)}" if left else ""),
        fontsize=10,
    )
    return png(figure)


def _axis_words(data: Data, measure: str) -> str:
    name, change = measure.rsplit(" ", 1)
    unit = f" of {readable(data.target or 'the target')}" if name == "RMSE" else ""
    return f"{name}{unit} {change}s by"
