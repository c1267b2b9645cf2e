"""A forked child answers, and with the bits of its parent: a team of OpenMP threads does not
survive a fork."""

import subprocess
import sys

import pytest

from ..made_data import ROOT
from ..native import needs_native

pytest.importorskip("sklearn")

# Sizes for which the parent takes several threads; those of the child are not there.
START = """
import multiprocessing, os, sys
import numpy as np, torch
import fusedmlp
from torch import nn
from fusedmlp.functional import linear_act

torch.set_num_threads(2)
torch.manual_seed(0)
x = torch.randn(1200, 300)
labels = torch.arange(1200) % 4
"""
USES = {
    "estimator": """
from fusedmlp.sklearn import FusedMLPClassifier
found = FusedMLPClassifier((128, 64), max_iter=2, random_state=0).fit(x.numpy(), labels.numpy())
def use():
    return torch.from_numpy(found.predict_proba(x.numpy()))
""",
    "fit and its evaluation": """
from fusedmlp.nn import FusedMLP
from fusedmlp.train import TrainConfig, fit
def use():
    torch.manual_seed(0)
    net = FusedMLP(300, [128, 64], 4, dropout=0.2)
    settings = TrainConfig(epochs=2, batch_size=256, device="cpu", engine="native")
    history = fit(net, (x, labels, x, labels), settings).history
    last = torch.tensor([history[-1]["train_loss"], history[-1]["test_loss"]])
    return torch.cat([last, *(p.detach().flatten() for p in net.parameters())])
""",
    "fused network": """
net = nn.Sequential(
    nn.Linear(300, 256), nn.GELU(), nn.Dropout(0.2), nn.Linear(256, 200), nn.ReLU(),
    nn.Linear(200, 7),
)
net = fusedmlp.fuse(net).eval()
def use():
    with torch.no_grad():
        return net(x)
""",
    "backward": """
weight = torch.randn(400, 300).requires_grad_()
def use():
    weight.grad = None
    linear_act(x, weight, activation="tanh").square().mean().backward()
    return weight.grad
""",
    "plain torch beside the package": """
linear_act(x, torch.randn(400, 300), activation="gelu")
def use():
    return x @ x.t()
""",
    # What the child asks for it does not get from the compiled code.
    "ops, where the child asks for threads": """
many = torch.randn(3000, 300)
def use():
    if os.getpid() != parent:
        torch.set_num_threads(4)
    return torch.ops.fusedmlp.bias_act_dropout_fwd.native(
        many, None, None, None, 6, 0.0, 0, 1.0, 0, 0)
from fusedmlp.backends import native as extension
assert extension.unavailable("cpu") is None
""",
}
FORK = """
parent = os.getpid()
wanted = use()
"""
WAYS = {
    "os.fork": """
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(use().numpy(), wanted.numpy()) else 3)  # not by torch's threads
assert os.waitpid(child, 0)[1] == 0
""",
    "multiprocessing": """
with multiprocessing.get_context("fork").Pool(2) as pool:
    for got in pool.map(answer, range(3)):
        assert np.array_equal(got, wanted.numpy())
""",
}
HELPER = """
def answer(_):
    return use().numpy()
"""


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", USES)
def test_a_forked_child_answers_as_its_parent(what, way):
    code = START + USES[what] + HELPER + FORK + WAYS[way] + "assert torch.equal(use(), wanted)\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
