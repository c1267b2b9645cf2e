"""FUSEDMLP_AUTOTUNE=1: a fused container measures networks of its size at its first call."""

from __future__ import annotations

import logging

import torch

from .. import environment
from ..backends.registry import BackendError
from ..spec import activations, dtypes
from . import measure
from .work import Work

log = logging.getLogger("fusedmlp")

_failed: set[str] = set()  # keys that are not tried again in this process


def is_allowed(device_type: str) -> bool:
    """Whether anything may be measured now."""
    if device_type not in ("cpu", "cuda"):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch.are_deterministic_algorithms_enabled():
        return False
    return device_type == "cpu" or not torch.cuda.is_current_stream_capturing()


def at_first_call(
    device_type: str,
    dtype: torch.dtype,
    rows: int,
    in_features: int,
    layers: list[tuple[int, bool, int]],
) -> None:
    """Measure a network that has no row in the table, if the environment asks for that. Arguments
    as in choice.select_net."""
    if environment.read("FUSEDMLP_AUTOTUNE") != "1" or dtype not in dtypes.KERNEL:
        return
    if not is_allowed(device_type):
        return
    named = tuple((activations.NAMES[act], drops, n) for act, drops, n in layers)
    gradients = torch.is_grad_enabled()
    work = Work(device_type, dtypes.SHORT[dtype], rows, in_features, named, gradients)
    if measure.is_kept(work) or work.key in _failed:
        return
    try:
        for _, result in measure.measure([work]):
            measure.keep(work, result)
            log.info("%s", measure.summary(work, result))
            for line in measure.bugs(work, result):
                log.warning("%s", line)
    except (BackendError, OSError) as error:
        # The call itself can do without.
        _failed.add(work.key)
        log.warning("FUSEDMLP_AUTOTUNE=1: %s could not be measured: %s", work, error)
