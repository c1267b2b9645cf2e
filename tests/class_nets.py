"""Models written as classes, which tests of compile_backend share."""

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import fusedmlp


class Net(nn.Module):
    """The course's: 784-256-256-10 with dropout 0.2 and 0.5 while training."""

    def __init__(self, dropout=F.dropout):
        super().__init__()
        self.lin1 = nn.Linear(784, 256)
        self.lin2 = nn.Linear(256, 256)
        self.lin3 = nn.Linear(256, 10)
        self.relu = nn.ReLU()
        self.dropout = dropout

    def forward(self, x):
        h = self.relu(self.lin1(x.reshape((-1, 784))))
        if self.training:
            h = self.dropout(h, 0.2)
        h = self.relu(self.lin2(h))
        if self.training:
            h = self.dropout(h, 0.5)
        return self.lin3(h)


class Functional(nn.Module):
    """F.relu(self.fc1(x)), F.dropout(x, p, self.training): the other way to write it."""

    def __init__(self, p=0.5, act=F.relu):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 3)
        self.p, self.act = p, act

    def forward(self, x):
        return self.fc2(F.dropout(self.act(self.fc1(x)), self.p, self.training))


def dropout_of_ones_own(h, p):
    return (torch.rand_like(h) >= p) * h / (1 - p)


def as_sequential(net):
    return nn.Sequential(
        net.lin1, nn.ReLU(), nn.Dropout(0.2), net.lin2, nn.ReLU(), nn.Dropout(0.5), net.lin3
    )


def compiled(model, **options):
    """The model by compile_backend, with nothing left of what was compiled before."""
    torch._dynamo.reset()
    return torch.compile(model, backend=fusedmlp.compile_backend, options=options or None)


def outputs_and_gradients(model, x, leaves):
    torch.manual_seed(3)
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]
