"""How much one call of several networks takes on."""

import pytest

from fusedmlp.train.engines.native_many import NativeMany


@pytest.mark.parametrize(
    ("chunk", "steps", "epochs"),
    [(64.0, 10, 6), (64.0, 64, 1), (64.0, 100, 1), (1.0, 1, 1), (5.9, 2, 2), (3.0, 0, 3)],
)
def test_a_call_takes_as_many_epochs_as_it_has_time_for(chunk, steps, epochs):
    """Ctrl-C is seen between two calls, so none may be much longer."""
    many = NativeMany()
    many.chunk = chunk
    assert many.epochs_ahead(steps) == epochs
