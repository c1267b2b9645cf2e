"""The one way to compare an op with the truth: the error budget, and cases to spend it on.

Oracle: the reference backend in fp64 on the same inputs and masks (test_reference.py ties it to
PyTorch and gradcheck). Yardstick: plain PyTorch in the tested dtype, with the same masks. With t and
t_rms the yardstick's errors against the oracle, a result must satisfy, for outputs and gradients,

    max error <= 2 t + eps / 2 * max|oracle|      RMS error <= 1.5 t_rms + eps / 4 * RMS(oracle)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fusedmlp.functional as FF
from fusedmlp import activations, differentiable, rng

SEED, STREAM = 0x1234_5678_9ABC_DEF0, -7

# name -> (M, K, N), and why it is there
SHAPES = {
    "one": (1, 1, 1),  # every loop runs once
    "ragged": (37, 53, 29),  # primes: no size is a multiple of anything
    "tile": (64, 64, 64),  # exact tiles and Philox groups
    "off_tile": (65, 63, 65),  # one more and one less than a tile
    "wide": (3, 8, 1031),  # one row of threads, many columns
    "tall": (1031, 5, 10),  # the last layer of a classifier: N below one vector
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
        if self.op == "linear_act":
            made["x"] = randn(self.m, self.k)
            made["w"] = randn(self.n, self.k, scale=max(self.k, 1) ** -0.5)
        else:
            made["x"] = randn(self.m, self.n)
        if self.bias:
            made["b"] = randn(self.n)
        if self.act == "prelu":
            made["slope"] = randn(self.slope_elements or self.n).abs() * 0.5
        made["dy"] = randn(self.m, self.n)
        if self.act in ("relu", "leaky_relu", "prelu"):
            made["dy"][_near_kink(made)] = 0
        return made


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


def _leaves(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {
        name: t.detach().to(dtype or t.dtype).requires_grad_()
        for name, t in inputs.items()
        if name != "dy"
    }


def run(case: Case, backend: str | None, inputs: dict[str, Tensor] | None = None):
    """Output and all gradients of a case on a backend, as {'y', 'dx', 'dw', 'db', 'dslope'}."""
    inputs = inputs or case.inputs()
    leaves = _leaves(inputs)
    return _finish(call(case, leaves, backend), leaves, inputs["dy"])


def call(case: Case, leaves: dict[str, Tensor], backend: str | None) -> Tensor:
    slope = leaves.get("slope", case.alpha)
    numbers = dict(slope=slope, p=case.p, seed=SEED, stream=STREAM, backend=backend)
    if case.op == "linear_act":
        return FF.linear_act(leaves["x"], leaves["w"], leaves.get("b"), case.act, **numbers)
    return FF.bias_act_dropout(leaves["x"], leaves.get("b"), case.act, **numbers)


def oracle(case: Case, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The same in fp64 on the reference backend."""
    inputs = inputs or case.inputs()
    leaves = _leaves(inputs, torch.float64)
    y = call(replace(case, dtype=torch.float64), leaves, "reference")
    return _finish(y, leaves, inputs["dy"].double())


def plain(case: Case, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The same with PyTorch's own functions and autograd, in the case's dtype, with our mask."""
    inputs = inputs or case.inputs()
    leaves = _leaves(inputs)
    x, w, b = leaves["x"], leaves.get("w"), leaves.get("b")
    if w is not None:
        z = torch.nn.functional.linear(x, w, b)
    else:
        z = x if b is None else x + b
    alpha = 0.01 if case.alpha is None else case.alpha
    y = differentiable._plain(activations.IDS[case.act], z, leaves.get("slope"), alpha)
    if case.p > 0:
        threshold, scale = rng.threshold_and_scale(case.p)
        state = torch.tensor([SEED, STREAM], device=case.device)
        mask = rng.keep_mask(state, 0, case.m, case.n, threshold)
        # As torch's native_dropout: multiplied by the mask and by the scale.
        y = y * mask.to(y.dtype) * scale
    return _finish(y, leaves, inputs["dy"])


def excess(got: Tensor, plain_: Tensor, oracle_: Tensor, dtype: torch.dtype) -> float:
    """How much of the budget is used: above 1 is a failure. Also asserts that the budget is tight.

    got, plain_  results in `dtype`;  oracle_  fp64
    """
    assert got.dtype == dtype and got.shape == oracle_.shape
    if got.numel() == 0:
        return 0.0
    eps = torch.finfo(dtype).eps

    def errors(t: Tensor) -> tuple[float, float]:
        e = t.double() - oracle_
        return e.abs().max().item(), e.square().mean().sqrt().item()

    largest, rms = oracle_.abs().max().item(), oracle_.square().mean().sqrt().item()
    (t, t_rms), (e, e_rms) = errors(plain_), errors(got)
    budget, budget_rms = 2 * t + eps / 2 * largest, 1.5 * t_rms + eps / 4 * rms
    if e != e or e_rms != e_rms:
        return float("inf")
    if largest == 0:
        return 0.0 if e == 0 else float("inf")
    # One element can be cancellation alone; for more, a budget as large as the value shows nothing.
    assert got.numel() == 1 or budget < 0.25 * largest, "the budget is too wide to show anything"
    return max(e / budget, e_rms / budget_rms)


def assert_within_budget(case: Case, got: dict[str, Tensor], inputs=None) -> None:
    """Every output and gradient of `got` is within the error budget."""
    truth, yardstick = oracle(case, inputs), plain(case, inputs)
    assert got.keys() == truth.keys()
    used = {
        name: excess(t, yardstick[name], truth[name], case.dtype) for name, t in got.items()
    }
    over = {name: round(u, 2) for name, u in used.items() if not u <= 1}
    assert not over, f"{case}: share of the error budget used: {over}"
