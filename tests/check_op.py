"""The one way to compare an op with the truth: the table of cases, and the error budget of
`fusedmlp verify`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fusedmlp.commands.cases import DTYPES, OPS, Case, spread, table  # noqa: F401
from fusedmlp.commands.verify import (  # noqa: F401
    SEED,
    STREAM,
    Runner,
    call,
    leaves_of,
    oracle,
    plain,
    run,
    runners,
    verify_cases,
)
from fusedmlp.spec.budget import excess


def assert_right(who: Iterable[Runner], found: Iterable[Case]) -> None:
    """Each of these backends is right in all of these cases of one op and dtype."""
    verdicts = verify_cases(who, found)
    assert verdicts and all(v.cases for v in verdicts)
    wrong = [f"{v.runner} {v.op} {v.dtype}: {v.wrong} of {v.cases}: {v.error}" for v in verdicts]
    assert all(v.ok for v in verdicts), [w for w, v in zip(wrong, verdicts, strict=True) if v.error]


def assert_within_budget(case: Case, got: dict[str, Tensor], inputs=None) -> None:
    """Every output and gradient of `got` is within the error budget."""
    truth, yardstick = oracle(case, inputs), plain(case, inputs)
    assert got.keys() == truth.keys()
    used = {name: excess(t, yardstick[name], truth[name], case.dtype) for name, t in got.items()}
    over = {name: round(u, 2) for name, u in used.items() if not u <= 1}
    assert not over, f"{case}: share of the error budget used: {over}"
