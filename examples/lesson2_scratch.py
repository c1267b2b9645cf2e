"""Lesson 2: a multilayer perceptron from scratch, then the same with the package's ops.

Parameters, relu, forward pass and update are our own; PyTorch only follows the gradients.
"""

import time

import torch
import torch.nn.functional as F
from course import BLUE, RED, arguments, figure, images, inputs, order, save

import fusedmlp.functional as FF

HIDDEN, RATE = 256, 0.1


def first_parameters(pixels, classes, seed):
    torch.manual_seed(seed)
    # Drawn as (outputs, inputs) and transposed: lesson 3 starts from the same numbers.
    w1 = 0.01 * torch.randn(HIDDEN, pixels).T
    w2 = 0.01 * torch.randn(classes, HIDDEN).T
    parameters = [w1, torch.zeros(HIDDEN), w2, torch.zeros(classes)]
    return [p.requires_grad_() for p in parameters]


def relu(x):
    return torch.max(x, torch.zeros_like(x))


def from_scratch(x, w1, b1, w2, b2):
    h = relu(x @ w1 + b1)
    return h @ w2 + b2


def with_ops(x, w1, b1, w2, b2):
    # The ops hold a weight as nn.Linear does, (outputs, inputs): hence the transposes.
    h = FF.linear_act(x, w1.T, b1, "relu")
    return FF.linear_act(h, w2.T, b2)


def train_epoch(net, parameters, x, y, batches):
    """One pass over the rows, a batch of row numbers at a time; the mean loss."""
    total = 0.0
    for rows in batches:
        loss = F.cross_entropy(net(x[rows], *parameters), y[rows])
        loss.backward()
        with torch.no_grad():
            for p in parameters:
                p -= RATE * p.grad
                p.grad = None
        total += loss.detach() * len(rows)
    return float(total) / len(x)


@torch.no_grad()
def accuracy(net, parameters, x, y):
    return float((net(x, *parameters).argmax(1) == y).float().mean())


def train(net, data, args):
    """[(loss, test accuracy)] after each epoch, the same order of rows for every net."""
    x, x_test = inputs(data, data.x_train), inputs(data, data.x_test)
    parameters = first_parameters(data.in_features, data.out_features, args.seed)
    history = []
    for epoch in range(args.epochs):
        batches = order(args, epoch, len(x)).split(args.batch)
        loss = train_epoch(net, parameters, x, data.y_train, batches)
        history.append((loss, accuracy(net, parameters, x_test, data.y_test)))
    return history


def first_step(net, data, args):
    """Outputs and gradients of the first batch."""
    parameters = first_parameters(data.in_features, data.out_features, args.seed)
    outputs = net(inputs(data, data.x_train[: args.batch]), *parameters)
    loss = F.cross_entropy(outputs, data.y_train[: args.batch])
    return [outputs.detach(), *torch.autograd.grad(loss, parameters)]


def main(argv=None):
    args = arguments(argv, __doc__, dataset="auto")
    data = images(args)
    pairs = zip(first_step(from_scratch, data, args), first_step(with_ops, data, args), strict=True)
    difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    print(f"first batch, outputs and all gradients: relative difference {difference:.1e}")

    histories = {}
    for name, net in (("from scratch", from_scratch), ("with the ops", with_ops)):
        started = time.perf_counter()
        histories[name] = train(net, data, args)
        loss, right = histories[name][-1]
        seconds = time.perf_counter() - started
        print(f"{name}: loss {loss:.4f}, test accuracy {right:.2%}, {seconds:.1f} s")

    picture = figure(9, 3.6)
    styles = {"from scratch": (RED, 4, 0.4), "with the ops": (BLUE, 1.5, 1)}
    for which, axis in enumerate(picture.subplots(1, 2)):
        for name, history in histories.items():
            colour, width, alpha = styles[name]
            values = [point[which] for point in history]
            epochs = range(1, len(values) + 1)
            axis.plot(epochs, values, color=colour, linewidth=width, alpha=alpha, label=name)
        axis.set(xlabel="epoch", title=("training loss", "test accuracy")[which])
        axis.grid(alpha=0.3)
        axis.legend()
    save(picture, args, "lesson2_scratch")
    return {"difference": difference, "histories": histories}


if __name__ == "__main__":
    main()
