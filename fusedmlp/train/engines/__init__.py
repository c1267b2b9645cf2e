"""Engines: how a training step is run. One interface; `choose` picks, `explain` says why.

An engine is made from a Task and has
    name                 as in --engine
    automatic            whether `auto` may take it; a GPU's `graph`, where it was measured
    reasons_against(task)  why it cannot run this task, empty where it can (static)
    step(indices)        one step on these rows of the task's data; waits for nothing
    steps(order, batch)  one step for each slice of `batch` rows of order; an engine that runs many
                         steps in one call does it here
    step_on(x, y)        one step on what a loader gives, of engines that take one
    set_step(number)     the global step that comes next: it decides masks and learning rates
    read()               (sum of losses, number right, rows) since the last read; waits for them
    evaluate(x, y)       (sum of losses, number right, rows) over rows that are not trained on, in
                         evaluation mode; None where the model itself has to be run
    sync()               before the optimizer's state is kept: its rates without the schedule;
                         parameters and the rest of it are the task's own all the time
    scaler_state(), load_scaler_state(state)   of fp16's loss scale, None without one
Every engine gives the trajectory of plain PyTorch with the same masks.
"""

from collections.abc import Iterable

from ..errors import TrainError
from ..task import Task
from . import tuned
from .autograd import Autograd
from .graph import Graph
from .native import Native

ENGINES = (Native, Graph, Autograd)  # fastest first


def _is_candidate(engine, name: str, task: Task, batch: int | None) -> bool:
    if name != "auto":
        return engine.name == name
    return engine.automatic or (engine is Graph and tuned.is_graph_faster(task, batch))


def choose(name: str, task: Task, batch: int | None = None):
    """The engine of this name, or for auto the first that can run the task.

    batch   rows of a step; what was measured on a GPU belongs to it
    raises  TrainError with the reasons where there is none
    """
    reasons = {engine.name: engine.reasons_against(task) for engine in ENGINES}
    for engine in ENGINES:
        if _is_candidate(engine, name, task, batch) and not reasons[engine.name]:
            return engine(task)
    asked = [r for n, found in reasons.items() if name in ("auto", n) for r in found]
    if not asked:
        raise TrainError(f"unknown engine {name!r}; known: auto, {', '.join(reasons)}")
    raise TrainError(f"engine {name!r} was asked for but cannot be used: {'; '.join(asked)}")


def explain(name: str, task: Task, batch: int | None = None) -> Iterable[str]:
    """One line an engine, in the order of choice: taken, or why not."""
    is_taken = False
    for engine in ENGINES:
        reasons = engine.reasons_against(task)
        is_candidate = _is_candidate(engine, name, task, batch)
        if reasons:
            yield f"{engine.name}: {'; '.join(reasons)}"
        elif is_candidate and not is_taken:
            is_taken = True
            yield f"{engine.name}: taken" + ("" if name == "auto" else ", asked for by name")
        elif name == "auto" and not is_candidate:
            yield (
                f"{engine.name}: only when asked for by name, or where the start of a training has "
                "found it right and faster than autograd"
            )
        else:
            yield f"{engine.name}: can run it"
