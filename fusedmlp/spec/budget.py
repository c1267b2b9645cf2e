"""The error budget: how far a result may be from the truth, given what plain PyTorch is wrong by.

With t and t_rms the errors of plain PyTorch in the tested dtype against the oracle in fp64, a
result must satisfy

    max error <= 2 t + eps / 2 * max|oracle|      RMS error <= 1.5 t_rms + eps / 4 * RMS(oracle)
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of fewer numbers plain PyTorch's error can be next to nothing by luck (seen: 1.42 times the budget
# of 259, whose derivative alone is four times as exact as PyTorch's). Of more numbers its RMS error
# tells enough, and the largest still varies by so much (seen: 1.36, of 960 products of two normal
# numbers).
_FEW, _LUCK = 512, 1.5


def _used(
    got: Tensor, plain_: Tensor, oracle_: Tensor, dtype: torch.dtype
) -> tuple[float, float, bool]:
    """How much of the budget is used by the largest error and by that in RMS, and whether the
    budget is tight."""
    assert got.dtype == dtype and got.shape == oracle_.shape
    if got.numel() == 0:
        return 0.0, 0.0, True
    eps = torch.finfo(dtype).eps

    def errors(t: Tensor) -> tuple[float, float]:
        e = t.double() - oracle_
        return e.abs().max().item(), e.square().mean().sqrt().item()

    if got.numel() == 1:
        # No statistics: the yardstick of one element can be exact by luck.
        error, truth = (got.double() - oracle_).abs().item(), oracle_.abs().item()
        used = error / (4 * eps * (1 + truth)) if error == error else float("inf")
        return used, used, True
    largest, rms = oracle_.abs().max().item(), oracle_.square().mean().sqrt().item()
    (t, t_rms), (e, e_rms) = errors(plain_), errors(got)
    budget, budget_rms = 2 * t + eps / 2 * largest, 1.5 * t_rms + eps / 4 * rms
    if e != e or e_rms != e_rms:
        return float("inf"), float("inf"), True
    if largest == 0:
        used = 0.0 if e == 0 else float("inf")
        return used, used, True
    return e / budget, e_rms / budget_rms, budget < 0.25 * largest


def excess(got: Tensor, plain_: Tensor, oracle_: Tensor, dtype: torch.dtype) -> float:
    """How much of the budget is used: above 1 is a failure. Also asserts that the budget is tight.

    got, plain_  results in `dtype`;  oracle_  fp64
    """
    used, used_in_rms, is_tight = _used(got, plain_, oracle_, dtype)
    if not is_tight:
        raise AssertionError("the error budget is as large as the values themselves")
    return max(used, used_in_rms)


def share(
    got: Tensor,
    plain_: Tensor,
    oracle_: Tensor,
    dtype: torch.dtype,
    independent: int | None = None,
    terms: float = 1,
    products: int = 0,
) -> float:
    """excess, also of few numbers and where the truth is next to nothing but rounding errors.

    independent  how many of the numbers are; None: all
    terms        of the sum that each number is: few of them can cancel all but their errors
    products     added up in fp32 on the way to each number, one after the other: the rounding
                 errors of K are about eps sqrt(K) / 6 times the size of their sum
    """
    largest, in_rms, _ = _used(got, plain_, oracle_, dtype)
    used = max(largest, in_rms)
    count = got.numel() if independent is None else min(independent, got.numel())
    if used > 1 and count > 0 and (count < _FEW or (in_rms <= 1 and largest < _LUCK)):
        on_the_way = products**0.5 / 6 if dtype == torch.float32 else 0.0
        size = terms**0.5 + (1 + on_the_way) * oracle_.abs().max()
        errors = (got.double() - oracle_).abs()
        used = (errors.max() / (4 * torch.finfo(dtype).eps * size)).item()
    return used if used == used else float("inf")
