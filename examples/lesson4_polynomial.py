"""Lesson 4: a polynomial of degree 3 fitted with 4, 2 and 20 features: normal, under-, overfitting.

Five data sets are fitted at the same time, as a batch of matrices, since one is a matter of luck:
in one of twenty a lone extreme x leaves the cubic term to few rows, and 400 epochs are too few for
it. --seed 0 has such a set.
"""

import torch
from course import BLUE, RED, arguments, figure, save

import fusedmlp
from fusedmlp.train import TrainConfig, fit

TRUE = (5.0, 1.2, -3.4, 5.6)
SETS, ROWS, DEGREE = 5, 100, 20
CASES = {"normal": (4, 400), "underfitting": (2, 400), "overfitting": (20, 1500)}


def make_data(seed):
    """Features (sets, 200, 20) and targets (sets, 200, 1); the first 100 rows are for training."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SETS, 2 * ROWS, 1, generator=generator)
    powers = torch.arange(DEGREE)
    # x^i / i! stays small where x^19 alone would be a million.
    features = x**powers / torch.exp(torch.lgamma(powers + 1.0))
    noise = 0.1 * torch.randn(x.shape, generator=generator)
    return features, features[..., : len(TRUE)] @ torch.tensor(TRUE).reshape(-1, 1) + noise


def train(features, y, epochs, seed):
    """Weights (sets, features, 1) and the losses (epochs, 2, sets) in training and test."""
    generator = torch.Generator().manual_seed(seed)
    w = (0.1 * torch.randn(SETS, features.shape[2], 1, generator=generator)).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=0.01)
    losses = []
    for _ in range(epochs):
        for rows in torch.randperm(ROWS, generator=generator).split(10):
            error = features[:, rows] @ w - y[:, rows]
            error.square().mean((1, 2)).sum().backward()  # the sets share no weight: sum is fair
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            error = (features @ w - y).square().squeeze(2)
            losses.append(torch.stack([error[:, :ROWS].mean(1), error[:, ROWS:].mean(1)]))
    return w.detach(), torch.stack(losses)


def concise(features, y, epochs, seed):
    """The first data set again, as a network without hidden layers."""
    torch.manual_seed(seed)
    net = fusedmlp.FusedMLP(features.shape[1], [], 1, bias=False)
    parts = features[:ROWS], y[:ROWS], features[ROWS:], y[ROWS:]
    config = TrainConfig(epochs=epochs, batch_size=10, lr=0.01, seed=seed)
    history = fit(net, parts, config).history
    return net[0].weight.detach().flatten(), history[-1]["test_loss"]


def main(argv=None):
    args = arguments(argv, __doc__, epochs=400, seed=4)
    features, y = make_data(args.seed)
    print("features  training loss  test loss   (means of five data sets)")
    figures = {}
    picture = figure(13, 4)
    for axis, (name, (n, epochs)) in zip(picture.subplots(1, 3), CASES.items(), strict=True):
        w, losses = train(features[..., :n], y, epochs * args.epochs // 400, args.seed)
        figures[name] = {"weights": w.squeeze(2), "train": losses[-1, 0], "test": losses[-1, 1]}
        print(f"{n:8}  {losses[-1, 0].mean():13.4f}  {losses[-1, 1].mean():9.4f}   {name}")
        for part, colour, label in ((0, BLUE, "training"), (1, RED, "test")):
            axis.plot(losses[:, part], color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(losses[:, part].mean(1), color=colour, linewidth=2, label=label)
        axis.set(yscale="log", ylim=(5e-3, 2e2), xlabel="epoch", title=f"{name}: {n} features")
        axis.grid(alpha=0.3)
        axis.legend()

    print("true weights   " + "".join(f"{t:8.3f}" for t in TRUE))
    for name, found in figures.items():
        weights = found["weights"][0, : len(TRUE)]
        print(f"{name:15}" + "".join(f"{float(t):8.3f}" for t in weights))
    weights, loss = concise(features[0, :, :4], y[0], args.epochs, args.seed)
    figures["concise"] = {"weights": weights, "test": loss}
    print("normal, concise" + "".join(f"{float(t):8.3f}" for t in weights))
    save(picture, args, "lesson4_polynomial")
    return figures


if __name__ == "__main__":
    main()
