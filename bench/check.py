"""Whether a provider computes what its case says; what does not gets no number. Times nothing.

Outputs and gradients are held against an fp64 oracle with the same mask, in relative Frobenius
norm: at most 2 x plain PyTorch's own error + eps / 2 (2 eps for a few elements), and 4 times that
for PyTorch's other providers. It is a guard against another function; the test suite holds the
error budget. Our mask is known. PyTorch's is read off its output, and its rate must be p within
5 sigma; behind several dropouts, where it cannot be read, loss and gradient norms must be near
those of plain PyTorch with our mask.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedmlp
from fusedmlp.spec import activations, philox

from .providers import Problem, Provider

SEED = 0x5EED


def wrong(problem: Problem, provider: Provider) -> str | None:
    """Why a provider's result is not what the case says; None when it is right."""
    if provider.name == "floor":
        return None
    with fusedmlp.dropout_state(SEED) if provider.ours else contextlib.nullcontext():
        got = provider.results()
    dropouts = sum(p > 0 for *_, p in problem.case.layers)
    if provider.ours or dropouts == 0:
        oracle, plain = _truth(problem)
    elif len(problem.case.layers) == 1:
        masks, reason = _seen_mask(problem, got["y"])
        if reason:
            return reason
        oracle, plain = _of_masks(problem, masks)
    else:
        return _far_from_plain(got, _truth(problem)[1])
    slack = 1 if provider.ours else 4
    for name, t in got.items():
        # Of a few elements plain PyTorch's own error may by chance be next to nothing.
        rounding = problem.eps * (0.5 if t.numel() > 64 else 2)
        limit = slack * (2 * _error(plain[name], oracle[name]) + rounding)
        if len(problem.case.layers) > 1:
            limit = max(limit, 1e-3)  # one hidden unit on the other side of relu's kink
        error = _error(t, oracle[name])
        if not error <= limit:
            return f"{name} is wrong: relative error {error:.1e}, at most {limit:.1e} allowed"
    return None


def _truth(problem: Problem):
    """(fp64 oracle, plain PyTorch in the case's dtype) with our mask."""
    if "ours" not in problem.truth:
        problem.truth["ours"] = _of_masks(problem, _our_masks(problem))
    return problem.truth["ours"]


def _of_masks(problem: Problem, masks):
    oracle = _plain(problem, masks, torch.float64)
    return oracle, _plain(problem, masks, problem.case.torch_dtype)


def _our_masks(problem: Problem) -> list[Tensor | None]:
    state = torch.tensor([SEED, 0], dtype=torch.int64, device=problem.case.device)
    return [
        philox.keep_mask(state, i, problem.case.m, n, philox.threshold_and_scale(p)[0])
        if p
        else None
        for i, (_, n, _, p) in enumerate(problem.case.layers)
    ]


def _seen_mask(problem: Problem, y: Tensor) -> tuple[list[Tensor | None], str | None]:
    p = problem.case.layers[0][3]
    live = _plain(problem, [None], torch.float64, p_override=0.0, grads=False)["y"] != 0
    kept = (y != 0) | ~live
    seen, n = 1 - kept[live].double().mean().item(), max(1, int(live.sum()))
    if abs(seen - p) > 5 * (p * (1 - p) / n) ** 0.5 + 1 / n:
        return [kept], f"drops a share of {seen:.4f}, not {p:g}"
    return [kept], None


def _far_from_plain(got: dict[str, Tensor], plain: dict[str, Tensor]) -> str | None:
    for name, t in got.items():
        is_loss = name == "y" and t.dim() == 0
        size, want = t.double().norm().item(), plain[name].double().norm().item()
        if not abs(size - want) <= (0.1 if is_loss else 0.3) * want:
            return f"{name} has norm {size:.3g}, plain PyTorch {want:.3g}"
    return None


def _plain(problem: Problem, masks, dtype, p_override=None, grads=True) -> dict[str, Tensor]:
    """Value and gradients from PyTorch's own functions with the given masks (M, N)."""
    leaves = {n: t.detach().to(dtype).requires_grad_(grads) for n, t in problem.leaves.items()}
    h = leaves["x"]
    for i, (k, _, act, p) in enumerate(problem.case.layers):
        p = p if p_override is None else p_override
        b = leaves.get(f"b{i}")
        h = F.linear(h, leaves[f"w{i}"], b) if k else h if b is None else h + b
        h = activations.TABLE[activations.IDS[act]].forward(h, 0.01)
        if p and masks[i] is not None:
            scale = 1 / (1 - p) if dtype == torch.float64 else philox.threshold_and_scale(p)[1]
            h = torch.where(masks[i], h * scale, 0.0)
    if problem.case.mode == "step":
        # As in the providers: the loss of 16-bit logits is taken in fp32.
        h = F.cross_entropy(h if dtype == torch.float64 else h.float(), problem.targets)
    if not grads:
        return {"y": h.detach()}
    dy = None if problem.case.mode == "step" else problem.dy.to(dtype)
    return problem.named(h, torch.autograd.grad(h, [leaves[n] for n in problem.wanted], dy))


def _error(got: Tensor, oracle: Tensor) -> float:
    """Relative Frobenius error; of an oracle that is all zeros, the norm."""
    size = oracle.norm().item()
    return (got.double() - oracle).norm().item() / (size or 1.0)
