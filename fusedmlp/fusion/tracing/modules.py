"""Models written as classes: their forward is traced by torch.fx, and its groups run fused.

Each module is traced by itself, with its children as they are. A trace holds for what was seen when
it was made (mode, attributes, children, global numbers); when that changes, another is made. What
torch.fx would get wrong in silence (grad modes, random numbers, side effects) is refused here by
name: such a module runs its own forward.
"""

from __future__ import annotations

import copyreg
import functools
import operator
import threading
import types
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from ...nn.groups import find_groups, is_candidate
from ...nn.mask_state import MaskState, must_trace
from ...nn.modules import refuse_torchscript
from .checks import Seen, Untraceable, Watch, required_arguments
from .graph import chains, is_worth, replace

_MOST_TRACES = 8  # of one module; one whose attributes change in every call runs as it is
_LOCK = threading.RLock()  # torch.fx patches nn.Module while it traces


class _Proxy(fx.Proxy):
    """Keeps `h += x` what it is; torch.fx would record `h + x`."""


def _record(function):
    def write(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior"):
    setattr(_Proxy, f"__{_name}__", _record(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Traces the forward of one module; every child is a leaf."""

    proxy_buffer_attributes = True

    def __init__(self, watch: Watch, forward: str):
        super().__init__()
        self.watch, self.traced_func_name = watch, forward

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        # Arguments with a default keep it: a trace is for calls that leave them out.
        names = required_arguments(root_fn)
        return root_fn, [self.root, *(self.create_proxy("placeholder", n, (), {}) for n in names)]

    def create_node(self, *args, **kwargs):
        self.watch.check_modes()
        return super().create_node(*args, **kwargs)

    def proxy(self, node):
        return self.watch.kept(_Proxy(node, self))

    def create_arg(self, a):
        self.watch.check_constant(a, self.root)
        return super().create_arg(a)


class Trace:
    """The forward of a module as it was when this was made.

    run     (module, *inputs, masks) -> outputs; None where nothing is fused
    parts   containers that run fused, in order
    reason  why nothing is fused, where there is one
    """

    def __init__(self, module: nn.Module):
        self.run, self.parts, self.reason = None, [], ""
        watch = Watch(module)
        try:
            graph = watch.trace(_Tracer(watch, _forward_name(module)))
            self.arity = sum(node.op == "placeholder" for node in graph.nodes)
            self._compile(module, graph)
        except Exception as error:  # torch.fx and user code raise whatever they like on a proxy
            self.reason = _in_a_line(error)
        self.seen = Seen(module, watch.user_code)

    def _compile(self, module: nn.Module, graph: fx.Graph) -> None:
        found = chains(graph, module)
        if not found:
            return
        self.parts = [chain.container for chain in found]
        replace(graph, found)
        code = graph.python_code("self")
        names = dict(code.globals)
        filename = f"<fused forward of {type(module).__name__}>"
        exec(compile(code.src, filename, "exec"), names)
        self.run = names["forward"]


def _forward_name(module: nn.Module) -> str:
    return "plain_forward" if isinstance(module, TracedForward) else "forward"


def _in_a_line(error: Exception) -> str:
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    if isinstance(error, Untraceable):
        return text
    return f"torch.fx cannot trace it: {text}"


class TracedForward:
    """Mixed in before the class of a module: its forward runs fused where a trace holds."""

    # As stream_offset of the other fused modules, a name that a user's class may have itself.
    _stream_offset = 0
    plain_class: type  # what unfuse gives back
    plain_forward: Callable

    def forward(self, *args, **kwargs):
        trace, inputs = _trace_for(self, args, kwargs)
        if trace is None:
            return self.plain_forward(*args, **kwargs)
        return trace.run(self, *inputs, MaskState(self._stream_offset, must_trace()))

    _fused_forward = forward
    _slow_forward = __prepare_scriptable__ = refuse_torchscript

    def _run_fused(self, x, masks: MaskState):
        """forward, with the masks of the container that this module is in."""
        trace, inputs = _trace_for(self, (x,), {})
        if trace is None:
            masks.take(self._layer_count())
            return self.plain_forward(x)
        return trace.run(self, *inputs, masks)

    def _layer_count(self) -> int:
        """How many stream offsets its groups take, in the mode that has most."""
        return max(
            sum(part._layer_count() for part in trace.parts)
            for trace in in_both_modes(self, trace_of)
        )

    def _fused_parts(self) -> list:
        """The containers that run in the present mode, for a report."""
        return trace_of(self).parts

    def __getstate__(self):
        state = dict(super().__getstate__())
        state.pop("_traces", None)
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        in_both_modes(self, trace_of)  # torch.compile cannot make them

    def __reduce_ex__(self, protocol):
        made, arguments, *rest = super().__reduce_ex__(protocol)
        if made is copyreg.__newobj__:
            made, arguments = _new, (self.plain_class,)
        return made, arguments, *rest


def _trace_for(module, args: tuple, kwargs: dict) -> tuple[Trace | None, tuple]:
    """(the trace to run, its inputs); None for a call that it is not for."""
    trace = trace_of(module)
    if trace.run is None:
        return None, ()
    if kwargs:
        names = required_arguments(type(module).plain_forward)[len(args) :]
        if list(kwargs) != names:
            return None, ()
        args = (*args, *kwargs.values())
    if len(args) != trace.arity or not all(isinstance(a, Tensor) for a in args):
        return None, ()
    return trace, args


def trace_of(module: nn.Module) -> Trace:
    """The trace that holds now, made if there is none."""
    traces = module.__dict__.get("_traces", ())
    if torch.compiler.is_compiling():
        for trace in traces:
            if trace.seen.holds_compiled(module):
                return trace
        return _GIVEN_UP
    for trace in traces:
        if trace.seen.holds(module):
            return trace
    if len(traces) >= _MOST_TRACES:
        return _GIVEN_UP
    with _LOCK:
        trace = Trace(module)
    # A new tuple: a shallow copy of the module keeps its own.
    module.__dict__["_traces"] = (trace, *traces)
    return trace


class _GivenUp:
    run, parts, arity = None, (), 0
    reason = f"what its forward reads changed more than {_MOST_TRACES} times"


_GIVEN_UP = _GivenUp()


def _with_signature_of(plain: Callable) -> Callable:
    """TracedForward.forward for a class, with the signature that torch.fx and others look at."""
    own = TracedForward.forward
    return functools.update_wrapper(types.FunctionType(own.__code__, own.__globals__), plain)


@functools.cache
def _class_for(cls: type) -> type:
    """The class of a traced module: FusedNet for Net."""
    forward = _with_signature_of(cls.forward)
    members = {
        "forward": forward,
        "_fused_forward": forward,
        "plain_class": cls,
        "plain_forward": cls.forward,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    return type(cls)(f"Fused{cls.__name__}", (TracedForward, cls), members)


def _new(plain_class: type) -> nn.Module:
    cls = _class_for(plain_class)
    return cls.__new__(cls)


def class_of(m: nn.Module) -> type | None:
    """The class that fuse(trace=True) gives to a module, or None where it stays what it is."""
    if isinstance(m, TracedForward):
        return type(m)
    return _class_for(type(m)) if not why_not(m) else None


def why_not(m: nn.Module) -> str:
    """Why no trace of m would run fused in either mode; '' if one would."""
    if is_candidate(m) or type(m).__module__.split(".")[0] == "torch":
        return "it is PyTorch's own"
    if "forward" in m.__dict__:
        return "its forward was replaced"
    if isinstance(m, torch.jit.ScriptModule):
        return "it is TorchScript"
    with _LOCK:
        traces = in_both_modes(m, Trace)
    if any(
        is_worth(item)
        for trace in traces
        for part in trace.parts
        for item in find_groups(list(part))
    ):
        return ""
    return traces[0].reason or traces[1].reason or "nothing in its forward has a fused form"


def in_both_modes(module: nn.Module, make) -> list:
    """[make(module)] in training and in evaluation mode; the mode is put back."""
    was, made = module.training, []
    try:
        for mode in (True, False):
            module.training = mode
            made.append(make(module))
    finally:
        module.training = was
    return made
