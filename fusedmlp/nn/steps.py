"""The steps of a container's forward: an op for one group, an op for several, a plain function.

Where an op cannot do what the modules would do, errors included, the modules themselves run, unless
a backend was asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..autograd.mlp import Mlp, Net
from ..backends import choice, registry
from ..spec import activations, checks, dtypes, layers
from ..spec.layers import Epilogue, Layer
from ..tuning.first_call import at_first_call
from .groups import LayerGroup, Opaque, is_candidate, is_fused_module, is_tampered
from .mask_state import MaskState

_NONE, _PRELU, _SOFTPLUS = activations.NONE, activations.PRELU, activations.SOFTPLUS
_PLAIN = frozenset({Tensor, nn.Parameter})


class GroupStep:
    """One group, and the backend that was chosen for its last input: None for its plain modules.

    way  how the network that the group belongs to runs on inputs of this kind, if that was chosen
    """

    __slots__ = ("backend", "group", "key", "stream_offset", "way")

    def __init__(self, group: LayerGroup, stream_offset: int, way: choice.Way | None = None):
        self.group, self.stream_offset, self.way = group, stream_offset, way
        self.key = self.backend = None

    def __call__(self, x, masks: MaskState):
        group, dropping = self.group, self.group.dropping()
        if dropping is None or (group.act == _NONE and dropping[0] == 0):
            self.key = self.backend = None
            return group.run_plain(x)
        threshold, scale = dropping
        w, b, slope = group.tensors()
        named = masks.named
        if masks.traced:
            self.backend = None
            if not fits(x, w, b, group.act, slope, traced=True):
                _refuse(x, group.op, named)
                return group.run_plain(x)
        else:
            if type(x) not in functional.TENSORS or x.is_nested:
                self.backend = None
                _refuse(x, group.op, named)
                return group.run_plain(x)
            # The tensors of a module by identity: a changed dtype or shape is found by the op.
            what = (x.shape, x.dtype, x.layout, x.device, torch.is_grad_enabled())
            key = (*what, threshold != 0, named, id(w), id(b), id(slope))
            if self.key != key:
                self.backend = _choose(group, x, w, b, slope, threshold != 0, named, self.way)
                self.key = key
            if self.backend is None:
                return group.run_plain(x)
        state = masks.draw(x) if threshold else None
        drop = threshold, scale, self.stream_offset, masks.row_offset
        e = Epilogue(b, slope, state, group.act, group.alpha, *drop)
        return run_op(self.backend, x, w, e, masks, self.way)


def run_op(
    backend: str | None,
    x: Tensor,
    w: Tensor | None,
    e: Epilogue,
    masks: MaskState,
    way: choice.Way | None = None,
):
    """The op of one group, on a backend that was chosen for inputs like x."""
    if masks.traced or masks.row_offset:
        if w is None:
            return functional.run_bias_act_dropout(x, e, masks.named)
        return functional.run_linear_act(x, w, e, masks.named)
    if w is None:
        return functional.bias_act_dropout_on(backend, x, e)
    return functional.linear_act_on(backend, x, w, e, "layers" if way is None else way.route)


def _choose(
    group: LayerGroup, x, w, b, slope, drops: bool, named: str | None, way: choice.Way | None
) -> str | None:
    """The backend for a group, or None where its modules do as well or better."""
    op = group.op
    if not fits(x, w, b, group.act, slope, traced=False):
        _refuse(x, op, named)
        return None
    rows = checks.rows(x)
    columns, k = ((x.shape[-1] if x.dim() else 1), 0) if w is None else w.shape
    if drops:
        checks.row_range(op, rows, columns, 0)
    what = op, x.device.type, x.dtype, group.act, drops, rows, k, columns, named
    chosen = choice.select(*what) if way is None else way.backend
    return None if chosen == registry.EAGER else chosen


def fits(x, w, b, act: int, slope, *, traced: bool) -> bool:
    """True if the op takes these tensors and gives what the modules would give, errors included."""
    if functional.is_foreign(x, w, b, slope) or x.is_nested:
        return False
    if x.dtype not in dtypes.SUPPORTED or x.layout != torch.strided:
        return False
    device = x.device
    if device.type == "meta":
        return False
    cast = dtypes.autocast_dtype(device.type) if traced else None
    if cast is not None and x.dtype == torch.float64:
        return False
    if act == _SOFTPLUS and cast is not None and device.type != "cpu":
        return False  # Autocast runs softplus in fp32 there.
    if w is None:
        if act == _PRELU and cast is not None:
            return False  # Autocast casts for prelu, but not for our op.
        return slope is None or _slope_fits(x, slope, x.shape[-1] if x.dim() else 1, cast)
    return x.dim() > 0 and _parameters_fit(x, x.shape[-1], w, b, slope, cast)


def _parameters_fit(x, width: int, w, b, slope, cast: torch.dtype | None) -> bool:
    """True if w (N, width), b and slope belong to inputs of x's kind that are `width` wide."""
    if w.dim() != 2 or w.shape[1] != width:
        return False
    for t in (w, b):
        if t is not None and not _belongs(x, t, cast):
            return False
    if b is not None and (b.dim() != 1 or b.shape[0] != w.shape[0]):
        return False
    return slope is None or _slope_fits(x, slope, w.shape[0], cast)


def _belongs(x: Tensor, t: Tensor, cast: torch.dtype | None) -> bool:
    """Parameters in the dtype of x, as PyTorch wants them, or about to be cast."""
    if t.layout != torch.strided or t.device != x.device:
        return False
    return t.dtype == x.dtype if cast is None else t.dtype in dtypes.KERNEL


def _slope_fits(x: Tensor, slope: Tensor, columns: int, cast: torch.dtype | None) -> bool:
    # nn.PReLU's slopes belong to dimension 1, ours to the last.
    if slope.numel() != 1 and (x.dim() != 2 or slope.numel() != columns):
        return False
    return _belongs(x, slope, cast)


def _refuse(x, op: str, named: str | None) -> None:
    """BackendError if a backend was asked for by name that does not take x; else nothing."""
    if named is None or not isinstance(x, Tensor):
        return
    registry.require(named, x.device.type, x.dtype, op)
    if type(x) not in functional.TENSORS or x.layout != torch.strided or x.is_nested:
        raise registry.BackendError(
            f"{op}: backend {named!r} was asked for but cannot be used:\n"
            f"    input is a {type(x).__name__} of layout {x.layout}, not a dense torch.Tensor"
        )


def network_steps(
    groups: list[LayerGroup | Opaque], at: int, x, masks: MaskState
) -> list[MlpStep | GroupStep]:
    """Steps for the longest run of groups starting at `at` that is a network, as it runs fastest on
    x (choice.py); empty where each of them is asked for by itself.

    One op for all layers saves the host cost of each op and of its node in autograd.
    """
    if type(x) not in _PLAIN or x.layout != torch.strided or x.is_nested:
        return []
    if x.dim() == 0 or x.numel() == 0:
        return []
    width, found = x.shape[-1], []
    for group in groups[at:]:
        layer = _layer_of(group, x, width, masks.stream_offset + len(found))
        if layer is None:
            break
        found.append(layer)
        width = layer.weight.shape[0]
    if not found or (len(found) == 1 and _is_bare(found[0].epilogue)):
        return []
    rows = checks.rows(x)
    kinds = [(e.act, e.threshold != 0, w.shape[0]) for w, e in found]
    what = x.device.type, x.dtype, rows, x.shape[-1], kinds
    if masks.named is None:
        at_first_call(*what)
    way = choice.select_net(*what, masks.named)
    if way is None:
        return []
    for w, e in found:
        if e.threshold:
            checks.row_range("mlp", rows, w.shape[0], 0)
    run = groups[at : at + len(found)]
    if way.route == "mlp":
        return [MlpStep(way, run, found, x)]
    pairs = zip(run, found, strict=True)
    return [GroupStep(group, layer.epilogue.stream_offset, way) for group, layer in pairs]


def _is_bare(e: Epilogue) -> bool:
    """True if nothing is left but what PyTorch's Linear is."""
    return e.act == _NONE and not e.threshold


def _layer_of(group: LayerGroup | Opaque, x: Tensor, width: int, offset: int) -> Layer | None:
    """A group as it is now; None where the op `mlp` would not do what its modules do."""
    if type(group) is not LayerGroup or group.linear is None:
        return None
    dropping, own, slope = group.dropping(), group.linear._parameters, None
    if dropping is None:
        return None
    try:
        if group.act == _PRELU:
            slope = group.activation._parameters["weight"]
        w, b = own["weight"], own["bias"]
    except KeyError:
        return None
    for t in (w, b, slope):
        # First of all: another class may have other answers to the questions below.
        if t is not None and (type(t) not in _PLAIN or t.numel() == 0):
            return None
    if not _parameters_fit(x, width, w, b, slope, None):
        return None
    return Layer(w, Epilogue(b, slope, None, group.act, group.alpha, *dropping, offset, 0))


class MlpStep:
    """Some groups as one op on inputs like the first one's."""

    __slots__ = (
        "backend",
        "drops",
        "groups",
        "ids",
        "key",
        "net",
        "records",
        "sources",
        "steps",
        "way",
    )

    def __init__(self, way: choice.Way, groups: list[LayerGroup], found: list[Layer], x: Tensor):
        self.way, self.backend, self.groups = way, way.backend, groups
        self.steps = [
            GroupStep(group, layer.epilogue.stream_offset)
            for group, layer in zip(groups, found, strict=True)
        ]
        self.drops = any(e.threshold for _, e in found)
        self.records = torch.is_grad_enabled()
        self.key = x.shape, x.dtype, x.device
        self.sources = [
            (g.linear._parameters, g.activation._parameters if g.act == _PRELU else None)
            for g in groups
        ]
        params, ints, numbers = layers.pack(found)
        self.net = Net(way.backend, ints, numbers, x)
        self.ids = [*map(id, params)]

    def __call__(self, x, masks: MaskState):
        params = []
        try:
            for own, slope in self.sources:
                params.append(own["weight"])
                b = own["bias"]
                if b is not None:
                    params.append(b)
                if slope is not None:
                    params.append(slope["weight"])
        except KeyError:
            # Something has put a plain attribute in the place of a parameter.
            return self._one_by_one(x, masks)
        if (
            [*map(id, params)] != self.ids
            or type(x) is not Tensor
            or (x.shape, x.dtype, x.device) != self.key
        ):
            return self._one_by_one(x, masks)
        return run_mlp(self.net, self.drops, self.records, x, masks, params)

    def _one_by_one(self, x, masks: MaskState):
        """What no longer is what it was, or has what the op does not take."""
        for step in self.steps:
            x = step(x, masks)
        return x


def run_mlp(net: Net, drops: bool, records: bool, x: Tensor, masks: MaskState, params):
    """The op of several groups. records: whether autograd is on; params as in spec/layers.py."""
    state = masks.draw(x) if drops else None
    if masks.row_offset:
        checks.row_range("mlp", checks.rows(x), 0, masks.row_offset)
    if records and _any_requires_grad(x, params):
        return Mlp.apply(x, state, masks.row_offset, net, *params)
    return net.infer(x, state, masks.row_offset, params)


def _any_requires_grad(x: Tensor, params: list[Tensor]) -> bool:
    if x.requires_grad:
        return True
    for t in params:
        if t.requires_grad:
            return True
    return False


_FUNCTIONS = {nn.Tanh: torch.tanh, nn.Sigmoid: torch.sigmoid}


def as_function(m: nn.Module) -> Callable[[Tensor], Tensor]:
    """Calls the forward of a plain module without nn.Module.__call__, which takes about 1 us.

    Right as long as program.py finds the module unchanged.
    """
    if not is_candidate(m) or is_fused_module(m) or is_tampered(m):
        return m
    cls = type(m)
    if cls is nn.Linear:
        return _linear(m)
    if cls is nn.ReLU:
        return torch.relu_ if m.inplace else torch.relu
    return _FUNCTIONS.get(cls, m.forward)


def plain_functions(modules: list[nn.Module]) -> list[Callable[[Tensor], Tensor]]:
    """The modules as functions, without a Dropout that drops nothing now."""
    return [as_function(m) for m in modules if type(m) is not nn.Dropout or (m.training and m.p)]


def _linear(m: nn.Linear) -> Callable[[Tensor], Tensor]:
    own, linear = m._parameters, F.linear

    def call(x: Tensor) -> Tensor:
        try:
            w, b = own["weight"], own["bias"]
        except KeyError:
            # Something has put a plain attribute in the place of a parameter.
            return m(x)
        return linear(x, w, b)

    return call
