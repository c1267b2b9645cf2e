"""Lesson 5: weight decay, as a penalty in the loss and as an option of the optimiser: the same.

200 inputs and only 20 training rows: without a penalty the network learns them by heart.
"""

import torch
import torch.nn.functional as F
from course import BLUE, RED, arguments, figure, save

import fusedmlp

INPUTS, TRAIN, TEST, BATCH, RATE = 200, 20, 100, 5, 0.003


def make_data(seed):
    """y = 0.05 + sum of 0.01 x + noise of deviation 0.01."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TRAIN + TEST, INPUTS, generator=generator)
    noise = 0.01 * torch.randn(len(x), 1, generator=generator)
    return x, 0.05 + 0.01 * x.sum(1, keepdim=True) + noise


def train(x, y, strength, in_the_loss, epochs, seed):
    """The weights, and [(training loss, test loss)] after each epoch, the penalty left out."""
    torch.manual_seed(seed)
    net = fusedmlp.FusedMLP(INPUTS, [], 1)
    w, b = net.parameters()
    torch.nn.init.normal_(w)
    decay = 0 if in_the_loss else strength
    # The bias is not decayed: it does not make a function wilder.
    optimizer = torch.optim.SGD([{"params": [w], "weight_decay": decay}, {"params": [b]}], lr=RATE)
    losses = []
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN).split(BATCH):
            loss = F.mse_loss(net(x[rows]), y[rows])
            if in_the_loss:
                loss = loss + strength * w.square().sum() / 2  # its gradient is strength * w
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            error = (net(x) - y).square()
            losses.append((float(error[:TRAIN].mean()), float(error[TRAIN:].mean())))
    return w.detach(), losses


def main(argv=None):
    args = arguments(argv, __doc__, epochs=100)
    x, y = make_data(args.seed)
    figures = {}
    picture = figure(9, 3.8)
    for axis, strength in zip(picture.subplots(1, 2, sharey=True), (0, 3), strict=True):
        w, losses = train(x, y, strength, True, args.epochs, args.seed)
        w_optimizer, _ = train(x, y, strength, False, args.epochs, args.seed)
        found = {
            "norm": float(w.square().sum()),
            "train": losses[-1][0],
            "test": losses[-1][1],
            "difference": float((w - w_optimizer).abs().max()),
        }
        figures[strength] = found
        print(
            f"lambda {strength}: squared norm of the weights {found['norm']:.3f}, "
            f"training loss {found['train']:.2g}, test loss {found['test']:.3g}"
        )
        print(f"    penalty in the loss against weight_decay: {found['difference']:.1e} apart")
        axis.plot([train for train, _ in losses], color=BLUE, label="training")
        axis.plot([test for _, test in losses], color=RED, label="test")
        axis.set(yscale="log", xlabel="epoch", title=f"lambda = {strength}")
        axis.grid(alpha=0.3)
        axis.legend()
    save(picture, args, "lesson5_weight_decay")
    return figures


if __name__ == "__main__":
    main()
