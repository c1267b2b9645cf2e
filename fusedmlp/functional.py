"""The public functions: arguments are checked, defaults resolved and the backend chosen here.

Same values as the PyTorch functions that each docstring names, with this package's dropout mask.
Everything below this file takes ids, numbers and a backend's name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import compat, context, ops
from .autograd.cross_entropy import cross_entropy  # noqa: F401
from .autograd.linear_act import BiasActDropout, LinearAct
from .backends import choice, composite, registry
from .spec import activations, checks, dtypes, philox
from .spec.layers import Epilogue

_NONE = activations.NONE


class dropout_state:
    """A context in which all dropout masks are drawn from a given state.

    seed        int64 number, or an int64 tensor (seed, stream) on the device of the data, which the
                caller may advance in place between steps: no recompilation, no synchronisation
    stream      int64 number, only with a number as seed
    row_offset  index of the first row of this process's part of the batch (data parallel)
    raises      TypeError, ValueError for what is out of range

    Layer i of a module draws from stream + i. Two modules, or two calls of one module, inside one
    context have equal masks; a backward pass that recomputes (activation checkpointing) belongs
    inside it too. A new thread starts outside of it, an asyncio task where the code is that made
    it.
    """

    def __init__(self, seed: int | Tensor, stream: int = 0, row_offset: int = 0):
        op = "dropout_state"
        if isinstance(seed, torch.Tensor):
            if stream != 0:
                raise ValueError(f"{op}: stream must be 0 beside a state tensor, got {stream}")
            self._numbers, self._state = None, checks.state(op, seed)
        else:
            self._numbers = checks.int64(op, "seed", seed), checks.int64(op, "stream", stream)
            self._state = None
        self._row_offset = checks.row_range(op, 0, 0, row_offset)

    def __enter__(self) -> dropout_state:
        now = context.now()
        context.enter(context.Settings(now.backend, (*now.scopes, self)))
        return self

    def __exit__(self, *exc: object) -> None:
        now = context.now()
        context.leave(context.Settings(now.backend, now.scopes[:-1]))

    def on(self, device: torch.device) -> tuple[Tensor, int]:
        """(state, row_offset) for what is computed on a device."""
        state = self._state
        if state is None or state.device != device:
            if self._numbers is not None:
                state = philox.state_of(*self._numbers, device)
            elif state.device.type == "cpu":
                state = state.to(device)
            else:
                checks.state("dropout_state", state, device)
            self._state = state
        return state, self._row_offset


def draw_state(like: Tensor) -> tuple[Tensor, int]:
    """(state, row_offset) for one call: of the `dropout_state` around, else a fresh seed."""
    scopes = context.now().scopes
    return scopes[-1].on(like.device) if scopes else (fresh_state(like), 0)


def fresh_state(like: Tensor, traced: bool = True) -> Tensor:
    """A state from torch's generator of the device.

    traced  False where the caller knows that nothing traces or transforms the call
    """
    if traced and compat.in_functorch():
        # vmap has a rule for randint and obeys its `randomness` argument there.
        high = torch.iinfo(torch.int64).max
        return torch.randint(high, (2,), dtype=torch.int64, device=like.device)
    if traced and torch.compiler.is_compiling():
        return ops.draw_seed(like)
    # Outside of a graph the registered op would only add its dispatch, 6 us.
    return ops.draw_seed_eager(like)


def _call_state(op: str, like: Tensor, seed, stream, row_offset) -> tuple[Tensor, int, int]:
    """(state, stream_offset, row_offset) for one functional call that drops."""
    stream = checks.int64(op, "stream", stream)
    if seed is None:
        state, offset = draw_state(like)
        return state, stream, row_offset + offset
    seed = checks.int64(op, "seed", seed)
    return philox.state_of(seed, stream, like.device), 0, row_offset


# Other subclasses of Tensor (DTensor, ExpandedWeight, quantised weights) bring functions of their
# own, which know PyTorch's operators and not ours.
TENSORS = frozenset({Tensor, torch.nn.Parameter, compat.FakeTensor, compat.FunctionalTensor})


def is_foreign(*tensors: Tensor | None) -> bool:
    """True if one of them is a tensor of another class than TENSORS."""
    for t in tensors:
        if t is not None and type(t) not in TENSORS and isinstance(t, Tensor):
            return True
    return False


def foreign_backend(op: str, backend: str | None) -> str:
    """The backend for tensors that are foreign: PyTorch's operators."""
    return _only_eager(op, backend, "of subclasses of torch.Tensor only 'reference' runs")


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def run_linear_act(x: Tensor, w: Tensor, e: Epilogue, backend: str | None) -> Tensor:
    """linear_act whose numbers are checked and the state drawn; `nn` and `fusion` come in here.

    Casts under autocast, checks the tensors, then chooses the backend. Shapes as in linear_act.
    """
    op = "linear_act"
    if not isinstance(x, torch.Tensor):
        checks.tensor(op, "input", x)
    device_type = x.device.type
    cast = dtypes.autocast_dtype(device_type)
    if cast is not None:
        x, w, b, slope = dtypes.autocast_to(cast, x, w, e.bias, e.slope)
        e = e._replace(bias=b, slope=slope)
    if is_foreign(x, w, e.bias, e.slope):
        return linear_act_on(foreign_backend(op, backend), x, w, e)
    checks.linear(op, x, w, e.bias)
    n, k = w.shape
    rows, drops = checks.rows(x), e.threshold != 0
    if drops:
        checks.row_range(op, rows, n, e.row_offset)
    chosen = choice.select(op, device_type, x.dtype, e.act, drops, rows, k, n, backend)
    if compat.is_transformed():
        chosen = _functorch_backend(op, backend)
    if cast is not None:
        with torch.autocast(device_type, enabled=False):
            return linear_act_on(chosen, x, w, e)
    return linear_act_on(chosen, x, w, e)


def linear_act_on(backend: str, x: Tensor, w: Tensor, e: Epilogue, route: str = "layers") -> Tensor:
    """linear_act on a backend and a route that choice.py has chosen."""
    if backend == registry.EAGER:
        return composite.linear_act(x, w, e)
    if route == "epilogue":
        return bias_act_dropout_on(backend, F.linear(x, w), e)
    if _needs_grad(x, w, e.bias, e.slope):
        return LinearAct.apply(x, w, e.bias, e.slope, e.state, backend, *e.numbers)
    return ops.BY_BACKEND[backend].linear_act_infer(x, w, *e)


def run_bias_act_dropout(x: Tensor, e: Epilogue, backend: str | None) -> Tensor:
    """bias_act_dropout on checked arguments. Under autocast it stays in x's dtype, as F.relu."""
    op = "bias_act_dropout"
    if is_foreign(x, e.bias, e.slope):
        return bias_act_dropout_on(foreign_backend(op, backend), x, e)
    columns = x.shape[-1] if x.dim() else 1
    rows, drops = checks.rows(x), e.threshold != 0
    if drops:
        checks.row_range(op, rows, columns, e.row_offset)
    chosen = choice.select(op, x.device.type, x.dtype, e.act, drops, rows, 0, columns, backend)
    if compat.is_transformed():
        chosen = _functorch_backend(op, backend)
    return bias_act_dropout_on(chosen, x, e)


def bias_act_dropout_on(backend: str, x: Tensor, e: Epilogue) -> Tensor:
    """bias_act_dropout on a backend that choice.select has chosen."""
    if backend == registry.EAGER:
        return composite.bias_act_dropout(x, e)
    if _needs_grad(x, e.bias, e.slope):
        return BiasActDropout.apply(x, e.bias, e.slope, e.state, backend, *e.numbers)
    return ops.BY_BACKEND[backend].bias_act_dropout_fwd(x, *e)


def _functorch_backend(op: str, backend: str | None) -> str:
    """Transforms need a composition of functions that PyTorch can transform."""
    where = "inside torch.func transforms (vmap, grad, ...) and forward mode only 'reference' runs"
    return _only_eager(op, backend, where)


def _only_eager(op: str, backend: str | None, why: str) -> str:
    named = registry.explicit(backend)
    if named in (None, "reference"):
        return registry.EAGER
    raise registry.BackendError(
        f"{op}: backend {named!r} was asked for but cannot be used:\n    {why}"
    )


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    slope: float | Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: int | None = None,
    stream: int = 0,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Dropout of an activation of a linear map, in one differentiable call.

    Same values as F.dropout(activation(F.linear(input, weight, bias)), p, training) with this
    package's mask (philox.py), where a dropped element is +0 whatever it was.

    input       (..., K)  fp32, fp16 or bf16 (fp64 on the reference backend)
    weight      (N, K)    dtype and device of input
    bias        (N,)      dtype of input or fp32, or None
    activation  a name of activations.NAMES
    slope       a number for leaky_relu (0.01), a tensor of 1 or N elements for prelu
    p           probability of dropping, a number in [0, 1] (a tensor without dimensions is one);
                nothing is dropped unless `training`
    seed        int64; None draws one from torch's generator of the device, or takes the state of
                `dropout_state`
    stream      int64, added to the stream of the state
    row_offset  added to the row index in the mask; row is the flattened leading index
    backend     'native', 'triton', 'reference' or None for automatic choice
    returns     (..., N)  dtype of input
    raises      ValueError, TypeError for arguments; BackendError for a backend that cannot run it
    """
    if has_torch_function_variadic(input, weight, bias, slope):
        return handle_torch_function(
            linear_act, (input, weight, bias, slope), input, weight, bias, activation,
            slope=slope, p=p, training=training,
            seed=seed, stream=stream, row_offset=row_offset, backend=backend,
        )  # fmt: skip
    op = "linear_act"
    act = checks.activation(op, activation)
    if act == activations.PRELU or slope is not None:
        checks.tensor(op, "weight", weight)
        columns = weight.shape[0] if weight.dim() else 0
        alpha, slope = checks.slope(op, act, slope, columns)
    else:
        alpha = checks.DEFAULT_LEAKY_SLOPE
    threshold, scale, state, stream_offset = 0, 1.0, None, 0
    p = checks.probability(op, p)
    row_offset = checks.row_range(op, 0, 0, row_offset)
    if training and p > 0:
        checks.tensor(op, "input", input)
        threshold, scale = philox.threshold_and_scale(p)
        state, stream_offset, row_offset = _call_state(op, input, seed, stream, row_offset)
    if slope is not None:
        checks.tensor(op, "input", input)
        checks.same_device(op, "slope", slope, input)
        checks.vector_dtype(op, "slope", slope, input)
    drop = threshold, scale, stream_offset, row_offset
    return run_linear_act(input, weight, Epilogue(bias, slope, state, act, alpha, *drop), backend)


def bias_act_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    slope: float | Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: int | None = None,
    stream: int = 0,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Dropout of an activation of input + bias, in one differentiable call and one pass.

    Same values as F.dropout(activation(input + bias), p, training) with this package's mask.

    input    (..., N)  fp32, fp16 or bf16 (fp64 on the reference backend)
    bias     (N,)      dtype of input or fp32, or None
    returns  (..., N)  contiguous, dtype of input

    The other arguments and the errors are those of `linear_act`.
    """
    if has_torch_function_variadic(input, bias, slope):
        return handle_torch_function(
            bias_act_dropout, (input, bias, slope), input, bias, activation,
            slope=slope, p=p, training=training,
            seed=seed, stream=stream, row_offset=row_offset, backend=backend,
        )  # fmt: skip
    op = "bias_act_dropout"
    act = checks.activation(op, activation)
    checks.elementwise(op, input, bias)
    columns = input.shape[-1] if input.dim() else 1
    alpha, slope = checks.slope(op, act, slope, columns)
    if slope is not None:
        checks.same_device(op, "slope", slope, input)
        checks.vector_dtype(op, "slope", slope, input)
    threshold, scale, state, stream_offset = 0, 1.0, None, 0
    p = checks.probability(op, p)
    row_offset = checks.row_range(op, 0, 0, row_offset)
    if training and p > 0:
        threshold, scale = philox.threshold_and_scale(p)
        state, stream_offset, row_offset = _call_state(op, input, seed, stream, row_offset)
    drop = threshold, scale, stream_offset, row_offset
    return run_bias_act_dropout(input, Epilogue(bias, slope, state, act, alpha, *drop), backend)


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | None = None,
    stream: int = 0,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """F.dropout with this package's mask; nothing but the seed is kept for backward.

    input    (..., N)
    returns  (..., N)  input itself when nothing can be dropped, as F.dropout's values

    The other arguments and the errors are those of `linear_act`.
    """
    if has_torch_function_variadic(input):
        return handle_torch_function(
            dropout, (input,), input, p, training,
            seed=seed, stream=stream, row_offset=row_offset, backend=backend,
        )  # fmt: skip
    op = "dropout"
    checks.tensor(op, "input", input)
    p = checks.probability(op, p)
    row_offset = checks.row_range(op, 0, 0, row_offset)
    if not training or p == 0:
        return input
    threshold, scale = philox.threshold_and_scale(p)
    state, stream_offset, row_offset = _call_state(op, input, seed, stream, row_offset)
    drop = threshold, scale, stream_offset, row_offset
    return run_bias_act_dropout(input, Epilogue(None, None, state, _NONE, 0.0, *drop), backend)
