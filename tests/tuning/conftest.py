"""Every test here has a machine of its own."""

import pytest

from fusedmlp.backends import measured


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """A machine of a kind of its own, of which nothing is known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FUSEDMLP_AUTOTUNE", raising=False)
    monkeypatch.setattr(measured, "kind", lambda device_type: f"Test {device_type}")
    monkeypatch.setattr(measured, "shipped", lambda: {})
    measured.forget()
    yield measured
    monkeypatch.undo()
    measured.forget()
