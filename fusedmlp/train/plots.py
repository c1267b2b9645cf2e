"""Pictures of a run as PNG bytes, and what else is told of its predictions: which files there are,
learning curves, images with their predicted names.

Everything is drawn off screen and nothing is written.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .class_plots import classified, confusion, reliability, roc
from .data.types import Data
from .drawing import PART_COLOURS, RIGHT_COLOUR, WRONG_COLOUR, new_figure, png, readable
from .importance import MOST_COLUMNS, bars, importance, importance_csv, inputs_of_columns
from .number_plots import residuals, scatter

# Images on the prediction sheet: the first of the test set, then the first mistakes.
FIRST_IMAGES, MISTAKE_IMAGES = 24, 16
IMAGES_A_ROW = 8


def run_pictures(
    history: list[dict], data: Data | None, predict: Callable[[Tensor], Tensor]
) -> dict[str, Callable[[], bytes | str]]:
    """{file name: what makes it}, in an order in which one that fails leaves the others.

    data     None where no rows are held out from training, else with these as its test rows
    predict  (n, C) outputs on the CPU of rows as data has them
    """
    pictures: dict[str, Callable[[], bytes | str]] = {"curves.png": lambda: curves(history)}
    if data is None:
        return pictures
    outputs = functools.cache(lambda: predict(data.x_test))
    if data.is_classes:
        sheet = images if data.image_shape is not None else confidence
        kinds = {"predictions.png": sheet, "confusion.png": confusion}
        if data.is_table:  # images do without scikit-learn, whose import takes longer than they do
            kinds |= {"roc.png": roc, "reliability.png": reliability}
    else:
        kinds = {"predictions.png": scatter, "residuals.png": residuals}
    pictures |= {name: (lambda draw=draw: draw(data, outputs())) for name, draw in kinds.items()}
    if data.is_table and len(data.x_test) > 1 and len(inputs_of_columns(data)) <= MOST_COLUMNS:
        found = functools.cache(lambda: importance(data, predict))
        pictures |= {
            "importance.csv": lambda: importance_csv(found()),
            "importance.png": lambda: bars(data, found()),
        }
    return pictures


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


def images(data: Data, outputs: Tensor) -> bytes:
    """The first test images, and below them the first mistakes; green titles are right, red ones
    wrong."""
    true, predicted, _ = classified(data, outputs)
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
    true, predicted, probability = classified(data, outputs)
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
        ylabel="rows",
        title=f"{readable(data.name)}: predictions",
    )
    axis.legend()
    return png(figure)
