"""Bytes that a layer keeps between its forward and its backward, eager PyTorch against fused.

    python -m bench.saved_bytes --out bench/results/saved_bytes.json

Counted with torch's saved-tensor hooks, each storage once, in fake tensors: no memory is used, and
the CUDA column needs no GPU (there PyTorch's dropout keeps one byte an element, on a CPU a whole
noise tensor). docs/kernels.md gets its table from the JSON through bench.report.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedmlp import functional
from fusedmlp.spec import activations, philox
from fusedmlp.spec.layers import Epilogue

from . import record
from .cases import DTYPES

M, K, N = 256, 784, 512  # the figures per element do not depend on them
REF = "reference"  # stands for all backends: they save the same, and it runs on any device


@dataclass(frozen=True)
class SavedBytes:
    """total: all storages saved; beyond_inputs: without those of the inputs that were named."""

    total: int
    beyond_inputs: int


def count(function: Callable[..., Tensor], *inputs: Tensor) -> SavedBytes:
    """What function(*inputs) saves for its backward, each storage counted once.

    inputs   tensors that live on anyway: data and parameters
    """
    saved: dict[int, Tensor] = {}  # the tensors stay alive, so that no storage is used twice

    def pack(t: Tensor) -> Tensor:
        saved.setdefault(t.untyped_storage()._cdata, t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*inputs)
    sizes = {key: t.untyped_storage().nbytes() for key, t in saved.items()}
    given = {t.untyped_storage()._cdata for t in inputs}
    beyond = sum(size for key, size in sizes.items() if key not in given)
    return SavedBytes(sum(sizes.values()), beyond)


def saved_bytes(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Bytes that function(*inputs) keeps for its backward beyond `inputs` themselves."""
    return count(function, *inputs).beyond_inputs


def _layer(act: str, p: float, fused: bool) -> Callable[..., Tensor]:
    """Linear + act + dropout of (x, w, b, slope)."""
    number = activations.IDS[act]

    def fused_layer(x, w, b, slope):
        # The entry behind the argument checks, which read numbers off tensors; fakes have none.
        state = functional.draw_state(x)[0] if p else None
        drop = *philox.threshold_and_scale(p), 0, 0
        return functional.run_linear_act(x, w, Epilogue(b, slope, state, number, 0.01, *drop), REF)

    def eager_layer(x, w, b, slope):
        z = F.linear(x, w, b)
        # The table's own leaky_relu and prelu are compositions, which keep more.
        own = {"prelu": F.prelu, "leaky_relu": F.leaky_relu}
        y = own.get(act, activations.TABLE[number].forward)(z, 0.01 if slope is None else slope)
        return F.dropout(y, p) if p else y

    return fused_layer if fused else eager_layer


def of_layer(act: str, p: float, dtype: torch.dtype, device: str, fused: bool) -> int:
    """Bytes that Linear + act + dropout keeps, its output included, x and parameters not."""
    layer = _layer(act, p, fused)

    def with_next(x, w, b, slope, w_next):
        return F.linear(layer(x, w, b, slope), w_next)

    with FakeTensorMode(), torch.device(device):
        x, w, b = (torch.empty(s, dtype=dtype, requires_grad=True) for s in ((M, K), (N, K), (N,)))
        w_next = torch.empty(10, N, dtype=dtype, requires_grad=True)
        slope = torch.empty(N, dtype=dtype, requires_grad=True) if act == "prelu" else None
        given = [t for t in (x, w, b, slope, w_next) if t is not None]
        return saved_bytes(lambda *_: with_next(x, w, b, slope, w_next), *given)


def row(act: str, p: float, dtype: str) -> dict:
    found = {"act": act, "p": p, "dtype": dtype, "elements": M * N}
    for device, way in itertools.product(("cpu", "cuda"), ("eager", "fused")):
        found[f"{way}_{device}"] = of_layer(act, p, DTYPES[dtype], device, way == "fused")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.saved_bytes", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/saved_bytes.json"))
    args = parser.parse_args(argv)
    results = record.Results(record.header("saved_bytes", "bench.saved_bytes", argv), args.out)
    cases = itertools.product(activations.NAMES, (0.0, 0.5), ("fp32", "bf16", "fp16"))
    results.add(*(row(*case) for case in cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
