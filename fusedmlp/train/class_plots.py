"""Pictures of predicted classes: which are taken for which, how well their probabilities tell them
apart, and whether these are as high as they should be."""

import torch
from torch import Tensor

from .data.types import Data, seeded
from .drawing import PART_COLOURS, new_figure, png, readable

NAMED_CURVES = 8
MOST_SHARES = 5_000_000  # rows times classes of a ROC; of more rows some are taken
BINS = 10  # of probabilities


def classified(data: Data, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(true, predicted, probability of the predicted class), each (n,)."""
    probability, predicted = outputs.float().softmax(1).max(1)
    return data.y_test.cpu(), predicted, probability


def confusion(data: Data, outputs: Tensor) -> bytes:
    """Counts of (true, predicted), shaded by the share of the true class; with many classes the
    counts are left out."""
    true, predicted, _ = classified(data, outputs)
    count = len(data.classes)
    table = torch.bincount(true * count + predicted, minlength=count * count).view(count, count)
    share = table / table.sum(1, keepdim=True).clamp(min=1)
    side = min(14.0, max(4.6, 2.5 + 0.55 * count))
    figure, axes = new_figure(side + 1, side)
    axis = axes[0, 0]
    picture = axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set(
        xlabel="predicted",
        ylabel="true",
        title=f"{readable(data.name)}: {int(table.diagonal().sum())} of {len(true)} right",
    )
    if count <= 60:
        names, size = [readable(name) for name in data.classes], 10 if count <= 25 else 8
        axis.set_xticks(range(count), names, rotation=45 if count <= 25 else 90, fontsize=size)
        axis.set_yticks(range(count), names, fontsize=size)
        if count <= 25:
            for label in axis.get_xticklabels():
                label.set_ha("right")
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


def roc(data: Data, outputs: Tensor) -> bytes:
    """A curve for each class against the rest; of many classes those told apart worst are named."""
    from sklearn.metrics import roc_auc_score, roc_curve

    true = data.y_test.cpu()
    if true.numel() * len(data.classes) > MOST_SHARES:
        order = torch.randperm(len(true), generator=seeded("roc", 0))
        some = order[: max(1000, MOST_SHARES // len(data.classes))]
        true, outputs = true[some], outputs[some]
    true, shares = true.numpy(), outputs.double().softmax(1).numpy()
    chosen = [1] if len(data.classes) == 2 else range(len(data.classes))
    # A class that no row or every row has cannot be told from the rest.
    chosen = [c for c in chosen if 0 < (true == c).sum() < len(true)]
    areas = {c: float(roc_auc_score(true == c, shares[:, c])) for c in chosen}
    worst_first = sorted(areas, key=areas.get)
    named = worst_first if len(areas) <= NAMED_CURVES else worst_first[: NAMED_CURVES - 1]
    figure, axes = new_figure(5.4 if len(named) <= 2 else 9.2, 5)
    axis = axes[0, 0]
    grey = [areas[c] for c in areas if c not in named]
    for c in reversed(worst_first):
        is_named = c in named
        rows = int((true == c).sum())
        label = (
            f"{areas[c]:.3f}  {readable(data.classes[c], 24)}, {rows} rows" if is_named else None
        )
        if not is_named and c == worst_first[-1]:
            label = f"{min(grey):.3f} to {max(grey):.3f}  {len(grey)} more classes"
        colour = f"C{named.index(c)}" if is_named else "#bbbbbb"
        width = 1.6 if is_named else 0.7
        fall_out, found, _ = roc_curve(true == c, shares[:, c])
        axis.plot(fall_out, found, color=colour, linewidth=width, label=label)
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    axis.set(
        xlabel="false positive rate",
        ylabel="true positive rate",
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
        aspect="equal",
    )
    axis.grid(alpha=0.3)
    place = {"loc": "lower right"}
    if len(named) > 2:  # there is no room inside
        place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1), "frameon": False}
    if areas:
        axis.legend(title="area, class against the rest", alignment="left", **place)
    else:
        axis.text(0.5, 0.4, "all rows are of one class", ha="center")
    mean = sum(areas.values()) / max(1, len(areas))
    axis.set_title(
        f"{readable(data.name)}: ROC of {len(true)} rows"
        + (f", mean area {mean:.3f}" if len(areas) > 1 else "")
    )
    return png(figure)


def reliability(data: Data, outputs: Tensor) -> bytes:
    """The share of rows that are right over the probability that the network gave them: of the
    second class where there are two, else of the predicted one."""
    true, predicted, probability = classified(data, outputs)
    hit, what, share_of = predicted == true, "the predicted class", "predicted right"
    if len(data.classes) == 2:
        probability, hit = outputs.double().softmax(1)[:, 1], true == 1
        what = readable(data.classes[1])
        share_of = f"that are {what}"
    bins = (probability.double() * BINS).long().clamp(max=BINS - 1)
    rows = torch.bincount(bins, minlength=BINS)

    def mean(values: Tensor) -> Tensor:
        sums = torch.bincount(bins, values.double(), minlength=BINS)
        return sums / rows.clamp(min=1)

    given, share = mean(probability), mean(hit)
    error = float(((given - share).abs() * rows).sum() / rows.sum())
    deviation = (share * (1 - share) / rows.clamp(min=1)).sqrt()
    some = rows > 0
    figure, axes = new_figure(5.6, 6.2, 2, 1, height_ratios=(3, 1), sharex=True)
    axis, below = axes[:, 0]
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":", label="as it should be")
    axis.errorbar(
        given[some].numpy(),
        share[some].numpy(),
        yerr=deviation[some].numpy(),
        fmt="o-",
        color=PART_COLOURS["train"],
        markersize=5,
        elinewidth=1,
        label="the network, with standard errors",
    )
    axis.set(ylabel=f"share of rows {share_of}", xlim=(0, 1), ylim=(-0.02, 1.02))
    axis.set_title(f"{readable(data.name)}: reliability\nexpected calibration error {error:.3f}")
    axis.legend(loc="upper left")
    edges = [place / BINS for place in range(BINS)]
    below.bar(
        edges, rows.tolist(), width=1 / BINS, align="edge", color=PART_COLOURS["train"], alpha=0.6
    )
    below.set(xlabel=f"probability given to {what}", ylabel="rows")
    for one in (axis, below):
        one.grid(alpha=0.3)
        one.set_axisbelow(True)
    return png(figure)
