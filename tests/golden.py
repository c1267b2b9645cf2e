"""A record of what the package computes, as hashes: a change that only moves code leaves it equal.

    python -m tests.golden record.json              # writes it
    python -m tests.golden record.json --compare    # names what differs now

Goes through public names alone, so that it outlives a move of everything below them. The hashes
hold for one machine, one torch and one build of the extension, so no record is in the repository.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedmlp
import fusedmlp.sklearn
import fusedmlp.train
from fusedmlp import cli
from fusedmlp import functional as FF
from fusedmlp.spec import activations
from fusedmlp.train import Member, TrainConfig, crossval, fit, fit_many

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MODULES = (fusedmlp, FF, fusedmlp.train, fusedmlp.sklearn)
COMMANDS = ("train", "crossval", "evaluate", "predict", "info", "verify", "tune")


def _hash(*values: Tensor | str | list | dict) -> str:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(str((value.dtype, tuple(value.shape))).encode())
            value = value.detach().reshape(-1).clone().view(torch.uint8).numpy().tobytes()
        else:
            value = json.dumps(value, sort_keys=True, default=str).encode()
        digest.update(value)
    return digest.hexdigest()[:16]


def ops(backend: str) -> Iterator[tuple[str, str]]:
    """Outputs and all gradients of every op, activation, p and dtype on one backend."""
    for (name, dtype), act, p in itertools.product(DTYPES.items(), activations.NAMES, (0.0, 0.3)):
        if backend == "triton" and name == "bf16":
            continue  # Triton's interpreter multiplies bf16 wrongly.
        torch.manual_seed(0)
        x, w, b = torch.randn(37, 29), torch.randn(43, 29) / 5, torch.randn(43)
        slope = torch.full((43,), 0.2) if act == "prelu" else None
        tensors = [None if t is None else t.to(dtype).requires_grad_() for t in (x, w, b, slope)]
        x, w, b, slope = tensors
        options = {"slope": slope, "p": p, "seed": 5, "stream": 3, "row_offset": 7}
        y = FF.linear_act(x, w, b, act, backend=backend, **options)
        y.backward(torch.randn(y.shape).to(dtype))
        grads = [t.grad for t in tensors if t is not None]
        yield f"{backend} linear_act {act} p {p} {name}", _hash(y, *grads)
        z = torch.randn(37, 43).to(dtype).requires_grad_()
        y = FF.bias_act_dropout(z, b.detach(), act, backend=backend, **options)
        y.backward(torch.randn(y.shape).to(dtype))
        yield f"{backend} bias_act_dropout {act} p {p} {name}", _hash(y, z.grad)
    y = FF.dropout(torch.ones(64, 64), 0.5, seed=1, stream=2, row_offset=3, backend=backend)
    yield f"{backend} dropout", _hash(y)


def networks() -> Iterator[tuple[str, str]]:
    """Modules, fused and made by hand: outputs, gradients, keys and reports."""
    for backend, act in itertools.product((None, "native", "reference"), ("relu", "gelu", "prelu")):
        torch.manual_seed(1)
        net = fusedmlp.FusedMLP(30, [40, 20], 5, activation=act, dropout=[0.2, 0.5])
        with fusedmlp.use_backend(backend), fusedmlp.dropout_state(3, 4):
            y = net(torch.randn(33, 30))
            y.square().sum().backward()
        grads = [p.grad for p in net.parameters()]
        yield f"FusedMLP {act} {backend}", _hash(y, list(net.state_dict()), *grads)
    torch.manual_seed(2)
    plain = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    fused = fusedmlp.fuse(plain)
    torch.manual_seed(3)
    yield (
        "fuse",
        _hash(fused(torch.randn(8, 12)), list(fused.state_dict()), str(fusedmlp.report(fused))),
    )


def _data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1250, 20, generator=generator)
    y = (x[:, :4].argmax(1) + (x[:, 4] > 0)) % 4
    return x[:1000], y[:1000], x[1000:], y[1000:]


def _mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return fusedmlp.FusedMLP(20, [32, 16], 4, dropout=[0.2, 0.5])


def training() -> Iterator[tuple[str, str]]:
    """Parameters and metrics after 50 steps: engines, many networks, crossval, estimators."""
    x, y, x_test, y_test = data = _data()
    base = TrainConfig(batch_size=40, epochs=2, seed=6, device="cpu")
    for engine, optimizer in itertools.product(("autograd", "native"), ("sgd", "adam", "adamw")):
        config = base.replace(engine=engine, optimizer=optimizer, lr_schedule="cosine")
        result = fit(_mlp(0), data, config)
        told = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
        yield f"fit {engine} {optimizer}", _hash(told, *result.model.state_dict().values())
    rows = torch.arange(len(x))
    members = [Member(_mlp(i), base.replace(lr=0.1 * (i + 1)), rows[i::2]) for i in range(3)]
    told = fit_many(members, x, y, loss="cross_entropy")
    yield "fit_many", _hash(told, *[p for m in members for p in m.model.parameters()])
    found = crossval(base.replace(hidden=(16,)), {"lr": [0.1, 0.3]}, folds=3, data=(x, y))
    yield "crossval", _hash(str(found.candidates))
    for name, target in (("Classifier", y), ("Regressor", x[:, 0])):
        estimator = getattr(fusedmlp.sklearn, f"FusedMLP{name}")(
            hidden_layer_sizes=(16,), max_iter=5, random_state=0
        )
        estimator.fit(x.numpy(), target.numpy())
        weights = [torch.from_numpy(c) for c in estimator.coefs_]
        yield f"FusedMLP{name}", _hash(list(map(float, estimator.loss_curve_)), *weights)


def surface() -> Iterator[tuple[str, str]]:
    """Public names, and what every command says of itself."""
    for module in MODULES:
        names = [name for name in dir(module) if not name.startswith("_")]
        yield f"names of {module.__name__}", _hash(sorted(names))
    for command in COMMANDS:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
        yield f"fusedmlp {command} --help", _hash(said.getvalue())


def record() -> dict[str, str]:
    """Every hash by its name; Triton's ops run in an interpreter, in a process of their own."""
    torch.set_num_threads(2)
    found = dict(
        itertools.chain(ops("reference"), ops("native"), networks(), training(), surface())
    )
    code = "import json; from tests import golden; print(json.dumps(dict(golden.ops('triton'))))"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError(f"golden: the Triton part failed:\n{run.stderr}")
    return found | json.loads(run.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.golden", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", action="store_true", help="compare instead of writing")
    args = parser.parse_args(argv)
    found = record()
    if not args.compare:
        args.file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"golden: {len(found)} hashes in {args.file}")
        return 0
    before = json.loads(args.file.read_text())
    for name in sorted(before.keys() | found.keys()):
        was, now = (values.get(name, "absent") for values in (before, found))
        if was != now:
            print(f"golden: {name}: {was} before, {now} now")
    same = sum(before.get(name) == value for name, value in found.items())
    print(f"golden: {same} of {len(before.keys() | found.keys())} are equal")
    return int(before != found)


if __name__ == "__main__":
    sys.exit(main())
