"""The environment variables of this package: what each is for, and what it may hold.

Values get the checks and the wording of arguments, when they are first used. An import that raises
would leave no command to say why; `fusedmlp info` lists what is wrong.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

VARIABLES = {
    "FUSEDMLP_BACKEND": "backend of every call that names none: native, triton or reference",
    "FUSEDMLP_CPU_ISA": "highest instruction set of the CPU kernels: baseline, avx2, avx512; for "
    "products in bf16 also avx512_bf16, amx",
    "FUSEDMLP_DATA": "folder of data sets for fusedmlp train",
    "FUSEDMLP_BUILD": "what a build makes: auto, cpu, cuda or none",
    "FUSEDMLP_DDP_SECONDS": "how long a process waits for the others of a torchrun; default 180",
    "FUSEDMLP_AUTOTUNE": "1 lets a call measure what is not known of its size; 0 ignores what is",
}
CHOICES = {
    "FUSEDMLP_BACKEND": ("native", "triton", "reference"),
    "FUSEDMLP_CPU_ISA": ("baseline", "avx2", "avx512", "avx512_bf16", "amx"),
    "FUSEDMLP_BUILD": ("auto", "cpu", "cuda", "none"),
    "FUSEDMLP_AUTOTUNE": ("0", "1"),
}


def _wanted(name: str, value: str) -> str | None:
    """What the variable must be, where it is not."""
    if name in CHOICES:
        return None if value in CHOICES[name] else f"one of {', '.join(CHOICES[name])}"
    if name == "FUSEDMLP_DDP_SECONDS":
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        return None if 0 < seconds < math.inf else "a number of seconds above 0"
    is_folder = not Path(value).exists() or Path(value).is_dir()
    return None if is_folder else "a folder"


def check(name: str, value: str) -> str:
    """The value, or ValueError."""
    wanted = _wanted(name, value)
    if wanted is not None:
        raise ValueError(f"{name} must be {wanted}, got {value!r}; unset it for the default")
    return value


def read(name: str) -> str | None:
    """The value of a variable, None where it is unset or empty.

    raises   ValueError for what it may not hold
    """
    value = os.environ.get(name)
    return check(name, value) if value else None


def problems() -> list[str]:
    """What is wrong with the variables that are set."""
    found = []
    for name in VARIABLES:
        try:
            read(name)
        except ValueError as error:
            found.append(str(error))
    return found
