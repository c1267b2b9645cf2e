"""Memory that runs out at the n-th allocation: of the C++ code and its tensors, and of Python. The
call must raise an ordinary error, and the next one must give the right bits."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fusedmlp
from fusedmlp.backends import native
from fusedmlp.functional import bias_act_dropout, linear_act
from fusedmlp.train import RunOptions, TrainConfig, build, fit, plots
from fusedmlp.train.data import datasets

from . import child, inject, runs

ORDINARY = (MemoryError, RuntimeError)
# CPython's own C code at times loses the MemoryError on its way, as in ast.parse.
OF_PYTHON = (*ORDINARY, SystemError)


def _gradients(call: Callable, *inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = call(*inputs)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]


def _made(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _op() -> list[torch.Tensor]:
    x, w, b = _made(33, 20), _made(17, 20), _made(17)
    more = {"activation": "gelu", "p": 0.3, "seed": 5, "backend": "native"}
    return _gradients(lambda x, w, b: linear_act(x, w, b, **more), x, w, b)


def _elementwise() -> list[torch.Tensor]:
    more = {"activation": "tanh", "p": 0.3, "seed": 5, "backend": "native"}
    return _gradients(lambda x, b: bias_act_dropout(x, b, **more), _made(33, 17), _made(17))


def _network() -> list[torch.Tensor]:
    torch.manual_seed(0)
    net = fusedmlp.FusedMLP(20, [24, 16], 4, activation="silu", dropout=0.2)
    with fusedmlp.use_backend("native"), fusedmlp.dropout_state(seed=3):
        y = net(_made(50, 20))
        grads = torch.autograd.grad(y.square().sum(), list(net.parameters()))
    return [y.detach(), *grads]


def _training(place: Path) -> list[torch.Tensor]:
    """Two epochs in the native engine, tested after each, into a run folder."""
    config = TrainConfig(
        dataset=str(place / "data.npz"), hidden=(16, 12), dropout=(0.2,), epochs=2, batch_size=64,
        device="cpu", optimizer="adam", lr=0.01, engine="native",
    )  # fmt: skip
    plots.run_pictures = lambda *_: {}  # these take far longer than the training
    data = datasets.load(config)
    net = build.build_network(config, data)
    options = RunOptions(out=place / "run", overwrite=True)
    history = fit(net, data, config, options).history
    losses = [row[name] for row in history for name in ("train_loss", "test_loss")]
    return [*(p.detach() for p in net.parameters()), torch.tensor(losses)]


def _works(place: Path) -> dict[str, Callable[[], list[torch.Tensor]]]:
    return {
        "linear_act": _op,
        "bias_act_dropout": _elementwise,
        "mlp": _network,
        "training": lambda: _training(place),
    }


def _bits(found: list[torch.Tensor]) -> list[bytes]:
    return [x.contiguous().numpy().tobytes() for x in found]


def _outcome(work: Callable, fault, place: Path, ordinary: tuple = ORDINARY):
    """(what is wrong, what was raised, how often something was allocated) of the work with a fault
    and of the work after it."""
    shutil.rmtree(place / "run", ignore_errors=True)
    raised = counted = None
    try:
        with fault as counted:
            work()
    except ordinary as error:
        raised = f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}", None, None, None
    left = runs.unfinished(place / "run") if (place / "run").exists() else []
    wrong = f"left behind: {', '.join(left)}" if left else None
    return wrong, raised, getattr(counted, "number", None), _bits(work())


def native_allocations(place: Path, dice: random.Random, count: int) -> Iterator[str | None]:
    """Each allocation of the extension's code and of tensors in turn."""
    runs.make_data(place)
    library = native.library("cpu")
    works, wanted, cases = _works(place), {}, []

    def faulty(name: str, n: int):
        assert native.unavailable("cpu") is None, native.unavailable("cpu")
        return _outcome(works[name], inject.memory(n, library), place)

    for name in works:
        whole = child.run(lambda: faulty(name, inject.NEVER), place)  # noqa: B023
        if whole.result is None or whole.result[0] or whole.result[1]:
            raise RuntimeError(f"faults: {name} without a fault has failed: {whole}")
        _, _, number, wanted[name] = whole.result
        cases += [(name, n, number) for n in range(1, number + 1)]
    for name, n, number in dice.sample(cases, min(count, len(cases))):
        ended = child.run(lambda: faulty(name, n), place)  # noqa: B023
        yield _judged(f"{name}, allocation {n} of {number}", ended, wanted[name])


def python_allocations(place: Path, dice: random.Random, count: int) -> Iterator[str | None]:
    """Allocations of Python's own memory, at random places of a training."""
    import _testcapi

    runs.make_data(place)

    class Fault:
        def __init__(self, n: int):
            self.n = n

        def __enter__(self):
            _testcapi.set_nomemory(self.n, self.n + 1)

        def __exit__(self, *_):
            _testcapi.remove_mem_hooks()

    def faulty(n: int):
        assert native.unavailable("cpu") is None, native.unavailable("cpu")
        return _outcome(lambda: _training(place), Fault(n), place, OF_PYTHON)

    whole = child.run(lambda: faulty(1 << 30), place, child.HANGS)
    wanted = whole.result[3]
    for _ in range(count):
        n = int(10 ** dice.uniform(0, 5.5))
        yield _judged(
            f"Python's allocation {n}", child.run(lambda n=n: faulty(n), place, child.HANGS), wanted
        )


def _judged(which: str, ended: child.Ended, wanted: list[bytes]) -> str | None:
    wrong = ended.crash() or ended.error
    if not wrong:
        wrong, _, _, found = ended.result
        if not wrong and found != wanted:
            wrong = "the call after it has other bits"
    said = ended.said.partition("Extension modules")[0].strip()  # a crash names all behind it
    return wrong and f"{which}: {wrong}: {said[-1000:]}"
