"""The registered operators: torch.ops.fusedmlp.<op>.<backend>, one overload for each backend.

The overloads of one op share schema, fake kernel and meaning. `reference` and `triton` are
implemented by the Python functions of backends/<backend>; the compiled extension registers
`native` itself, so that such a call goes through no Python. None has an autograd key: autograd/
stands outside. Ops take ids and numbers; functional.py is where names and defaults are resolved.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch
from torch import Tensor

from . import flops
from .backends import registry
from .spec import activations, checks, dtypes, layers
from .spec.activations import SAVE_NOTHING, SAVE_PREACT, SAVE_Y
from .spec.layers import Epilogue

_EPILOGUE = (
    "Tensor? b, Tensor? slope, Tensor? state, int act, float alpha, "
    "int threshold, float scale, int stream_offset, int row_offset"
)
SCHEMAS = {
    "linear_act_fwd": f"(Tensor x, Tensor w, {_EPILOGUE}) -> (Tensor y, Tensor preact)",
    "linear_act_infer": f"(Tensor x, Tensor w, {_EPILOGUE}) -> Tensor",
    "bias_act_dropout_fwd": f"(Tensor x, {_EPILOGUE}) -> Tensor",
    "bias_act_dropout_bwd": (
        f"(Tensor dy, Tensor? saved, {_EPILOGUE}, int saves, bool need_db, bool need_dslope)"
        " -> (Tensor dz, Tensor db, Tensor dslope)"
    ),
    # A whole network, in the flat form of spec/layers.py. Forward gives the y of each layer, then
    # x w^T of those whose z backward reads, or the last y alone; backward dx, then the gradient of
    # each of the params, of no elements where it is not needed.
    "mlp_fwd": (
        "(Tensor x, Tensor[] params, Tensor? state, int[] ints, float[] numbers, int row_offset, "
        "bool keep) -> Tensor[]"
    ),
    "mlp_bwd": (
        "(Tensor dy, Tensor x, Tensor[] params, Tensor? state, Tensor[] ys, Tensor[] preacts, "
        "int[] ints, float[] numbers, int row_offset, int[] needs, bool need_dx) -> Tensor[]"
    ),
    "cross_entropy": (
        "(Tensor logits, Tensor target, float label_smoothing, int ignore_index, "
        "float grad_scale) -> (Tensor losses, Tensor dlogits)"
    ),
}

_lib = torch.library.Library("fusedmlp", "DEF")


def _check_linear_act(x: Tensor, w: Tensor, e: Epilogue) -> None:
    checks.linear("linear_act", x, w, e.bias)
    checks.epilogue("linear_act", x, w.shape[0], e)


def _check_fwd(x: Tensor, e: Epilogue) -> None:
    checks.elementwise("bias_act_dropout", x, e.bias)
    checks.epilogue("bias_act_dropout", x, x.shape[-1] if x.dim() else 1, e)


def _check_bwd(dy, saved, e: Epilogue, saves: int, need_db: bool, need_dslope: bool) -> None:
    _check_fwd(dy, e)
    op = "bias_act_dropout"
    if saves not in (SAVE_NOTHING, SAVE_Y, SAVE_PREACT):
        raise ValueError(f"{op}: saves must be 0, 1 or 2, got {saves}")
    if e.act != activations.NONE:
        if not activations.can_read(e.act, e.alpha, saves):
            name = activations.NAMES[e.act]
            raise ValueError(
                f"{op}: saves must be one that {name} can be differentiated from, got {saves}"
            )
        if saved is None or saved.shape != dy.shape:
            got = "None" if saved is None else tuple(saved.shape)
            raise ValueError(f"{op}: saved must be {tuple(dy.shape)} like dy, got {got}")
        if saved.dtype != dy.dtype:
            raise TypeError(f"{op}: saved must be {dy.dtype} like dy, got {saved.dtype}")
        checks.same_device(op, "saved", saved, dy)
    if need_db and e.bias is None:
        raise ValueError(f"{op}: bias must be given where its gradient is asked for, got None")
    if need_dslope and e.act != activations.PRELU:
        name = activations.NAMES[e.act]
        raise ValueError(
            f"{op}: slope must be of prelu where its gradient is asked for, got {name}"
        )


def _fake_linear_act_fwd(x, w, e):
    shape = (*x.shape[:-1], w.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


def _fake_linear_act_infer(x, w, e):
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _fake_fwd(x, e):
    return x.new_empty(x.shape)


def _fake_bwd(dy, saved, e, saves, need_db, need_dslope):
    db = e.bias.new_empty(e.bias.shape) if need_db else dy.new_empty(0)
    dslope = e.slope.new_empty(e.slope.shape) if need_dslope else dy.new_empty(0)
    return dy.new_empty(dy.shape), db, dslope


def _check_mlp_fwd(x, params, state, ints, numbers, row_offset, keep=True):
    op, count = "mlp", len(ints) // layers.INTS
    known = all(bits & layers.W and 0 <= bits < 8 for bits in layers.bits_of(ints))
    if (
        not known
        or count == 0
        or len(params) != layers.count_params(ints)
        or ((len(ints), len(numbers)) != (layers.INTS * count, layers.NUMBERS * count))
    ):
        raise ValueError(
            f"{op}: {layers.INTS} ints, {layers.NUMBERS} floats and the tensors that they name "
            f"must be given for each layer, got {len(ints)}, {len(numbers)} and {len(params)}"
        )
    like = x
    for i, (w, e) in enumerate(layers.unpack(params, ints, numbers, state, row_offset)):
        if e.slope is not None and e.act != activations.PRELU:
            raise ValueError(f"{op}: a slope must be of prelu, got act {e.act} in layer {i}")
        columns = w.shape[0] if w.dim() else 0
        checks.linear(op, like, w, e.bias)
        checks.epilogue(op, x, columns, e)
        like = x.new_empty((0, columns))


def _keeps_preact(x, params, ints, numbers) -> list[bool]:
    """Of each layer, whether backward reads its preactivation."""
    net = layers.unpack(params, ints, numbers, None, 0)
    return [e.saves(x.dtype) == SAVE_PREACT for _, e in net]


def _widths(params, ints, numbers) -> list[int]:
    return [w.shape[0] for w, _ in layers.unpack(params, ints, numbers, None, 0)]


def _check_mlp_bwd(
    dy, x, params, state, ys, preacts, ints, numbers, row_offset, needs=(), need_dx=True
):
    _check_mlp_fwd(x, params, state, ints, numbers, row_offset)
    op, count = "mlp", len(ints) // layers.INTS
    kept = sum(_keeps_preact(x, params, ints, numbers))
    if (len(ys), len(preacts), len(needs)) != (count, kept, count):
        raise ValueError(
            f"{op}: ys, preacts and needs must have {count}, {kept} and {count} entries, "
            f"got {len(ys)}, {len(preacts)} and {len(needs)}"
        )
    wanted = (*x.shape[:-1], _widths(params, ints, numbers)[-1])
    if dy.shape != wanted:
        raise ValueError(f"{op}: dy must be {tuple(wanted)} like the output, got {tuple(dy.shape)}")


def _fake_mlp_fwd(x, params, state, ints, numbers, row_offset, keep):
    widths = _widths(params, ints, numbers)
    ys = [x.new_empty((*x.shape[:-1], n)) for n in widths]
    kept = zip(widths, _keeps_preact(x, params, ints, numbers), strict=True)
    preacts = [x.new_empty((*x.shape[:-1], n)) for n, keeps in kept if keeps]
    return ys + preacts if keep else ys[-1:]


def _fake_mlp_bwd(dy, x, params, state, ys, preacts, ints, numbers, row_offset, needs, need_dx):
    wanted = layers.needed(ints, needs)
    grads = [t.new_empty(t.shape if wants else 0) for t, wants in zip(params, wanted, strict=True)]
    return [x.new_empty(x.shape if need_dx else 0), *grads]


def _check_cross_entropy(logits, target, label_smoothing, ignore_index, grad_scale):
    op = "cross_entropy"
    checks.class_targets(op, logits, target)
    checks.probability(op, label_smoothing, "label_smoothing")


def _fake_cross_entropy(logits, target, *rest):
    losses = logits.new_empty(logits.shape[0], dtype=dtypes.compute(logits.dtype))
    return losses, logits.new_empty(logits.shape)


_CHECKS_AND_FAKES = {
    "linear_act_fwd": (_check_linear_act, _fake_linear_act_fwd),
    "linear_act_infer": (_check_linear_act, _fake_linear_act_infer),
    "bias_act_dropout_fwd": (_check_fwd, _fake_fwd),
    "bias_act_dropout_bwd": (_check_bwd, _fake_bwd),
    "mlp_fwd": (_check_mlp_fwd, _fake_mlp_fwd),
    "mlp_bwd": (_check_mlp_bwd, _fake_mlp_bwd),
    "cross_entropy": (_check_cross_entropy, _fake_cross_entropy),
}


# Where the nine values of an Epilogue begin in the arguments of an op.
_EPILOGUE_AT = {
    "linear_act_fwd": 2,
    "linear_act_infer": 2,
    "bias_act_dropout_fwd": 1,
    "bias_act_dropout_bwd": 2,
}


def _with_epilogue(op: str, function):
    """A function that takes an Epilogue, as one that takes the flat arguments of an op."""
    at = _EPILOGUE_AT.get(op)
    if at is None:
        return function
    end = at + len(Epilogue._fields)

    def flat(*args):
        return function(*args[:at], Epilogue(*args[at:end]), *args[end:])

    return flat


def _python_kernel(op: str, backend: str):
    """The implementation of an overload whose backend is written in Python, imported when called.

    Checked here too, so that an op called directly is refused with the same words.
    """
    check, _ = _CHECKS_AND_FAKES[op]
    loaded = []

    def kernel(*args):
        if not loaded:
            loaded.append(getattr(importlib.import_module(f"fusedmlp.backends.{backend}"), op))
        check(*args)
        return loaded[0](*args)

    return _with_epilogue(op, kernel)


def _fake_kernel(op: str):
    """What an overload gives for tensors without data, after the checks."""
    check, fake = _CHECKS_AND_FAKES[op]

    def kernel(*args):
        check(*args)
        return fake(*args)

    return _with_epilogue(op, kernel)


def _native_not_loaded(op: str):
    """Runs `native` where the extension has not been opened yet: opens it, or says why it cannot.

    Once the extension has registered its kernels for a device, these come first.
    """
    tried: set[str] = set()

    def kernel(*args):
        name = op.removesuffix("_fwd").removesuffix("_infer").removesuffix("_bwd")
        for arg in args:
            for t in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(t, Tensor) and t.layout != torch.strided:
                    raise ValueError(f"{name}: tensors must be dense (strided), got {t.layout}")
        device_type = args[0].device.type
        registry.require("native", device_type, args[0].dtype, name)
        if device_type in tried:
            raise registry.BackendError(f"{name}: the extension has no {op} for {device_type!r}")
        tried.add(device_type)
        return getattr(torch.ops.fusedmlp, op).native(*args)

    return kernel


for _op, _schema in SCHEMAS.items():
    for _backend in registry.BACKENDS:
        _name = f"{_op}.{_backend.name}"
        _lib.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        _kernel = (
            _native_not_loaded(_op)
            if _backend.name == "native"
            else _python_kernel(_op, _backend.name)
        )
        _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusedmlp::{_name}", _fake_kernel(_op), lib=_lib)


def draw_seed_eager(like: Tensor) -> Tensor:
    """What draw_seed does: (2,) int64, a seed and a stream from torch's generator of the device."""
    # Both words are random: one kernel on a GPU, where filling the stream with 0 takes a second.
    return torch.empty(2, dtype=torch.int64, device=like.device).random_()


_lib.define(
    "draw_seed(Tensor like) -> Tensor",
    # Without this tag Inductor merges two draws, or replays one.
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_lib.impl("draw_seed", draw_seed_eager, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fusedmlp::draw_seed", lambda like: like.new_empty(2, dtype=torch.int64), lib=_lib
)
draw_seed = torch.ops.fusedmlp.draw_seed.default

# backend -> its overloads as attributes
BY_BACKEND = {
    b.name: SimpleNamespace(
        **{op: getattr(getattr(torch.ops.fusedmlp, op), b.name) for op in SCHEMAS}
    )
    for b in registry.BACKENDS
}

flops.register()
