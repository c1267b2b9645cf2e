"""The error budget: how far a result may be from the truth, given what plain PyTorch is wrong by.

With t and t_rms the errors of plain PyTorch in the tested dtype against the oracle in fp64, a
result must satisfy

    max error <= 2 t + eps / 2 * max|oracle|      RMS error <= 1.5 t_rms + eps / 4 * RMS(oracle)
"""

from __future__ import annotations

import torch
from torch import Tensor


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

    if got.numel() == 1:
        # No statistics: the yardstick of one element can be exact by luck.
        error, truth = (got.double() - oracle_).abs().item(), oracle_.abs().item()
        return error / (4 * eps * (1 + truth)) if error == error else float("inf")
    largest, rms = oracle_.abs().max().item(), oracle_.square().mean().sqrt().item()
    (t, t_rms), (e, e_rms) = errors(plain_), errors(got)
    budget, budget_rms = 2 * t + eps / 2 * largest, 1.5 * t_rms + eps / 4 * rms
    if e != e or e_rms != e_rms:
        return float("inf")
    if largest == 0:
        return 0.0 if e == 0 else float("inf")
    if budget >= 0.25 * largest:
        raise AssertionError("the error budget is as large as the values themselves")
    return max(e / budget, e_rms / budget_rms)
