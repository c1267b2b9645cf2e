"""fit: the one training loop, for a user's own model and data. run: the same for what a config
names, which the command line calls.

Torch's global generators, the number of threads, precision and backend settings and signal handlers
are left as they were. Only rank 0 writes, and only into the run folder.
"""

import math
import time
from pathlib import Path

from torch import nn

from . import build, engines, ensemble, logs
from .best import best_for
from .build import evaluate, evaluate_batches
from .config import RunOptions, TrainConfig, checked
from .console import Quiet
from .data import datasets, inputs, loaders
from .data.defaults import preset_notes, resolved
from .data.frames import is_frame
from .data.types import Data, permutation, prepared
from .data.weights import row_weights
from .errors import LostProcessError, TrainError, UsageError, WriteError
from .losses import mean_figures, rounded
from .process import (
    World,
    current_world,
    pick_device,
    run_settings,
    seed_epoch,
    stop_on_signals,
    together,
)
from .run_folder import create_folder, load_checkpoint, reopen_folder
from .run_state import (
    Result,
    Run,
    about_time,
    check_continuation,
    check_loss,
    describe_run,
    draw_results,
    restore,
    save,
    set_rng,
    summary,
    what_is_kept,
    write_results,
)
from .task import Task

READ_SECONDS = 0.1  # between two reads of the losses; each waits for the device
SAVE_SECONDS = 1.0  # between two checkpoints at the end of short epochs


def fit(
    model: nn.Module,
    data,
    config: TrainConfig | None = None,
    options: RunOptions | None = None,
    *,
    progress: Quiet | None = None,
) -> Result:
    """Train a model in place, as PyTorch's own loop of shuffle, forward, loss, backward, update.

    model    any nn.Module that maps (B, ...) inputs to (B, classes), or to the targets' shape
    data     (x, y) or (x, y, x_test, y_test): tensors of n rows, integer classes or float targets;
             or a Data (`load_data` makes one of a table, with its width); or a DataFrame, with
             config.target; or, for data larger than memory, a loader of (x, y) batches (any
             iterable, gone through once an epoch) or a pair (loader, test_loader)
    config   a TrainConfig. Its dataset, hidden, activation, dropout and init describe what is
             here already and are not read. What it leaves to the data is as for image sets: SGD,
             no scaling
    options  where the run folder is written, or which one is resumed; None: nothing is written
    returns  a Result; Ctrl-C ends the loop after the step under way and returns what there is
    raises   UsageError (a ValueError), TrainError (a RuntimeError), TypeError

    uint8 rows are divided by 255. The order of rows, and the masks of a FusedMLP, follow from
    config.seed alone; other models draw from torch's generator, seeded by it each epoch.
    """
    config = checked("fit", inputs.config_for(data, config), options)
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError("fit: the model must have parameters that require gradients, got none")
    saved = None
    if options is not None and options.resume is not None:
        saved = load_checkpoint(options.resume)
        config = config.filled(vars(TrainConfig.from_dict(saved["config"])))
    given = inputs.as_data(data, config)
    if saved is None:
        config = resolved(config, given)
    else:
        check_continuation(config, given, Path(options.resume), saved)
    device, world = pick_device(config), current_world()
    _check_world(config, world, given)
    with run_settings(config, device), stop_on_signals() as stop:
        epoch = 0 if saved is None else saved["position"]["epoch"]
        task, data = _task(model, given, config, device, world, epoch)
        best = best_for(config, isinstance(data, Data) and data.x_val is not None)
        seed_epoch(config, world, 0, device)
        about = describe_run(model, data)
        progress = logs.with_tracker(progress or Quiet(), options if world.is_lead else None)
        if config.tune == "auto" and config.backend == "auto" and isinstance(data, Data):
            engines.tuned.at_start(task, config.batch_size, progress.note)
        engine = engines.choose(config.engine, task, config.batch_size)
        run = Run(config, options, world, task, engine, data, progress, stop, about)
        run.best = best
        try:
            with world.others():
                _open(run, saved)
                _loop(run, saved)
                return _close(run)
        except BaseException as error:
            if run.folder is not None and world.is_lead:
                run.folder.discard()
            if isinstance(error, WriteError):
                raise TrainError(f"{error}; {what_is_kept(run)}") from error
            if isinstance(error, LostProcessError) and run.folder is not None:
                raise LostProcessError(f"{error}; {what_is_kept(run)}") from error
            raise
        finally:
            run.progress.close()
            if run.folder is not None:
                run.folder.release()


def run(
    config: TrainConfig | None = None,
    options: RunOptions | None = None,
    *,
    data=None,
    progress: Quiet | None = None,
) -> Result:
    """Load the data set of the config, make its network and train it, into a run folder; under
    torchrun in all processes together. Arguments, result and errors as for `fit`.

    data  a DataFrame in the place of the config's data set; config.target names its column
    """
    options = options or RunOptions()
    if data is not None and not is_frame(data):
        raise TypeError(f"run: data must be a DataFrame, got {type(data).__name__}")
    config = inputs.config_for(data, config or TrainConfig())
    config = checked("run", config, options).with_absolute_paths()
    if options.resume is not None:
        config = config.filled(
            vars(TrainConfig.from_dict(load_checkpoint(options.resume)["config"]))
        )
    asked, progress = config, progress or Quiet()
    logs.check(options)
    with together(pick_device(config).type) as world:
        several, loaded = world.size == 1 and options.resume is None, None

        def load_first() -> str:
            # Rank 0 before the others: the one download, and the choice of a data set, are for all.
            nonlocal loaded
            loaded = datasets.read(config, data, several)
            return loaded.name if config.dataset == "auto" else config.dataset

        config = config.replace(dataset=world.run_on_lead(load_first))
        loaded = loaded or datasets.read(config, data, several)
        config = resolved(config, loaded, several)
        loaded = prepared(loaded, config.standardize)
        if world.is_lead:
            for note in (*loaded.notes, *preset_notes(config, asked, loaded)):
                progress.note(note)
        if config.networks > 1:
            return ensemble.run(config, options, loaded, progress)
        network = build.build_network(config, loaded)
        progress = progress if world.is_lead else Quiet()
        return fit(network, loaded, config, options, progress=progress)


def _check_world(config: TrainConfig, world: World, data) -> None:
    if world.size == 1:
        return
    if config.batch_size < world.size:
        raise UsageError(
            f"--batch-size must be at least the number of processes, {world.size}, got "
            f"{config.batch_size}"
        )
    if isinstance(data, loaders.Loaders):
        raise UsageError("fit: a loader works in one process; for several pass tensors")


def explain(model: nn.Module, data, config: TrainConfig | None = None) -> str:
    """For each engine one line: taken, able to run this training, or why not.

    Arguments, errors and what happens to the model's device as in `fit`; nothing is trained.
    """
    config = checked("explain", inputs.config_for(data, config), None)
    given = inputs.as_data(data, config)
    config = resolved(config, given)
    device = pick_device(config)
    with run_settings(config, device):
        task, _ = _task(model, given, config, device, current_world())
        return "\n".join(engines.explain(config.engine, task, config.batch_size))


def _task(
    model, given, config, device, world, epoch: int = 0
) -> tuple[Task, Data | loaders.Loaders]:
    """The task, and the data on its device. A loader is opened here, with the generators seeded as
    for the first epoch to be run."""
    model.to(device)
    if isinstance(given, Data):
        data = inputs.on_device(given, model, device)
        loss = "cross_entropy" if data.is_classes else "mse"
        steps = math.ceil(len(data.x_train) / config.batch_size)
        task = build.task_for(model, config, loss, device, data.scaling, steps, world)
        task.x, task.y = data.x_train, data.y_train
        task.row_weights = row_weights(data, config.class_weight)
        return task, data
    seed_epoch(config, world, epoch, device)
    data, scaling, loss = loaders.checked_loaders(given, model, config, device)
    return build.task_for(model, config, loss, device, scaling, given.length, world), data


def _open(run: Run, saved: dict | None) -> None:
    """Make or reopen the run folder; restore the checkpoint."""
    config, options, world = run.config, run.options, run.world
    if saved is not None:
        restore(run, saved)
        run.folder = world.run_on_lead(lambda: reopen_folder(Path(options.resume)))
    elif options is not None:
        run.folder = world.run_on_lead(lambda: create_folder(options, config))
    run.engine.set_step(run.position.global_step)
    run.progress.start(run)
    if config.engine == "auto" and run.task.device.type == "cpu" and run.engine.name == "autograd":
        reasons = "; ".join(engines.Native.reasons_against(run.task))
        run.progress.note(f"the faster engine native is passed over: {reasons}")


def _loop(run: Run, saved: dict | None) -> None:
    position = run.position
    rng = saved["rng"] if saved is not None and position.step else None
    while position.epoch < run.config.epochs and not (run.halted or run.is_over):
        run.check_time()
        if run.timed_out:
            break
        seed_epoch(run.config, run.world, position.epoch, run.task.device)
        run.task.model.train()
        train_epoch = _train_epoch if isinstance(run.data, Data) else _train_loader
        if not train_epoch(run, rng):
            break
        rng = None
        run.history.append(_row(run))
        if run.best is not None:
            run.best.see(run.history, run.task.model)
        position.next_epoch()
        run.progress.epoch(run.history[-1])
        if any(run.world.max(int(time.monotonic() - run.saved_at >= SAVE_SECONDS))):
            save(run)
    if run.saved_step != position.global_step:
        save(run)


def _train_epoch(run: Run, rng: dict | None) -> bool:
    """Steps to the end of the epoch; False when asked to stop before it.

    rng  states of torch's generators at the step where a resumed epoch continues
    """
    if rng is not None:
        set_rng(run, rng)
    position, batch = run.position, run.config.batch_size
    rows = len(run.task.x)
    order = permutation(run.config.seed, position.epoch, rows).to(run.task.device)
    steps = math.ceil(rows / batch)
    while position.step < steps:
        started = time.perf_counter()
        last = min(position.step + run.chunk, steps)
        run.engine.steps(order[position.step * batch : last * batch], batch)
        loss, right, seen = run.engine.read()
        seconds, done = time.perf_counter() - started, last - position.step
        position.advance(done, loss, right, seen, seconds)
        check_loss(run, loss)
        run.progress.steps(position, steps)
        if seconds < READ_SECONDS / 2 and done == run.chunk:
            run.chunk *= 2
        elif seconds > READ_SECONDS:
            run.chunk = max(1, run.chunk // 2)
        stop, run.chunk = run.world.max(int(run.stop.asked), run.chunk)
        run.halted = bool(stop)
        if run.halted and position.step < steps:
            return False
    return True


def _train_loader(run: Run, rng: dict | None) -> bool:
    """The same as _train_epoch, for batches of an iterable."""
    position = run.position
    skip, read_at = position.step, time.perf_counter()
    pending = 0
    for number, (x, y) in enumerate(run.data.train):
        if number < skip:
            continue  # a resumed epoch: the loader has to run through the batches that were seen
        if number == skip and rng is not None:
            set_rng(run, rng)
        try:
            run.engine.step_on(x, y)
        except RuntimeError as error:
            run.data.train.raise_if_rows_differ(error)
            raise
        pending += 1
        seconds = time.perf_counter() - read_at
        if seconds >= READ_SECONDS or run.stop.asked:
            position.advance(pending, *_readchecked(run), seconds)
            read_at, pending = time.perf_counter(), 0
            run.progress.steps(position, run.data.length)
            run.halted = run.stop.asked
            if run.halted:
                return False
    if pending:
        seconds = time.perf_counter() - read_at
        position.advance(pending, *_readchecked(run), seconds)
    return True


def _readchecked(run: Run) -> tuple[float, float, int]:
    loss, right, rows = run.engine.read()
    check_loss(run, loss)
    return loss, right, rows


def _row(run: Run) -> dict:
    """The row of a finished epoch: its means, and the losses of the held-out rows."""
    position, task = run.position, run.task
    figures = {"train": mean_figures(task.loss, (position.loss, position.right, position.rows))}
    figures |= {part: _evaluate(run, part) for part in ("val", "test")}
    row = {"epoch": position.epoch + 1}
    for part, (loss, accuracy) in figures.items():
        row |= {f"{part}_loss": rounded(loss), f"{part}_accuracy": rounded(accuracy)}
        if loss is not None:
            check_loss(run, loss)
    return row | {"seconds": rounded(position.seconds)}


def _evaluate(run: Run, part: str) -> tuple[float | None, float | None]:
    task, data = run.task, run.data
    if isinstance(data, loaders.Loaders):
        if part == "val" or data.test is None:
            return None, None
        try:
            return evaluate_batches(task, data.test)
        except RuntimeError as error:
            data.test.raise_if_rows_differ(error)
            raise
    x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
    if x is None:
        return None, None
    sums = run.engine.evaluate(x, y)
    if sums is not None:
        return mean_figures(task.loss, sums.tolist())
    return evaluate(
        task.model, x, y, task.scaling, task.loss, precision=task.precision, world=task.world
    )


def _close(run: Run) -> Result:
    done = run.timed_out or run.is_over
    interrupted = run.position.epoch < run.config.epochs and not done
    result = Result(run.task.model, run.history, run.config, interrupted)
    if run.best is not None:
        run.best.put_back(run.task.model)
    result.summary = summary(run)
    if run.timed_out:
        run.progress.note(about_time(run))
    if run.folder is not None:
        result.folder = run.folder.path
        if not interrupted:
            run.world.run_on_lead(lambda: write_results(run, result.summary))
            run.world.run_on_lead(lambda: draw_results(run))
        result.paths = run.folder.paths()
    run.progress.finish(result)
    return result
