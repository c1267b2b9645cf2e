"""FusedSequential and FusedMLP: containers of plain modules whose groups run as one op each.

The children are what they are in an nn.Sequential: same objects, same keys. What may be fused is
looked at again in every call, so nothing has to be told about a change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from .. import compat, context
from ..spec import activations, checks
from .groups import ACTIVATIONS, find_groups
from .mask_state import MaskState
from .modules import refuse_torchscript
from .program import Plan, run_groups


class FusedSequential(nn.Sequential):
    """nn.Sequential whose groups of Linear, activation, Dropout run as one op each.

    Takes what nn.Sequential takes and has the same keys. Two things differ: dropout masks are this
    package's (fusedmlp.dropout_state), and where an op keeps its output for backward, as F.relu
    does, writing into the result before backward raises (write `out = out + x`, not `out += x`).

    A child that has hooks, is a subclass, is parametrised, or has parameters that no op has, runs
    through its own __call__; `fusedmlp.report` says which and why. torch.fx traces through it, to
    the children, as it does with nn.Sequential. torch.jit refuses it: `fusedmlp.unfuse` first.

    stream_offset (0) is added to the stream of the dropout state for the first group.
    """

    stream_offset = 0
    _plan: Plan | None = None

    def forward(self, input, settings: context.Settings | None = None):
        """settings: for this call in the place of those of the context (`use_backend`, ...)."""
        if torch.compiler.is_compiling():
            return self._run_fused(input, MaskState(self.stream_offset, True, settings))
        if compat.has_any_global_hook():
            return super().forward(input)
        return self._present_plan().run(input, self.stream_offset, settings)

    _fused_forward = forward
    _slow_forward = __prepare_scriptable__ = refuse_torchscript

    def _run_fused(self, x, masks: MaskState):
        """forward, with the masks of the container that this one is in."""
        if compat.has_any_global_hook():
            return super().forward(x)
        if torch.compiler.is_compiling():
            return run_groups(find_groups(list(self._modules.values())), x, masks)
        return self._present_plan().run_with(x, masks)

    def _present_plan(self) -> Plan:
        children = list(self._modules.values())
        plan = self._plan
        if plan is None or plan.children != children or plan.is_stale():
            plan = self.__dict__["_plan"] = Plan(children)
        return plan

    def _layer_count(self) -> int:
        """How many stream offsets its groups take, those of fused modules inside included."""
        groups = find_groups(list(self._modules.values()))
        return sum(group.layers if hasattr(group, "layers") else 1 for group in groups)

    def __getitem__(self, idx):
        if isinstance(idx, slice):
            return FusedSequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def __add__(self, other):
        return FusedSequential(*super().__add__(other))

    def __mul__(self, other):
        return FusedSequential(*super().__mul__(other))

    def __getstate__(self):
        state = super().__getstate__()
        state.pop("_plan", None)
        return state


def activation_module(act: int, device, dtype) -> nn.Module | None:
    """A new module of an activation, None for 'none'."""
    if act == activations.NONE:
        return None
    if act == activations.GELU_TANH:
        return nn.GELU(approximate="tanh")
    if act == activations.PRELU:
        return nn.PReLU(device=device, dtype=dtype)
    return next(cls for cls, (number, _) in ACTIVATIONS.items() if number == act)()


class FusedMLP(FusedSequential):
    """A multilayer perceptron: Linear, activation, Dropout for each hidden layer, then a Linear.

    The children, keys and initial values are those of the nn.Sequential that one would write:
    FusedMLP(784, [256], 10, dropout=0.5) has the state_dict of nn.Sequential(nn.Linear(784, 256),
    nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10)). There is a Dropout only where dropout > 0, and
    no module for activation 'none'.

    hidden      sizes of the hidden layers; empty for a single linear map
    activation  a name of fusedmlp.spec.activations.NAMES
    dropout     probability of dropping after each hidden layer, or one for each of them
    raises      ValueError, TypeError for arguments that no network could have
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        activation: str = "relu",
        dropout: float | Sequence[float] = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        op = "FusedMLP"
        if isinstance(hidden, str) or not isinstance(hidden, Sequence):
            raise TypeError(
                f"{op}: hidden must be a sequence of sizes, such as [256, 256], "
                f"got {type(hidden).__name__}"
            )
        hidden = checks.positive_sizes(op, "hidden", hidden)
        (in_features,) = checks.positive_sizes(op, "in_features", [in_features])
        (out_features,) = checks.positive_sizes(op, "out_features", [out_features])
        act = checks.activation(op, activation)
        ps = _probabilities(op, dropout, len(hidden))
        modules, width = [], in_features
        for size, p in zip(hidden, ps, strict=True):
            modules.append(nn.Linear(width, size, bias, device, dtype))
            act_module = activation_module(act, device, dtype)
            if act_module is not None:
                modules.append(act_module)
            if p > 0:
                modules.append(nn.Dropout(p))
            width = size
        modules.append(nn.Linear(width, out_features, bias, device, dtype))
        super().__init__(*modules)


def _probabilities(op: str, dropout: float | Sequence[float], layers: int) -> list[float]:
    if checks.is_number(dropout):
        return [checks.probability(op, dropout, "dropout")] * layers
    if isinstance(dropout, str) or not isinstance(dropout, Sequence):
        raise TypeError(
            f"{op}: dropout must be a number or one number per hidden layer, "
            f"got {type(dropout).__name__}"
        )
    if len(dropout) != layers:
        raise ValueError(
            f"{op}: dropout must be a number or have one per hidden layer, {layers}, "
            f"got {len(dropout)}"
        )
    return [checks.probability(op, p, "dropout") for p in dropout]
