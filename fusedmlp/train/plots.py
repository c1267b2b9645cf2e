"""Pictures of a run as PNG bytes: learning curves, predictions and mistakes.

Everything is drawn off screen and nothing is written; matplotlib is imported for the first picture.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .data.scaling import Scaling
from .data.types import Data
from .errors import TrainError

# Images on the prediction sheet: the first of the test set, then the first mistakes.
FIRST_IMAGES, MISTAKE_IMAGES = 24, 16
IMAGES_A_ROW = 8
NAME_LENGTH = 40  # characters
RIGHT_COLOUR, WRONG_COLOUR = "#1a7f37", "#c0261c"
PART_COLOURS = {"train": "#1f6fb4", "val": "#b8860b", "test": "#c0261c"}


def run_pictures(
    history: list[dict], data, outputs: Callable[[], Tensor] | None
) -> dict[str, Callable[[], bytes]]:
    """{file name: what draws it}; outputs() returns (n, C) of the test rows on the CPU, and is None
    where there are none."""
    pictures = {"curves.png": lambda: curves(history)}
    if outputs is None:
        return pictures
    if not data.is_classes:
        return pictures | {
            "predictions.png": lambda: scatter(data, outputs()),
            "residuals.png": lambda: residuals(data, outputs()),
        }
    sheet = images if data.image_shape is not None else confidence
    return pictures | {
        "predictions.png": lambda: sheet(data, outputs()),
        "confusion.png": lambda: confusion(data, outputs()),
    }


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """(figure, array of axes) without pyplot, whose state and window system belong to the
    caller."""
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def import_matplotlib():
    """matplotlib, whatever MPLBACKEND says: importing it fails where that names a backend which is
    not installed, as in a shell that a notebook started."""
    named = None
    if "matplotlib" not in sys.modules:
        named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise TrainError(f"{error}: pip install 'fusedmlp[train]'") from error
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    if named:
        with contextlib.suppress(ValueError):  # for pyplot, which the caller may use later
            matplotlib.rcParams["backend"] = named
    return matplotlib


def readable(name: str) -> str:
    """A user's name as a label: it is cut short, characters that the font lacks become escapes, and
    a dollar sign, with which matplotlib would begin a formula, is escaped."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    name = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 3] + "..."
    characters = (
        c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in name
    )
    return "".join(characters).replace("$", r"\$")


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def curves(history: list[dict]) -> bytes:
    has_accuracy = any(row["train_accuracy"] is not None for row in history)
    figure, axes = new_figure(10 if has_accuracy else 5.5, 4, 1, 2 if has_accuracy else 1)
    epochs = [row["epoch"] for row in history]
    for axis, what in zip(axes[0], ("loss", "accuracy"), strict=False):
        for part, colour in PART_COLOURS.items():
            values = [row[f"{part}_{what}"] for row in history]
            if not any(value is not None for value in values):
                continue
            label = {"train": "training", "val": "validation", "test": "test"}[part]
            axis.plot(
                epochs, values, "o-", color=colour, label=f"{label} {values[-1]:.4g}", markersize=3
            )
        axis.set(xlabel="epoch", title=what)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    return png(figure)


def _classified(data: Data, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(true, predicted, probability of the predicted class), each (n,)."""
    probability, predicted = outputs.float().softmax(1).max(1)
    return data.y_test.cpu(), predicted, probability


def images(data: Data, outputs: Tensor) -> bytes:
    """The first test images, and below them the first mistakes; green titles are right, red ones
    wrong."""
    true, predicted, _ = _classified(data, outputs)
    wrong = torch.nonzero(true != predicted).flatten().tolist()
    first = list(range(min(FIRST_IMAGES, len(true))))
    shown = first + [index for index in wrong if index >= len(first)][:MISTAKE_IMAGES]
    rows = -(-len(shown) // IMAGES_A_ROW)
    figure, axes = new_figure(1.5 * IMAGES_A_ROW, 1.85 * rows + 0.6)
    # All on one pair of axes, a cell of 1.2 x 1.5 each: 40 pairs take a second to lay out.
    axis = axes[0, 0]
    axis.axis("off")
    for place, index in enumerate(shown):
        x, y = 1.2 * (place % IMAGES_A_ROW), 1.5 * (place // IMAGES_A_ROW)
        axis.imshow(
            data.x_test[index].cpu().view(data.image_shape).numpy(),
            cmap="gray_r",
            interpolation="nearest",
            extent=(x, x + 1, y + 1, y),
        )
        names = readable(data.classes[predicted[index]]), readable(data.classes[true[index]])
        is_right = predicted[index] == true[index]
        title = names[0] if is_right else f"{names[0]}\n(true: {names[1]})"
        colour = RIGHT_COLOUR if is_right else WRONG_COLOUR
        axis.text(x + 0.5, y - 0.05, title, fontsize=9, color=colour, ha="center", va="bottom")
        if not is_right:
            frame = ([x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y])
            axis.plot(*frame, color=WRONG_COLOUR, linewidth=2)
    # imshow sets both.
    axis.set(xlim=(-0.1, 1.2 * IMAGES_A_ROW), ylim=(1.5 * rows - 0.4, -0.5), aspect="auto")
    share = (true == predicted).float().mean().item()
    mistakes = len(shown) - len(first)
    figure.suptitle(
        f"{readable(data.name)}: the first {len(first)} test images"
        + (f", then the first {mistakes} mistakes after them" if mistakes else "")
        + f"\npredicted names; {share:.2%} of {len(true)} are right, wrong ones are red"
    )
    return png(figure)


def confidence(data: Data, outputs: Tensor) -> bytes:
    """For rows that are no images: how sure the network was of its right and of its wrong
    predictions."""
    true, predicted, probability = _classified(data, outputs)
    right = true == predicted
    figure, axes = new_figure(6.5, 4)
    axis = axes[0, 0]
    parts = [probability[right].numpy(), probability[~right].numpy()]
    labels = [f"right: {int(right.sum())}", f"wrong: {int((~right).sum())}"]
    axis.hist(
        parts, bins=20, range=(0, 1), stacked=True, color=[RIGHT_COLOUR, WRONG_COLOUR], label=labels
    )
    axis.set(
        xlabel="probability of the predicted class",
        ylabel="test rows",
        title=f"{readable(data.name)}: predictions",
    )
    axis.legend()
    return png(figure)


def confusion(data: Data, outputs: Tensor) -> bytes:
    """Counts of (true, predicted), shaded by the share of the true class; with many classes the
    counts are left out."""
    true, predicted, _ = _classified(data, outputs)
    count = len(data.classes)
    table = torch.bincount(true * count + predicted, minlength=count * count).view(count, count)
    share = table / table.sum(1, keepdim=True).clamp(min=1)
    side = min(14.0, 2.5 + 0.55 * count)
    figure, axes = new_figure(side + 1, side)
    axis = axes[0, 0]
    picture = axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set(
        xlabel="predicted",
        ylabel="true",
        title=f"{readable(data.name)}: {int(table.diagonal().sum())} of {len(true)} right",
    )
    if count <= 40:
        names = [readable(name) for name in data.classes]
        axis.set_xticks(range(count), names, rotation=45, ha="right")
        axis.set_yticks(range(count), names)
    if count <= 20:
        for row, column in torch.nonzero(table).tolist():
            colour = "white" if share[row, column] > 0.5 else "black"
            axis.text(
                column,
                row,
                int(table[row, column]),
                ha="center",
                va="center",
                color=colour,
                fontsize=8,
            )
    figure.colorbar(picture, ax=axis, label="share of the true class", shrink=0.8)
    return png(figure)


def _in_units(data: Data, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """(true, predicted), each (n, k), in the target's own units."""
    scaling = data.target_scaling or Scaling()
    both = (data.y_test.cpu(), outputs)
    true, predicted = (scaling.undo(t.reshape(len(outputs), -1)) for t in both)
    return true, predicted


def scatter(data: Data, outputs: Tensor) -> bytes:
    """Regression: predicted over true values, with the line of a perfect prediction."""
    true, predicted = _in_units(data, outputs)
    figure, axes = new_figure(5.5, 5.2)
    axis = axes[0, 0]
    for column in range(true.shape[1]):
        label = f"output {column}" if true.shape[1] > 1 else None
        values = true[:, column].numpy(), predicted[:, column].numpy()
        axis.plot(*values, ".", markersize=4, alpha=0.5, label=label)
    ends = [float(true.min()), float(true.max())]
    axis.plot(ends, ends, color="black", linewidth=1)
    error = (true - predicted).square().mean().sqrt()
    name = readable(data.target or "target")
    axis.set(
        xlabel=f"true {name}",
        ylabel=f"predicted {name}",
        title=f"{readable(data.name)}: RMS error {error:.4g}",
    )
    if 1 < true.shape[1] <= 10:
        axis.legend()
    axis.grid(alpha=0.3)
    return png(figure)


def residuals(data: Data, outputs: Tensor) -> bytes:
    """Regression: a histogram of the errors."""
    true, predicted = _in_units(data, outputs)
    figure, axes = new_figure(5.5, 4)
    axis = axes[0, 0]
    axis.hist((predicted - true).flatten().numpy(), bins=40, color=PART_COLOURS["train"])
    axis.axvline(0, color="black", linewidth=1)
    axis.set(xlabel="predicted - true", ylabel="test rows", title=f"{readable(data.name)}: errors")
    axis.grid(alpha=0.3)
    return png(figure)
