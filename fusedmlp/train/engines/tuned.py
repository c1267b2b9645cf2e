"""What was measured on a GPU for a training: the ways of its network, and the engine `graph`
beside `autograd`. Measured at the start of a training that was not, in a process of its own."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch

from ...backends import measured
from ...backends.registry import BackendError
from ...nn import FusedMLP
from ...spec import activations
from ...trial import worker
from ...tuning import first_call, measure
from ...tuning.work import Work
from ..data.scaling import Scaling
from ..task import Task
from .plain_layers import layers_of

_DTYPES = {"bf16": "bf16", "fp16": "fp16"}
_PREFIX = "engine, "  # of the rows of engines in the table
_BATCHES = 8  # in the rows that are trained on
_STEPS = 16
# Of the largest change of a parameter in two steps: far above rounding, far below a mistake.
_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}


def work_of(task: Task, batch: int) -> Work | None:
    """The network of a task as it is trained, None where it is not one of plain layers."""
    layers, reasons = layers_of(task.model)
    if reasons or not layers or task.precision == "tf32":
        return None
    named = tuple(
        (
            activations.NAMES[layer.act],
            layer.dropout is not None and layer.dropout.p > 0,
            layer.linear.out_features,
        )
        for layer in layers
    )
    dtype = _DTYPES.get(task.precision, "fp32")
    first = layers[0].linear.in_features
    return Work(task.device.type, dtype, batch, first, named, True)


def is_graph_faster(task: Task, batch: int | None) -> bool:
    """Whether the engine `graph` was found to be right and faster for networks of this size."""
    work = None if batch is None else work_of(task, batch)
    if work is None:
        return False
    row = measured.own(task.device.type).get("calls", {}).get(_PREFIX + work.key)
    times = {} if row is None else row["times"]
    return "graph" in times and times["graph"] * 1.03 <= times["eager"]


def at_start(task: Task, batch: int, say: Callable[[str], None]) -> None:
    """Measure what is not known of this training on its GPU, and keep it: a few seconds."""
    if task.device.type != "cuda" or task.world.size > 1 or not first_call.is_allowed("cuda"):
        return
    work = work_of(task, batch)
    if work is None:
        return
    started, wrong = time.perf_counter(), 0
    known = measured.own("cuda").get("calls", {})
    try:
        # Autocast casts each layer by itself.
        ways = [work] if work.dtype == "fp32" else _each_layer(work)
        for one, result in measure.measure(w for w in ways if w.key not in known):
            measure.keep(one, result)
            wrong += _say_bugs(one, result, say)
        if _PREFIX + work.key not in known and work.dtype != "fp16":
            for one, result in measure.measure([work], module=__name__):
                row = {"times": result["times"], "wrong": result["wrong"]}
                measured.keep("cuda", "calls", _PREFIX + one.key, row)
                wrong += _say_bugs(one, result, say)
    except (BackendError, OSError) as error:
        say(f"this GPU could not be measured for this network, so plain PyTorch is used: {error}")
        return
    seconds = time.perf_counter() - started
    if seconds > 0.5:
        say(
            f"this GPU was measured for this network in {seconds:.0f} s, kept in "
            f"{measured.path()} (--tune off skips it)"
        )


def _each_layer(work: Work) -> list[Work]:
    found, k = [], work.in_features
    for layer in work.layers:
        act, drops, n = layer
        if act != "none" or drops:
            rest = work.device, work.dtype, work.rows, k, (layer,), True
            found.append(Work(*rest))
        k = n
    return found


def _say_bugs(work: Work, result: dict, say: Callable[[str], None]) -> int:
    lines = measure.bugs(work, result)
    for line in lines:
        say(line)
    return len(lines)


def _engines(work: Work) -> dict:
    """'eager' (the engine `autograd`) and 'graph', each trained by a network of the same weights
    on the same made-up rows."""
    from .autograd import Autograd
    from .graph import Graph

    torch.manual_seed(0)
    device = torch.device(work.device)
    hidden = [n for _, _, n in work.layers[:-1]]
    act = work.layers[0][0] if hidden else "none"
    ps = [0.5 * drops for _, drops, _ in work.layers[:-1]]
    classes = work.layers[-1][2]
    rest = {"activation": act, "dropout": ps if any(ps) else 0.0}
    net = FusedMLP(work.in_features, hidden, classes, **rest).to(device)
    x = torch.randn(_BATCHES * work.rows, work.in_features, device=device)
    y = torch.randint(classes, (len(x),), device=device)
    made = {}
    for name, kind in (("eager", Autograd), ("graph", Graph)):
        own = copy.deepcopy(net).train()
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        task = Task(own, optimizer, "cross_entropy", device, x, y, Scaling())
        task.precision = work.dtype
        reasons = kind.reasons_against(task)
        if not reasons:
            made[name] = kind(task)
            made[name].set_step(0)
    return made


def judge(work: Work, seconds: float, without: list[str], tell: Callable[..., None]) -> dict:
    """Compare the engines, as worker.judge does candidates; times are those of a step."""
    tell(doing="eager")
    made = _engines(work)
    order = torch.arange(_STEPS * work.rows, device=work.device) % (_BATCHES * work.rows)
    reasons: dict[str, str] = {}
    before = [p.detach().clone() for p in made["eager"].task.model.parameters()]
    made["eager"].steps(order[: 2 * work.rows], work.rows)
    for name in [n for n in made if n != "eager"]:
        tell(doing=name)
        reason = "it is not tried again" if name in without else None
        try:
            if reason is None:
                made[name].steps(order[: 2 * work.rows], work.rows)
                reason = _wrong(work, made[name], made["eager"], before)
        except Exception as error:  # an engine that raises is a finding
            reason = f"it raises {type(error).__name__}: {str(error).splitlines()[0]}"
        if reason is not None:
            made.pop(name)
            if name not in without:
                reasons[name] = reason
    tell(doing="timing")
    calls = {n: lambda e=e: e.steps(order, work.rows) for n, e in made.items()}
    return worker.row(worker.timed(work.device, calls, seconds), reasons, _STEPS)


def _wrong(work: Work, engine, plain, before: list) -> str | None:
    pairs = zip(engine.task.model.parameters(), plain.task.model.parameters(), before, strict=True)
    for i, (got, wanted, was) in enumerate(pairs):
        change = (wanted - was).abs().max().item()
        off = (got - wanted).abs().max().item()
        if not off <= _TOLERANCE[work.dtype] * change + 1e-7:
            return (
                f"parameter {i} is off by {off:.3g} after two steps that change it by {change:.3g}"
            )
    return None
