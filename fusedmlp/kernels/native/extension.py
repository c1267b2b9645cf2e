"""Loads the compiled extension once, or says why it cannot."""


def unavailable(device_type: str) -> str | None:
    return "the extension is not built (FUSEDMLP_BUILD=cpu pip install --no-build-isolation .)"
