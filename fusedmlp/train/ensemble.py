"""Ensembles: networks that are trained together, each with another part of the rows held out to
tell its best epoch, and whose predictions are averaged."""

import math
import time
from dataclasses import dataclass

from . import engines, logs
from .best import best_epoch
from .build import Ensemble, build_network, evaluate
from .config import RunOptions, TrainConfig
from .console import Quiet
from .data.types import Data, parts_of, seeded
from .data.weights import row_weights
from .errors import TrainError
from .losses import rounded
from .many import Member, fit_many, reasons_against_many
from .process import ALONE, StopRequest, pick_device, run_settings
from .run_folder import create_folder
from .run_state import (
    Result,
    Run,
    describe_run,
    draw_results,
    summary,
    write_results,
)
from .task import Task

PARTS = 8  # of the rows: a network is trained on all but one of them


@dataclass
class Fitted:
    """An ensemble that is trained, and the histories of its networks, as fit_many returns them."""

    model: Ensemble
    histories: list[list[dict]]
    kept: list[int]  # of each network, 1 for the first epoch
    seconds: float
    rows: int  # that were seen, over all epochs and networks


def fit(config: TrainConfig, data: Data, progress: Quiet) -> Fitted:
    """Train config.networks networks on the training rows of data that are prepared.

    raises  TrainError where there are too few rows, or the loss of a network is not finite
    """
    rows, started = len(data.x_train), time.perf_counter()
    loss = "cross_entropy" if data.is_classes else "mse"
    members = _members(config, data)
    histories = fit_many(
        members,
        data.x_train,
        data.y_train,
        loss=loss,
        scaling=data.scaling,
        weights=row_weights(data, config.class_weight),
        progress=progress.trained,
    )
    lost = [h for h in histories if not math.isfinite(h[-1]["train_loss"])]
    if lost:
        raise TrainError(
            f"the loss of {len(lost)} of {len(histories)} networks is no longer finite; take a "
            f"smaller --lr than {config.lr:g}"
        )
    kept = [best_epoch(h) if config.keep == "best" else len(h) for h in histories]
    model = Ensemble([member.model for member in members], data.is_classes).eval()
    rows = sum(len(m.rows) * len(h) for m, h in zip(members, histories, strict=True))
    return Fitted(model, histories, kept, time.perf_counter() - started, rows)


def _members(config: TrainConfig, data: Data) -> list[Member]:
    rows = len(data.x_train)
    if rows < 2:
        raise TrainError(f"--networks needs at least 2 training rows, got {rows}")
    labels, members = data.y_train if data.is_classes else None, []
    for number in range(config.networks):
        seed = seeded("network", config.seed, number).initial_seed()
        own = config.replace(seed=seed, networks=1)
        count, (turn, place) = min(PARTS, rows), divmod(number, min(PARTS, rows))
        kept, held = parts_of(rows, count, labels, seed=seeded("parts", turn).initial_seed())[place]
        if config.keep == "last":
            kept, held = kept.new_tensor(range(rows)), None
        members.append(Member(build_network(own, data), own, kept, held))
    return members


def run(config: TrainConfig, options: RunOptions, data: Data, progress: Quiet) -> Result:
    """An ensemble into a run folder. Nothing is kept of one that is interrupted."""
    device = pick_device(config)
    data = data.to(device)
    loss = "cross_entropy" if data.is_classes else "mse"
    progress = logs.with_tracker(progress, options)
    folder = create_folder(options, config)
    try:
        first = build_network(config.replace(networks=1), data)
        task = Task(first, None, loss, device, scaling=data.scaling, precision=config.precision)
        task.x, task.y = data.x_train, data.y_train
        about = describe_run(first, data)
        about["model"]["networks"] = config.networks
        reasons = _reasons_against_native(config, data, loss)
        engine = engines.Autograd if reasons else engines.Native
        run = Run(
            config, options, ALONE, task, engine, data, progress, StopRequest(), about, folder
        )
        progress.start(run)
        if reasons and config.engine == "auto" and device.type == "cpu":
            progress.note(f"the faster engine native is passed over: {reasons[0]}")
        found = fit(config, data, progress)
        task.model = found.model
        return _close(run, found)
    except BaseException:
        folder.discard()
        raise
    finally:
        progress.close()
        folder.release()


def _reasons_against_native(config: TrainConfig, data: Data, loss: str) -> list[str]:
    """Why fit_many trains one network after the other, for what is told of the run."""
    return reasons_against_many(_members(config, data), data.x_train, data.y_train, loss)


def _close(run: Run, found: Fitted) -> Result:
    task, data, position = run.task, run.data, run.position
    run.history = _means(found.histories)
    position.epoch, position.total_seconds = len(run.history), found.seconds
    position.total_rows = found.rows
    last = [h[kept - 1] for h, kept in zip(found.histories, found.kept, strict=True)]
    if data.x_test is not None:
        with run_settings(run.config, task.device):
            figures = evaluate(
                task.model,
                data.x_test,
                data.y_test,
                task.scaling,
                task.loss,
                precision=task.precision,
            )
        test = dict(zip(("test_loss", "test_accuracy"), map(rounded, figures), strict=True))
    else:
        test = {}
    names = [name for name in run.history[-1] if name.startswith(("train", "val"))]
    content = summary(run) | {name: _mean(last, name) for name in names} | test
    content["kept_epoch"], content["networks"] = found.kept, len(found.kept)
    result = Result(task.model, run.history, run.config, folder=run.folder.path, summary=content)
    write_results(run, content)
    draw_results(run)
    result.paths = run.folder.paths()
    run.progress.finish(result)
    return result


def _means(histories: list[list[dict]]) -> list[dict]:
    """A row for each epoch: the means over the networks that were under way."""
    rows = []
    for epoch in range(max(map(len, histories))):
        there = [h[epoch] for h in histories if epoch < len(h)]
        row = {"epoch": epoch + 1}
        for part in ("train", "val", "test"):
            row |= {f"{part}_{what}": _mean(there, f"{part}_{what}") for what in _FIGURES}
        rows.append(row | {"seconds": None})
    return rows


_FIGURES = ("loss", "accuracy")


def _mean(rows: list[dict], name: str) -> float | None:
    values = [row.get(name) for row in rows]
    return None if None in values else rounded(sum(values) / len(values))
