"""Checks every backend that this machine can run against fp64: the error budget, and the command.

Oracle: the reference backend in fp64 on the same inputs and masks. Yardstick: plain PyTorch in the
tested dtype, with the same masks. Outputs and all gradients must be within the error budget of
spec/budget.py. The test suite spends the same budget on more cases. Nothing here is imported by
the core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from ..autograd.mlp import Net
from ..backends import choice, composite, registry
from ..spec import activations, dtypes, layers, philox
from ..spec.budget import excess
from ..trial.check import SEED, STREAM, masks_agree

DTYPES = {dtypes.SHORT[d]: d for d in dtypes.KERNEL}


@dataclass(frozen=True)
class Case:
    """One call: sizes, dtype, activation and dropout."""

    op: str
    m: int
    k: int
    n: int
    act: str
    p: float
    dtype: torch.dtype
    device: str = "cpu"
    bias: bool = True
    slope_elements: int = 0  # 0: N for prelu
    alpha: float | None = None

    def inputs(self) -> dict[str, Tensor]:
        """Random leaves, and `dy`; the same numbers for the same case."""
        g = torch.Generator().manual_seed(1)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            t = torch.randn(*shape, generator=g, dtype=torch.float64) * scale
            return t.to(self.device, self.dtype)

        made = {}
        if self.op != "bias_act_dropout":
            made["x"] = randn(self.m, self.k)
            made["w"] = randn(self.n, self.k, scale=max(self.k, 1) ** -0.5)
        else:
            made["x"] = randn(self.m, self.n)
        if self.bias:
            made["b"] = randn(self.n)
        if self.act == "prelu":
            made["slope"] = randn(self.slope_elements or self.n).abs() * 0.5
        made["dy"] = randn(self.m, self.n)
        if _has_kink(self.act):
            made["dy"][_near_kink(made)] = 0
        return made


def _has_kink(act: str) -> bool:
    """Whether the derivative jumps at 0."""
    tiny = torch.tensor([-1e-30, 1e-30], dtype=torch.float64)
    below, above = activations.TABLE[activations.IDS[act]].from_z(tiny, 0.5).tolist()
    return abs(below - above) > 0.1


def _near_kink(inputs: dict[str, Tensor]) -> Tensor:
    """(M, N) bool: where rounding can put z on either side of 0, and so decide the derivative.

    Either derivative is right there, but the difference is as large as the gradient itself.
    """
    x, w, b = (inputs[n].double() if n in inputs else None for n in ("x", "w", "b"))
    z, size = (x, x.abs()) if w is None else (x @ w.T, x.abs() @ w.abs().T)
    if b is not None:
        z, size = z + b, size + b.abs()
    return z.abs() < 2 * torch.finfo(inputs["x"].dtype).eps * size


def _finish(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def leaves_of(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {
        name: t.detach().to(dtype or t.dtype).requires_grad_()
        for name, t in inputs.items()
        if name != "dy"
    }


def run(case: Case, backend: str | None, inputs: dict[str, Tensor] | None = None):
    """Output and all gradients of a case on a backend, as {'y', 'dx', 'dw', 'db', 'dslope'}."""
    inputs = inputs or case.inputs()
    leaves = leaves_of(inputs)
    return _finish(call(case, leaves, backend), leaves, inputs["dy"])


def call(case: Case, leaves: dict[str, Tensor], backend: str | None) -> Tensor:
    slope = leaves.get("slope", case.alpha)
    numbers = dict(slope=slope, p=case.p, seed=SEED, stream=STREAM, backend=backend)
    if case.op == "linear_act":
        return FF.linear_act(leaves["x"], leaves["w"], leaves.get("b"), case.act, **numbers)
    if case.op == "mlp":
        return _as_network(case, leaves, backend)
    return FF.bias_act_dropout(leaves["x"], leaves.get("b"), case.act, **numbers)


def _as_network(case: Case, leaves: dict[str, Tensor], backend: str) -> Tensor:
    """linear_act as a network of one layer."""
    params = [leaves.get(name) for name in ("w", "b", "slope")]
    has = sum(bit for bit, t in zip(layers.BITS, params, strict=True) if t is not None)
    threshold, scale = philox.threshold_and_scale(case.p) if case.p else (0, 1.0)
    x, alpha = leaves["x"], 0.01 if case.alpha is None else case.alpha
    net = Net(backend, [activations.IDS[case.act], threshold, 0, has], [alpha, scale], x)
    state = torch.tensor([SEED, STREAM], device=case.device)
    return net.train(x, state, 0, [t for t in params if t is not None])


def oracle(case: Case, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The same in fp64 on the reference backend."""
    inputs = inputs or case.inputs()
    leaves = leaves_of(inputs, torch.float64)
    op = "bias_act_dropout" if case.op == "bias_act_dropout" else "linear_act"
    y = call(replace(case, op=op, dtype=torch.float64), leaves, "reference")
    return _finish(y, leaves, inputs["dy"].double())


def plain(case: Case, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The same with PyTorch's own functions and autograd, in the case's dtype, with our mask."""
    # Contiguous: on CPUs with AMX, PyTorch's bf16 product of rows with padding between them reads
    # the padding (seen with torch 2.14), and a NaN there ends up in the result.
    inputs = {k: t.contiguous() for k, t in (inputs or case.inputs()).items()}
    leaves = leaves_of(inputs)
    x, w, b = leaves["x"], leaves.get("w"), leaves.get("b")
    if w is not None:
        z = F.linear(x, w, b)
    else:
        z = x if b is None else x + b
    alpha = 0.01 if case.alpha is None else case.alpha
    y = composite._plain(activations.IDS[case.act], z, leaves.get("slope"), alpha)
    if case.p > 0:
        threshold, scale = philox.threshold_and_scale(case.p)
        state = torch.tensor([SEED, STREAM], device=case.device)
        mask = philox.keep_mask(state, 0, case.m, case.n, threshold)
        # As torch's native_dropout: multiplied by the mask and by the scale.
        y = y * mask.to(y.dtype) * scale
    return _finish(y, leaves, inputs["dy"])


@dataclass(frozen=True)
class Verdict:
    """One line of the table: the worst case of a backend, device, op and dtype."""

    backend: str
    device: str
    op: str
    dtype: str
    cases: int
    worst: float  # share of the error budget; above 1 is wrong
    masks: bool  # bit-equal to the specification
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.worst <= 1 and self.masks and not self.error


# (M, K, N): one element, primes, exact tiles, few columns, one row
_SPREAD = ((1, 1, 1), (61, 53, 77), (128, 64, 64), (509, 20, 10), (1, 33, 1031))


def _cases(op: str, dtype: torch.dtype, device: str, full: bool) -> Iterator[Case]:
    """Every activation with and without dropout, over the spread of shapes in turn."""
    i = 0
    for act in activations.NAMES:
        for p in (0.0, 0.3):
            shapes = _SPREAD if full else (_SPREAD[1], _SPREAD[i % len(_SPREAD)])
            i += 1
            for m, k, n in shapes:
                yield Case(op, m, k, n, act, p, dtype, device)


def verify_one(
    backend: str, device: str, op: str, dtype: torch.dtype, full: bool = False
) -> Verdict:
    """Runs the cases of one backend, device, op and dtype."""
    worst, count, error, masks = 0.0, 0, "", False
    try:
        masks = masks_agree(backend, device)
        for case in _cases(op, dtype, device, full):
            inputs = case.inputs()
            got, truth, yardstick = (
                run(case, backend, inputs),
                oracle(case, inputs),
                plain(case, inputs),
            )
            count += 1
            for name, value in got.items():
                used = excess(value, yardstick[name], truth[name], dtype)
                if not used <= worst:
                    worst = used
                if not used <= 1 and not error:
                    error = f"{case.act}, p = {case.p:g}, {case.m}x{case.k}x{case.n}: {name}"
    except Exception as caught:  # a backend that raises is a finding, not the end of the table
        error = f"{type(caught).__name__}: {str(caught).splitlines()[0]}"
    return Verdict(backend, device, op, dtypes.SHORT[dtype], count, worst, masks, error)


def verify(full: bool = False) -> Iterator[Verdict]:
    """Verdicts on every backend, device, op and dtype that can run here, as they are found."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for backend in registry.BACKENDS:
        for device in devices:
            if backend.unavailable(device) is not None:
                continue
            for op in (*choice.OPS, "mlp"):
                for dtype in backend.dtypes:
                    has_op = op != "mlp" or choice.has_mlp(backend.name, device, dtype)
                    if dtype in dtypes.KERNEL and has_op:
                        yield verify_one(backend.name, device, op, dtype, full)


def command(argv: list[str]) -> int:
    """`fusedmlp verify`: prints the table; 0 when all is right, else 1."""
    parser = argparse.ArgumentParser(
        prog="fusedmlp verify",
        description="Check every backend of this machine against fp64, outputs, gradients, masks.",
    )
    parser.add_argument("--full", action="store_true", help="every shape for every activation")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    print(f"{'backend':10} {'device':6} {'op':17} {'dtype':5} {'cases':>5} {'budget':>7} masks")
    wrong = 0
    for v in verify(args.full):
        wrong += not v.ok
        print(
            f"{v.backend:10} {v.device:6} {v.op:17} {v.dtype:5} {v.cases:5d} {v.worst:7.2f} "
            f"{'equal' if v.masks else 'DIFFER':6} {'ok' if v.ok else 'WRONG ' + v.error}",
            flush=True,
        )
    for backend in registry.BACKENDS:
        for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
            reason = backend.unavailable(device)
            if reason is not None:
                print(f"{backend.name:10} {device:6} not checked: {reason}")
    print(
        f"{'all right' if not wrong else f'{wrong} WRONG'} in {time.perf_counter() - start:.0f} s"
    )
    return 1 if wrong else 0
