"""What the masks of one forward are drawn from, shared by all fused modules that run in it.

Does not know modules; functional.py decides where a state comes from.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import functional


def must_trace() -> bool:
    """True where PyTorch watches or transforms the call: functional.py has to look at all of it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


class Masks:
    """One state for all layers of the outermost fused module, and the number of the next layer.

    The state is drawn when something drops for the first time: a forward without dropout leaves
    torch's generator alone.

    traced  what must_trace() says of this forward
    """

    __slots__ = ("layer", "row_offset", "state", "traced")

    def __init__(self, first_layer: int, traced: bool):
        self.layer = first_layer
        self.traced = traced
        self.row_offset = 0
        self.state: Tensor | None = None

    def draw(self, like: Tensor) -> Tensor:
        """(seed, stream) on the device of `like`."""
        if self.state is None or self.state.device != like.device:
            draw = functional.draw_state if self.traced else functional.draw_state_untraced
            self.state, self.row_offset = draw(like)
        return self.state
