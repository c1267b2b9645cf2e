"""What one forward is run with, shared by all fused modules in it: backend and dropout masks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import compat, context, functional
from ..backends import registry


def must_trace() -> bool:
    """True where PyTorch watches or transforms the call: functional.py has to look at all of it."""
    return (
        torch.compiler.is_compiling() or compat.is_any_autocast_enabled() or compat.is_transformed()
    )


class MaskState:
    """One (seed, stream) for all layers of the outermost fused module, and the next stream offset.

    It is drawn when something drops for the first time: a forward without dropout leaves torch's
    generator alone.

    traced    what must_trace() says of this forward
    settings  handed down by the caller, or None for those of the present context
    named     the backend that they or the environment name, or None
    """

    __slots__ = ("named", "row_offset", "scopes", "state", "stream_offset", "traced")

    def __init__(self, stream_offset: int, traced: bool, settings: context.Settings | None = None):
        settings = context.now() if settings is None else settings
        self.stream_offset = stream_offset
        self.traced = traced
        self.scopes, self.named = settings.scopes, registry.named_in(settings)
        self.row_offset = 0
        self.state: Tensor | None = None

    def take(self, layers: int = 1) -> int:
        """The stream offset of the next layer; sets aside those of so many."""
        offset = self.stream_offset
        self.stream_offset = offset + layers
        return offset

    def draw(self, like: Tensor) -> Tensor:
        """(seed, stream) on the device of `like`."""
        if self.state is None or self.state.device != like.device:
            if self.scopes:
                self.state, self.row_offset = self.scopes[-1].on(like.device)
            else:
                self.state = functional.fresh_state(like, self.traced)
        return self.state
