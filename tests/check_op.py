"""The one way to compare an op with the truth: cases, and the error budget of `fusedmlp verify`."""

from __future__ import annotations

from torch import Tensor

from fusedmlp.commands.verify import (  # noqa: F401
    DTYPES,
    SEED,
    STREAM,
    Case,
    call,
    excess,
    leaves_of,
    oracle,
    plain,
    run,
)

# name -> (M, K, N), and why it is there
SHAPES = {
    "one": (1, 1, 1),  # every loop runs once
    "ragged": (37, 53, 29),  # primes: no size is a multiple of anything
    "tile": (64, 64, 64),  # exact tiles and Philox groups
    "off_tile": (65, 63, 65),  # one more and one less than a tile
    "wide": (3, 8, 1031),  # one row of threads, many columns
    "tall": (1031, 5, 10),  # the last layer of a classifier: N below one vector
}


def assert_within_budget(case: Case, got: dict[str, Tensor], inputs=None) -> None:
    """Every output and gradient of `got` is within the error budget."""
    truth, yardstick = oracle(case, inputs), plain(case, inputs)
    assert got.keys() == truth.keys()
    used = {name: excess(t, yardstick[name], truth[name], case.dtype) for name, t in got.items()}
    over = {name: round(u, 2) for name, u in used.items() if not u <= 1}
    assert not over, f"{case}: share of the error budget used: {over}"
