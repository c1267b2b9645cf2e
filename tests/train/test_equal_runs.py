"""Equal runs give equal bits: metrics, evaluations and predictions, on one thread and on more than
there are cores, quiet and beside busy processes."""

from __future__ import annotations

import contextlib
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fusedmlp
from fusedmlp.train import RunOptions, build, crossval, fit
from fusedmlp.train.data.types import Data, Scaling
from fusedmlp.train.engines import native_evaluate
from fusedmlp.train.losses import loss_sums

from .. import made_data
from ..engines import OPTIMIZERS, config, engine_of, need_native, network

made_data.need("safetensors", "matplotlib", "sklearn")
need_native()

NETWORKS = {
    "one hidden layer": (64, 64, 10),
    "two": (64, 64, 64, 10),
    "four": (64, 64, 48, 96, 33, 10),
    "two wide": (64, 256, 256, 10),
}
TRAINED = NETWORKS | {"in two parts": (520, 64, 10)}
THREADS = (1, 2, (os.cpu_count() or 1) + 3)
LOADS = {"quiet": 0, "busy": 2}


@contextlib.contextmanager
def busy(processes: int):
    """That many others want the processor meanwhile."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.fixture(params=LOADS)
def each_way(request):
    """each_way(call, times): the results of equal calls with each number of threads."""

    def results(call, times: int = 1) -> list:
        before, found = torch.get_num_threads(), []
        try:
            for threads in THREADS:
                torch.set_num_threads(threads)
                found += [call() for _ in range(times)]
        finally:
            torch.set_num_threads(before)
        return found

    with busy(LOADS[request.param]):
        yield results


def made(rows: int, test_rows: int, features: int = 64) -> Data:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows + test_rows, features, generator=generator)
    y = torch.randint(0, 10, (len(x),), generator=generator)
    names = tuple(str(n) for n in range(10))
    return Data("made", x[:rows], y[:rows], x[rows:], y[rows:], classes=names)


def metrics(folder: Path) -> str:
    """metrics.csv but for the time that epochs took."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row.pop("seconds") for row in rows)
    return str(rows)


def run(sizes, folder: Path, epochs: int = 4) -> str:
    """The metrics of a run into that folder."""
    settings = config(engine="native", epochs=epochs, optimizer="adamw", lr=1e-3, batch_size=128)
    data = made(512, 2048, features=sizes[0])
    fit(network(sizes=sizes, dropout=0.1), data, settings, RunOptions(out=folder))
    return metrics(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_metrics_of_equal_runs(name, each_way, tmp_path):
    """Layers of different blocks of rows once shared memory: two hidden layers or more were tested
    with wrong results at random."""
    numbers = iter(range(100))
    found = each_way(lambda: run(TRAINED[name], tmp_path / str(next(numbers))), times=2)
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluations_of_one_network(name, each_way):
    data = made(16, 4000)
    engine = engine_of("native", network(sizes=NETWORKS[name]), data, OPTIMIZERS["sgd"])
    found = each_way(lambda: tuple(engine.evaluate(data.x_test, data.y_test).tolist()), times=20)
    assert len(set(found)) == 1
    wanted = loss_sums(
        "cross_entropy", build.predict(engine.task.model, data.x_test, Scaling()), data.y_test
    )
    torch.testing.assert_close(torch.tensor(found[0]).double(), wanted, rtol=1e-5, atol=0)


def test_evaluations_and_predictions_of_many_networks(each_way):
    data = made(16, 1500)
    nets = [network(sizes=sizes, seed=n) for n, sizes in enumerate(NETWORKS.values())]
    rows = [(torch.arange(n, 1500), torch.arange(0, 1500, 2)) for n in range(len(nets))]

    def evaluated() -> tuple:
        sums = native_evaluate.evaluate(nets, data.x_test, data.y_test, rows, loss="cross_entropy")
        one = native_evaluate.evaluate(
            nets[2:3], data.x_test, data.y_test, rows[2:3], loss="cross_entropy"
        )
        # Which way is chosen may depend on the number of threads.
        with fusedmlp.use_backend("native"):
            outputs = [build.predict(net, data.x_test, Scaling()) for net in nets[1:3]]
        return tuple(t.numpy().tobytes() for t in (sums, one, *outputs))

    assert len(set(each_way(evaluated, times=3))) == 1


def test_scores_of_cross_validation(each_way):
    data, settings = made(600, 600), config(engine="native", epochs=2, lr=0.05)

    def scores() -> str:
        compared = {"hidden": [(16,), (64, 64), (24, 16, 40, 8)]}
        result = crossval(settings, compared, folds=2, data=data)
        kept = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
        refit = [[row.get(name) for name in kept] for row in result.refit]
        return str([(c.train, c.val) for c in result.candidates] + [result.test, refit])

    assert len(set(each_way(scores))) == 1


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_curves_and_predictions_of_estimators(each_way):
    from fusedmlp.sklearn import FusedMLPClassifier

    data = made(700, 900)
    x, y, x_test = data.x_train.numpy(), data.y_train.numpy(), data.x_test.numpy()

    def fitted() -> tuple:
        found = FusedMLPClassifier(
            (64, 64), max_iter=4, random_state=0, early_stopping=True, dropout=0.1
        ).fit(x, y)
        curves = str((found.loss_curve_, found.validation_scores_))
        return curves, found.predict_proba(x_test).tobytes(), found.predict(x_test).tobytes()

    assert len(set(each_way(fitted, times=2))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux where threads may run")
def test_no_thread_is_bound_to_a_processor(each_way):
    """A worker that leaves its owner's processor binds itself to the others for a moment."""
    engine = engine_of(
        "native", network(sizes=NETWORKS["two wide"]), made(4000, 16), OPTIMIZERS["sgd"]
    )
    each_way(lambda: engine.steps(torch.randperm(4000), 128), times=20)
    deadline = time.monotonic() + 10
    wanted = {frozenset(os.sched_getaffinity(0))}
    while True:
        threads = os.listdir("/proc/self/task")
        found = {frozenset(os.sched_getaffinity(int(number))) for number in threads}
        if found == wanted or time.monotonic() > deadline:
            break
    assert found == wanted
