"""Lesson 6: dropout from scratch, what it does to expectations, and a network with it.

The network is a class with our own dropout, and then three lines of nn.Sequential.
"""

import torch
from course import BLUE, RED, arguments, figure, images, inputs, save
from torch import nn

import fusedmlp
import fusedmlp.functional as FF
from fusedmlp.train import TrainConfig, fit

P1, P2 = 0.2, 0.5  # less near the input, which has nothing to spare
DRAWS = 4000


def dropout(h, p):
    """0 with probability p, else h / (1 - p): E[h'] = p * 0 + (1 - p) * h / (1 - p) = h."""
    if p == 1:
        return torch.zeros_like(h)  # nothing is kept, and 1 / (1 - p) is no number
    kept = torch.rand_like(h) >= p
    return kept * h / (1 - p)


def noisy(x):
    """The older relative of dropout: x' = x + Gaussian noise, so that E[x'] = x."""
    return x + 0.5 * torch.randn_like(x)


class Net(nn.Module):
    """pixels-256-256-classes with dropout after each hidden layer, only in training."""

    def __init__(self, pixels, classes, dropout=dropout):
        super().__init__()
        self.lin1 = nn.Linear(pixels, 256)
        self.lin2 = nn.Linear(256, 256)
        self.lin3 = nn.Linear(256, classes)
        self.relu = nn.ReLU()
        self.dropout = dropout

    def forward(self, x):
        h = self.relu(self.lin1(x.flatten(1)))
        if self.training:
            h = self.dropout(h, P1)
        h = self.relu(self.lin2(h))
        if self.training:
            h = self.dropout(h, P2)
        return self.lin3(h)


def concise(pixels, classes):
    hidden = [nn.Linear(pixels, 256), nn.ReLU(), nn.Dropout(P1)]
    hidden += [nn.Linear(256, 256), nn.ReLU(), nn.Dropout(P2)]
    return fusedmlp.fuse(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, classes)))


def distance(draw, h):
    """How far the mean of many draws is from h, in standard errors: about 3 for 1000 elements."""
    draws = torch.stack([draw(h) for _ in range(DRAWS)])
    error = draws.std(0) / DRAWS**0.5
    return float(((draws.mean(0) - h).abs() / error).max())


def draw_images(axes, image, shape):
    """An image, one draw and the mean of 200, for dropout and for Gaussian noise."""
    for row, (name, draw) in zip(
        axes, (("dropout 0.5", lambda x: dropout(x, 0.5)), ("Gaussian noise", noisy)), strict=True
    ):
        mean = torch.stack([draw(image) for _ in range(200)]).mean(0)
        shown = ("the image", image), (name, draw(image)), ("mean of 200", mean)
        for axis, (title, pixels) in zip(row, shown, strict=True):
            axis.imshow(pixels.reshape(shape), cmap="gray_r", vmin=0, vmax=1)
            axis.set_title(title, fontsize=10)
            axis.set_axis_off()


def main(argv=None):
    args = arguments(argv, __doc__, dataset="auto")
    data = images(args)
    figures = {}

    torch.manual_seed(args.seed)
    h = torch.arange(1.0, 9)
    print(f"h          {h.tolist()}")
    for p in (0.0, 0.5, 1.0):
        print(f"p = {p}    {dropout(h, p).tolist()}")
    draws = {
        "our dropout": lambda h: dropout(h, 0.5),
        "fusedmlp's dropout": lambda h: FF.dropout(h, 0.5),
        "Gaussian noise": noisy,
    }
    h = torch.randn(1000)
    for name, draw in draws.items():
        figures[name] = distance(draw, h)
        print(f"{name}: mean of {DRAWS} draws within {figures[name]:.1f} standard errors of h")

    sizes = data.in_features, data.out_features
    config = TrainConfig(epochs=args.epochs, lr=0.1, batch_size=args.batch, seed=args.seed)
    histories = {}
    for name, make in (("Net, from scratch", Net), ("concise, fused", concise)):
        torch.manual_seed(args.seed)  # the same first weights for both
        histories[name] = fit(make(*sizes), data, config).history
        # From one epoch to the next accuracy jumps by half a point: take the mean of a few.
        last = [row["test_accuracy"] for row in histories[name][-5:]]
        figures[name] = sum(last) / len(last)
        loss = histories[name][-1]["train_loss"]
        print(f"{name}: loss {loss:.4f}, test accuracy {figures[name]:.2%} in the last epochs")

    picture = figure(12, 4)
    left, right = picture.subfigures(1, 2, width_ratios=(1, 1.1))
    draw_images(left.subplots(2, 3), inputs(data, data.x_test)[0], data.image_shape)
    axis = right.subplots()
    for (name, history), colour in zip(histories.items(), (RED, BLUE), strict=True):
        epochs = [row["epoch"] for row in history]
        for part, style in (("train", "--"), ("test", "-")):
            values = [row[f"{part}_accuracy"] for row in history]
            axis.plot(epochs, values, style, color=colour, label=f"{part}, {name}")
    axis.set(xlabel="epoch", title="accuracy; training rows are counted with dropout")
    axis.grid(alpha=0.3)
    axis.legend()
    save(picture, args, "lesson6_dropout")
    return figures


if __name__ == "__main__":
    main()
