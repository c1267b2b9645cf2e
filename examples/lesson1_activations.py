"""Lesson 1: activation functions, their gradients, and why a network needs them.

All values and gradients come from the package's own op, through autograd.
"""

import torch
from course import BLUE, GREY, RED, arguments, figure, save
from torch import nn

import fusedmlp.functional as FF

NAMES = ("relu", "prelu", "sigmoid", "tanh")


def value_and_gradient(name, x):
    """activation(x) and its derivative at each x."""
    x = x.clone().requires_grad_()
    slope = torch.tensor([0.25]) if name == "prelu" else None  # learnable; 0.25 is its first value
    y = FF.bias_act_dropout(x, activation=name, slope=slope)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), gradient


@torch.no_grad()
def three_layers(x, layers, activation):
    """1 input, 16 hidden units, 16 hidden units, 1 output."""
    first, second, third = layers
    h = FF.linear_act(x, first.weight, first.bias, activation)
    h = FF.linear_act(h, second.weight, second.bias, activation)
    return FF.linear_act(h, third.weight, third.bias)


@torch.no_grad()
def collapsed(layers):
    """The one matrix and the one bias that linear layers without activation amount to."""
    weight, bias = torch.eye(1), torch.zeros(1)
    for layer in layers:
        # w2 (w1 x + b1) + b2 = (w2 w1) x + (w2 b1 + b2)
        weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
    return weight, bias


def best_line(x, y):
    """Values on the line a x + c that is nearest to y."""
    columns = torch.cat([x, torch.ones_like(x)], 1)
    return columns @ torch.linalg.lstsq(columns, y).solution


def main(argv=None):
    args = arguments(argv, __doc__)
    figures = {}
    x = torch.arange(-800, 801) / 100  # holds 0 exactly, where the gradients have their peaks
    picture = figure(14, 5)
    axes = picture.subplots(2, 5)
    for name, (upper, lower) in zip(NAMES, axes.T, strict=False):
        y, gradient = value_and_gradient(name, x)
        peak = int(gradient.argmax())
        figures[name] = {"peak": float(gradient[peak]), "at": float(x[peak])}
        figures[name]["at 0"] = float(gradient[x == 0])
        upper.plot(x, y, BLUE)
        upper.set_title(name)
        lower.plot(x, gradient, RED)
        lower.set_title(f"gradient of {name}")
        lower.set_ylim(-0.05, 1.1)
    for name in ("sigmoid", "tanh"):
        print(f"{name}': largest {figures[name]['peak']:.4f}, at x = {figures[name]['at']:.2f}")
    print(f"relu' at 0: {figures['relu']['at 0']:.0f}, by convention")

    torch.manual_seed(args.seed)
    layers = nn.Linear(1, 16), nn.Linear(16, 16), nn.Linear(16, 1)
    x = torch.linspace(-4, 4, 401).reshape(-1, 1)
    weight, bias = collapsed(layers)
    line, one = three_layers(x, layers, "none"), x @ weight.T + bias
    bent = three_layers(x, layers, "relu")
    missed = float((bent - best_line(x, bent)).var() / bent.var())
    figures["collapse"] = float((line - one).abs().max())
    figures["missed"] = missed
    print(f"three linear layers are one: y = {weight.item():.4f} x + {bias.item():.4f}")
    print(f"    largest difference on 401 points: {figures['collapse']:.1e}")
    print(f"with relu between them the nearest line misses {missed:.0%} of their variance")

    for axis, y, title in (
        (axes[0, 4], line, "3 linear layers"),
        (axes[1, 4], bent, "3 linear layers with relu"),
    ):
        axis.plot(x, best_line(x, y), GREY, linewidth=4, alpha=0.4, label="one linear layer")
        axis.plot(x, y, BLUE)
        axis.set_title(title)
        axis.legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    save(picture, args, "lesson1_activations")
    return figures


if __name__ == "__main__":
    main()
