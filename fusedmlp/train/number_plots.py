"""Pictures of predicted numbers: predicted over true ones, and the errors."""

from torch import Tensor

from .build import in_units, regression
from .data.types import Data
from .drawing import PART_COLOURS, new_figure, png, readable

MOST_POINTS = 5_000  # with more, points hide each other and cells are shaded by their rows
CELLS = 60  # along an axis
SHARE_SHOWN = 0.99  # of the errors in the histogram


def scatter(data: Data, outputs: Tensor) -> bytes:
    """Predicted over true values, with the line of a perfect prediction."""
    true, predicted = in_units(data, data.y_test.cpu(), outputs)
    figure, axes = new_figure(6.2, 5.2)
    axis = axes[0, 0]
    _points(figure, axis, true, predicted)
    ends = [float(true.min()), float(true.max())]
    axis.plot(ends, ends, color="black", linewidth=1)
    found, name = regression(outputs, data), readable(data.target or "target")
    axis.set(
        xlabel=f"true {name}",
        ylabel=f"predicted {name}",
        title=f"{readable(data.name)}: {len(true)} rows\n"
        f"RMSE {found['test_rmse']:.4g}, R2 {found['test_r2']:.4f}",
    )
    axis.locator_params(axis="x", nbins=6)
    axis.grid(alpha=0.3)
    return png(figure)


def residuals(data: Data, outputs: Tensor) -> bytes:
    """The errors over the predicted values, and how often each size of error occurs."""
    true, predicted = in_units(data, data.y_test.cpu(), outputs)
    errors = predicted - true
    size = errors.abs().flatten()
    figure, axes = new_figure(10, 4.4, 1, 2)
    axis, beside = axes[0]
    name = readable(data.target or "target")
    _points(figure, axis, predicted, errors)
    axis.axhline(0, color="black", linewidth=1)
    axis.set(xlabel=f"predicted {name}", ylabel="error: predicted - true")
    # A few large errors would leave one bar of all others.
    end = float(size.sort().values[int(SHARE_SHOWN * (len(size) - 1))]) or 1.0
    beside.hist(
        errors.flatten().numpy(), bins=CELLS, range=(-end, end), color=PART_COLOURS["train"]
    )
    beside.axvline(0, color="black", linewidth=1)
    beside.set(xlabel=f"error: predicted - true, {SHARE_SHOWN:.0%} of the rows", ylabel="rows")
    for one in (axis, beside):
        one.locator_params(axis="x", nbins=6)
        one.grid(alpha=0.3)
    figure.suptitle(
        f"{readable(data.name)}: errors of {len(true)} rows\nmean {float(errors.mean()):.4g}; "
        f"absolute: mean {float(size.mean()):.4g}, median {float(size.median()):.4g}",
        fontsize=12,
    )
    return png(figure)


def _points(figure, axis, across: Tensor, up: Tensor) -> None:
    """A point for each row, in a colour for each output; of many rows of one output cells."""
    if across.shape[1] == 1 and len(across) > MOST_POINTS:
        shades = axis.hexbin(
            across.flatten().numpy(),
            up.flatten().numpy(),
            gridsize=CELLS,
            bins="log",
            mincnt=1,
            cmap="viridis",
            linewidths=0.1,
        )
        figure.colorbar(shades, ax=axis, label="rows", shrink=0.8)
        return
    for output in range(across.shape[1]):
        label = f"output {output}" if across.shape[1] > 1 else None
        values = across[:, output].numpy(), up[:, output].numpy()
        axis.plot(*values, ".", markersize=4, alpha=0.5, label=label)
    if 1 < across.shape[1] <= 10:
        axis.legend()
