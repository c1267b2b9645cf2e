"""Networks whose times are made up, and how a call of one runs."""

import torch

import fusedmlp
from fusedmlp.tuning import measure
from fusedmlp.tuning.work import Work

WORK = Work("cpu", "fp32", 32, 20, (("relu", False, 64), ("none", False, 10)), True)
DROPS = Work("cpu", "fp32", 32, 20, (("relu", True, 64), ("none", False, 10)), True)


def keep(work: Work, wrong=None, **times: float) -> None:
    named = {name.replace("_", " "): us for name, us in times.items()}
    measure.keep(work, {"times": named, "wrong": wrong or {}})


def network(work: Work = WORK) -> fusedmlp.FusedMLP:
    first, last = work.layers
    p = 0.5 * first[1]
    return fusedmlp.FusedMLP(work.in_features, [first[2]], last[2], dropout=p)


def ran(net, rows: int = 32) -> str:
    """What the network runs on."""
    x = torch.randn(rows, net[0].in_features)
    net(x).sum().backward()
    steps = [step for _, step in net._plan.last.steps]
    route = getattr(getattr(steps[0], "way", None), "name", None)
    return route or getattr(steps[0], "backend", None) or "eager"
