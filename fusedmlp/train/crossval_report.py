"""The results of a cross-validation: lines and a table, crossval.png, results.csv, summary.json and
the chosen network."""

import csv
import io
import math
from collections.abc import Callable

from .config import shown
from .console import Console
from .drawing import PART_COLOURS, RIGHT_COLOUR, new_figure, png
from .run_folder import RunFolder, model_bytes

MAX_IN_PICTURE = 40  # candidates


def measure_name(result) -> str:
    return "error" if result.data.is_classes else "mean squared error"


def _figure_of(value: float, is_classes: bool) -> str:
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.2%}" if is_classes else f"{value:.4g}"


def _spread(candidate, part: str, is_classes: bool) -> str:
    mean = candidate.mean(part)
    if not math.isfinite(mean):
        return "diverged"
    return f"{_figure_of(mean, is_classes)} ± {_figure_of(candidate.deviation(part), is_classes)}"


class Report(Console):
    """Console for a cross-validation: a bar over all epochs on a terminal, and the table."""

    def start(self, data, found, folds: int, device, place, notes) -> None:
        for note in (*data.notes, *notes):
            self.note(note)
        self.say(
            f"{data.name}: {len(data.x_train)} training rows in {folds} folds, "
            f"{len(found)} candidates: {len(found) * folds} networks on {device}"
        )
        if place is not None:
            self.say(f"run folder: {place.path}")
        if self.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("epochs of all networks"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                console=self.rich,
                transient=True,
            )
            self.job = self.bar.add_task("", total=None)
            self.bar.start()

    def trained(self, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.update(self.job, completed=done, total=total)

    def finish(self, result) -> None:
        from rich.table import Table

        is_classes = result.data.is_classes
        table = Table(title=f"{measure_name(result)}, mean ± deviation over {result.folds} folds")
        for name in ("", *result.best.settings, "parameters", "training", "validation"):
            table.add_column(name, justify="right")
        for candidate in result.candidates:
            is_best = candidate is result.best
            table.add_row(
                "best" if is_best else "",
                *(shown(value) for value in candidate.settings.values()),
                str(candidate.parameters),
                _spread(candidate, "train", is_classes),
                _spread(candidate, "val", is_classes),
                style="bold" if is_best else None,
            )
        self.show(table)
        self.say(f"chosen: {result.best.label}; trained again on all training rows")
        if result.test is not None:
            self.say(
                f"test {measure_name(result)}, looked at once: "
                f"{_figure_of(result.test.error, is_classes)}"
                + ("" if result.test_r2 is None else f", R2 {result.test_r2:.4f}")
            )
        self.say(
            f"{result.seconds['search']:.2f} s for all folds, {result.seconds['refit']:.2f} s for "
            "the last training"
        )
        for path in result.paths.values():
            self.say(f"written  {path}")


def write_report(result, place: RunFolder, about: dict, warn: Callable[[str], None]) -> None:
    """Write all results, the summary last: a folder that has one is complete. Then the picture, if
    it can be drawn. config.json is that of the chosen network, so that `evaluate` and `predict`
    take the folder."""
    place.write_config(result.best.config)
    place.write("results.csv", results_csv(result))
    place.write_metrics([{"seconds": None, **row} for row in result.refit])
    place.write("model.safetensors", model_bytes(result.model, about))
    place.write_json("summary.json", summary(result))
    place.write_pictures({"crossval.png": lambda: picture(result)}, warn)


def results_csv(result) -> str:
    """A row for each candidate and fold."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(result.best.settings)
    scores = ("train_error", "train_loss", "val_error", "val_loss")
    writer.writerow(["candidate", *names, "parameters", "fold", *scores])
    for candidate in result.candidates:
        values = [shown(value) for value in candidate.settings.values()]
        for fold, (train, val) in enumerate(zip(candidate.train, candidate.val, strict=True)):
            numbers = (train.error, train.loss, val.error, val.loss)
            writer.writerow(
                [
                    candidate.number,
                    *values,
                    candidate.parameters,
                    fold + 1,
                    *(f"{number:.9g}" for number in numbers),
                ]
            )
    return text.getvalue()


def summary(result) -> dict:
    def numbers(candidate) -> dict:
        found = {"candidate": candidate.number, **candidate.settings}
        for part in ("train", "val"):
            for name in ("mean", "deviation"):
                value = getattr(candidate, name)(part)
                found[f"{part}_error_{name}"] = value if math.isfinite(value) else None
        return found | {"parameters": candidate.parameters}

    return {
        "dataset": result.data.name,
        "measure": measure_name(result),
        "folds": result.folds,
        "best": numbers(result.best),
        "test_error": None if result.test is None else result.test.error,
        "test_loss": None if result.test is None else result.test.loss,
        "test_r2": result.test_r2,
        "search_seconds": round(result.seconds["search"], 4),
        "refit_seconds": round(result.seconds["refit"], 4),
        "candidates": [numbers(candidate) for candidate in result.candidates],
    }


def picture(result) -> bytes:
    """Left: validation over training error, with the line on which both are equal. A candidate
    far up the line learns too little, one far above it overfits. Right: the same errors by
    candidate."""
    found = [c for c in result.candidates if math.isfinite(c.mean("val"))]
    found = sorted(found, key=lambda c: c.mean("val"))[:MAX_IN_PICTURE]
    found.sort(key=lambda c: c.number)
    figure, axes = new_figure(13, max(4.5, 1.5 + 0.28 * len(found)), 1, 2)
    _plane(axes[0, 0], found, result)
    _list(axes[0, 1], found, result)
    lost = sum(not math.isfinite(c.mean("val")) for c in result.candidates)
    figure.suptitle(
        f"{result.data.name}: {len(result.candidates)} candidates in {result.folds} folds"
        + (f", {lost} diverged" if lost else "")
        + (
            f"; the best {MAX_IN_PICTURE} are shown"
            if len(result.candidates) - lost > MAX_IN_PICTURE
            else ""
        )
    )
    return png(figure)


def _plane(axis, found, result) -> None:
    for candidate in found:
        is_best = candidate is result.best
        axis.errorbar(
            candidate.mean("train"),
            candidate.mean("val"),
            xerr=candidate.deviation("train"),
            yerr=candidate.deviation("val"),
            fmt="*" if is_best else "o",
            markersize=14 if is_best else 6,
            color=RIGHT_COLOUR if is_best else PART_COLOURS["train"],
            elinewidth=0.7,
            label="chosen" if is_best else None,
        )
        axis.annotate(
            str(candidate.number),
            (candidate.mean("train"), candidate.mean("val")),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    most = max(c.mean(part) + c.deviation(part) for c in found for part in ("train", "val"))
    most = 1.05 * most or 1.0
    axis.plot([0, most], [0, most], color="black", linewidth=0.8)
    words = {"color": "grey", "fontsize": 10, "transform": axis.transAxes}
    axis.text(0.03, 0.96, "overfits: above the line", va="top", **words)
    axis.text(0.97, 0.2, "underfits: far up the line", ha="right", va="top", **words)
    axis.set(
        xlabel=f"training {measure_name(result)}",
        ylabel=f"validation {measure_name(result)}",
        xlim=(-0.02 * most, most),
        ylim=(-0.02 * most, most),
    )
    _spread_out(axis, ("x", "y"), found)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")


def _spread_out(axis, directions: tuple[str, ...], found) -> None:
    """Make axes logarithmic where one candidate is so bad that the good ones would coincide; below
    the smallest error they stay linear, which keeps an error of 0 on the picture."""
    errors = [value for c in found for part in ("train", "val") if (value := c.mean(part)) > 0]
    if not errors or max(errors) < 8 * min(errors):
        return
    for direction in directions:
        getattr(axis, f"set_{direction}scale")("symlog", linthresh=min(errors))
        getattr(axis, f"set_{direction}lim")(-0.3 * min(errors), 1.4 * max(errors))


def _list(axis, found, result) -> None:
    places = range(len(found))
    for part, label in (("train", "training"), ("val", "validation")):
        axis.errorbar(
            [c.mean(part) for c in found],
            places,
            xerr=[c.deviation(part) for c in found],
            fmt="o",
            color=PART_COLOURS["train" if part == "train" else "test"],
            elinewidth=0.8,
            label=label,
        )
    if result.test is not None:
        axis.axvline(
            result.test.error, color="black", linestyle=":", label="test, of the chosen one"
        )
    labels = [f"{c.number}: {c.label}" for c in found]
    axis.set_yticks(places, labels, fontsize=8)
    for tick, candidate in zip(axis.get_yticklabels(), found, strict=True):
        if candidate is result.best:
            tick.set(color=RIGHT_COLOUR, fontweight="bold")
    axis.invert_yaxis()
    axis.set(xlabel=measure_name(result))
    _spread_out(axis, ("x",), found)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)  # hides no candidate
