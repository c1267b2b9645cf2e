"""crossval: K-fold cross-validation of candidates. The best is trained on all training rows and
tested once. fit_many trains folds and candidates together, where one engine can run them together.
"""

import functools
import itertools
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from . import build as models
from . import crossval_report
from .config import RunOptions, TrainConfig, checked, flag_name, shown
from .console import Quiet
from .data import datasets, inputs
from .data.defaults import resolved
from .data.frames import is_frame
from .data.types import SPLIT_SEED, Data, hold_out, prepared, with_validation
from .data.weights import row_weights
from .engines import native_evaluate
from .errors import TrainError, UsageError
from .loop import fit
from .losses import loss_sums
from .many import MAX_TOGETHER, Member, fit_many
from .process import pick_device, run_settings, started_by_torchrun
from .run_folder import create_folder
from .run_state import describe_run

# Settings of how a network is trained; those of its data and of the run folder are common to all.
COMPARED = (
    *("hidden", "activation", "dropout", "init", "init_std", "optimizer", "lr", "lr_schedule"),
    *("warmup_epochs", "momentum", "weight_decay", "label_smoothing", "clip_norm", "epochs"),
    *("batch_size", "precision", "seed"),
)
SEQUENCES = ("hidden", "dropout")  # settings with a value for each layer


@dataclass(frozen=True)
class Score:
    """error: the share of rows that one network gets wrong, or the mean squared error in the
    target's own units; loss: the one it was trained on. nan where training diverged."""

    error: float
    loss: float


@dataclass
class Candidate:
    """One combination of the compared settings, and its scores in each fold."""

    number: int
    config: TrainConfig
    settings: dict  # what is compared: {name: value}
    parameters: int
    train: list[Score] = field(default_factory=list)
    val: list[Score] = field(default_factory=list)

    def mean(self, part: str) -> float:
        errors = [score.error for score in getattr(self, part)]
        return sum(errors) / len(errors)

    def deviation(self, part: str) -> float:
        """Standard deviation over the folds, of the sample."""
        errors, mean = [score.error for score in getattr(self, part)], self.mean(part)
        return math.sqrt(sum((e - mean) ** 2 for e in errors) / (len(errors) - 1))

    @property
    def label(self) -> str:
        words = (f"{name} {shown(value)}" for name, value in self.settings.items())
        return ", ".join(words) or "as set"


@dataclass
class CrossvalResult:
    """candidates in the order given; best is one of them, and model it, trained on all training
    rows. test is None where the data bring no test rows."""

    candidates: list[Candidate]
    best: Candidate
    model: torch.nn.Module
    test: Score | None
    refit: list[dict]  # one dict an epoch of the refit
    folds: int
    data: Data
    seconds: dict[str, float]  # search, refit
    folder: Path | None = None
    paths: dict[str, Path] = field(default_factory=dict)
    test_r2: float | None = None  # regression only


def crossval(
    config: TrainConfig | None = None,
    compare: Mapping[str, Sequence] | None = None,
    options: RunOptions | None = None,
    *,
    folds: int = 5,
    data=None,
    progress=None,
) -> CrossvalResult:
    """Compare settings by cross-validation; train the best on all training rows and test it.

    config    what all candidates have in common
    compare   {name of a TrainConfig setting: values to compare}, every combination of which is a
              candidate: {"hidden": [64, (128, 64)], "weight_decay": [0, 0.01]}
    options   where the run folder is written; None: nothing is written
    folds     parts of the training rows, each held out once; with classes each has the same share
              of every class. The same rows whatever the seed, so that runs can be compared
    data      (x, y) or (x, y, x_test, y_test) or a Data or a DataFrame, as for `fit`; None: the
              config's data set
    progress  a crossval_report.Report, or None for silence
    raises    UsageError (a ValueError), TrainError (a RuntimeError)

    Settings that are None follow from the data, as in `fusedmlp train`; tensors count as images do.
    Best is the lowest mean validation error, of equal ones the lower loss. Inputs and targets that
    are standardized are so by the training rows of each fold alone. The test rows are seen once,
    by the network that is returned.
    """
    config = inputs.config_for(data, config or TrainConfig())
    config = checked("crossval", config, options).with_absolute_paths()
    compare = compare or {}
    _check(config, options, folds)
    given = _loaded(config, data)
    if data is None:
        config = config.replace(dataset=given.name if config.dataset == "auto" else config.dataset)
    configs = [resolved(c, given) for c in candidate_configs(config, compare)]
    if configs[0].val_split and configs[0].keep == "last":
        raise UsageError(
            "--val-split belongs to train or --keep best; a cross-validation holds out each fold"
        )
    device = pick_device(config)
    splits, notes = splits_of(given, folds)
    # A table's inputs follow from its training rows.
    whole = given if given.schema is None else prepared(given, configs[0].standardize)
    found = [
        Candidate(
            number + 1,
            c,
            {name: getattr(c, name) for name in compare},
            sum(p.numel() for p in models.build_network(c, whole).parameters()),
        )
        for number, c in enumerate(configs)
    ]
    place = None if options is None else create_folder(options, config)
    progress = progress or Quiet()
    try:
        progress.start(given, found, folds, device, place, notes)
        started = time.perf_counter()
        _search(found, given, splits, device, progress)
        best = _best(found)
        searched = time.perf_counter()
        model, history, test, r2, about = _refit(best, given, device)
        seconds = {"search": searched - started, "refit": time.perf_counter() - searched}
        result = CrossvalResult(found, best, model, test, history, folds, given, seconds)
        result.test_r2 = r2
        if place is not None:
            result.folder = place.path
            crossval_report.write_report(result, place, about, progress.warn)
            result.paths = place.paths()
    except BaseException:
        if place is not None:
            place.discard()
        raise
    finally:
        progress.close()
        if place is not None:
            place.release()
    progress.finish(result)
    return result


def candidate_configs(config: TrainConfig, compare: Mapping[str, Sequence]) -> list[TrainConfig]:
    """One checked config for each combination, the last setting changing fastest.

    raises  UsageError for a setting that cannot be compared, for none or equal values, and where
            a combination cannot be
    """
    columns = []
    for name, values in compare.items():
        if name not in COMPARED:
            is_setting = name in TrainConfig.__dataclass_fields__
            what = "is the same for all candidates" if is_setting else "is no setting"
            raise UsageError(f"crossval: {name} {what}; compared can be {', '.join(COMPARED)}")
        if isinstance(values, str) or not isinstance(values, Sequence) or len(values) == 0:
            raise UsageError(f"crossval: {name} must be a list of values to compare, got {values}")
        if name in SEQUENCES:
            values = [tuple(v) if isinstance(v, list | tuple) else (v,) for v in values]
        twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
        if twice is not None:
            hint = f"; {flag_name(name)} takes one network's layers between two slashes"
            raise UsageError(
                f"crossval: {shown(twice)} is twice in {flag_name(name)}"
                + (hint if name in SEQUENCES else "")
            )
        columns.append([(name, value) for value in values])
    # The order is the one given: scikit-learn's ParameterGrid would sort settings by name.
    return [config.replace(**dict(chosen)).check() for chosen in itertools.product(*columns)]


def _check(config: TrainConfig, options: RunOptions | None, folds: int) -> None:
    if not isinstance(folds, int) or folds < 2:
        raise UsageError(f"--folds must be at least 2, got {folds}")
    if config.time_limit is not None:
        raise UsageError("--time-limit belongs to train; candidates are compared at equal epochs")
    options = RunOptions() if options is None else options.check()
    if options.log is not None:
        raise UsageError("--log belongs to train; a cross-validation has many networks at once")
    if options.resume is not None:
        raise UsageError("--resume belongs to train; a cross-validation starts anew")
    if started_by_torchrun():
        raise UsageError("crossval runs in one process; start it without torchrun")


def _loaded(config: TrainConfig, data) -> Data:
    """The data before they are scaled, which each fold does for itself."""
    # Rows that tell the best epoch are taken from those of a fold.
    config = config.replace(val_split=0.0)
    if data is None or is_frame(data):
        return datasets.read(config, data)
    given = inputs.as_data(data, config.replace(standardize=False))
    if not isinstance(given, Data):
        raise TypeError("crossval: data must be in memory, tensors or a Data, got a loader")
    return given


def splits_of(data: Data, folds: int) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """((kept, held) rows of each fold, notes)."""
    try:
        from sklearn.model_selection import KFold, StratifiedKFold
    except ImportError as error:
        raise TrainError(
            f"folds need scikit-learn ({error}): pip install 'fusedmlp[train]'"
        ) from error
    rows, notes = len(data.x_train), []
    if folds > rows:
        raise UsageError(f"--folds must be at most the {rows} training rows, got {folds}")
    if data.is_classes:
        labels = data.y_train.cpu()
        counts = torch.bincount(labels)
        fewest = int(counts[counts > 0].min())
        if folds > int(counts.max()):
            raise UsageError(
                f"--folds must be at most {int(counts.max())}, the rows of the largest class, got "
                f"{folds}"
            )
        if fewest < folds:
            name = data.classes[int(torch.where(counts > 0, counts, rows + 1).argmin())]
            notes.append(f"class {name} has only {fewest} rows, so not every fold has one")
        kind, y = StratifiedKFold, labels.numpy()
    else:
        kind, y = KFold, None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        parts = kind(folds, shuffle=True, random_state=SPLIT_SEED).split(torch.empty(rows, 0), y)
        found = [(torch.from_numpy(kept), torch.from_numpy(held)) for kept, held in parts]
    return found, notes


def _search(found: list[Candidate], data: Data, splits, device, progress: Quiet) -> None:
    """Append the scores of all candidates in all folds, fold by fold."""
    data = data.to(device)
    weights = row_weights(data, found[0].config.class_weight)
    total = sum(c.config.epochs for c in found) * len(splits)
    parts = [_with_held(kept, data, found[0].config) for kept, _ in splits]
    done = 0
    for group in _groups(found, len(splits), data.schema is not None):
        first, fold = group[0]
        seen = prepared(data, first.config.standardize, splits[fold][0]).to(device)
        members = [
            Member(models.build_network(c.config, seen), c.config, *parts[number])
            for c, number in group
        ]
        histories = fit_many(
            members,
            seen.x_train,
            seen.y_train,
            loss=_loss_name(data),
            scaling=seen.scaling,
            weights=weights,
            progress=functools.partial(_tell, progress, done, group, total),
        )
        done += sum(c.config.epochs for c, _ in group)
        scores = _scores(members, [splits[number] for _, number in group], seen, device)
        for (c, _), history, (train, val) in zip(group, histories, scores, strict=True):
            is_finite = math.isfinite(history[-1]["train_loss"])
            c.train.append(train if is_finite else Score(math.nan, math.nan))
            c.val.append(val if is_finite else Score(math.nan, math.nan))


def _with_held(rows: Tensor, data: Data, config: TrainConfig) -> tuple[Tensor, Tensor | None]:
    """(rows to train on, those of them that tell the best epoch or None): the fold that is scored
    has no say in it."""
    if config.keep != "best":
        return rows, None
    labels = data.y_train[rows.to(data.y_train.device)] if data.is_classes else None
    kept, held = hold_out(len(rows), config.val_split, labels)
    return rows[kept], rows[held]


def _tell(progress: Quiet, before: int, group, total: int, epoch: int, epochs: int) -> None:
    progress.trained(before + sum(min(epoch, c.config.epochs) for c, _ in group), total)


def _loss_name(data: Data) -> str:
    return "cross_entropy" if data.is_classes else "mse"


def _groups(
    found: list[Candidate], folds: int, is_fitted: bool
) -> Iterator[list[tuple[Candidate, int]]]:
    """(candidate, fold) pairs that may be trained in one call: they have one precision, and one
    fold where the rows are scaled by the fold or, as those of tables, fitted to it."""
    groups: dict[tuple, list] = {}
    for candidate in found:
        config = candidate.config
        for fold in range(folds):
            key = (config.precision, *((fold,) if config.standardize or is_fitted else ()))
            groups.setdefault(key, []).append((candidate, fold))
    for group in groups.values():
        for start in range(0, len(group), MAX_TOGETHER):
            yield group[start : start + MAX_TOGETHER]


def _scores(
    members: list[Member], splits: list[tuple[Tensor, Tensor]], data: Data, device
) -> list[tuple[Score, Score]]:
    """(training score, validation score) of each member, on the rows of its split."""
    networks, x, y = [member.model for member in members], data.x_train, data.y_train
    return _native_scores(networks, x, y, splits, data, members[0].config, device) or [
        tuple(_score(m.model, x[rows], y[rows], data, m.config, device) for rows in split)
        for m, split in zip(members, splits, strict=True)
    ]


def _native_scores(networks, x, y, parts, data: Data, config: TrainConfig, device):
    """The scores of each network on each of its parts, rows of x and y, with the same bits on any
    number of threads; None where the native engine cannot tell."""
    std = None if data.target_scaling is None else data.target_scaling.std
    # Squares of several targets, each in its own unit, do not follow from their sum.
    if config.engine not in ("auto", "native") or (std is not None and std.numel() > 1):
        return None
    settings = {"loss": _loss_name(data), "scaling": data.scaling, "precision": config.precision}
    with run_settings(config, device):
        sums = native_evaluate.evaluate(networks, x, y, parts, **settings)
    if sums is None:
        return None
    unit = 1.0 if std is None else float(std.double().square())

    def score(loss: float, right: float, rows: float) -> Score:
        return Score(1.0 - right / rows if data.is_classes else unit * loss / rows, loss / rows)

    return [tuple(score(*part) for part in each) for each in sums.tolist()]


def _score(model, x: Tensor, y: Tensor, data: Data, config: TrainConfig, device) -> Score:
    """x, y: rows and targets, scaled as `data` says."""
    if found := _native_scores([model], x, y, [(torch.arange(len(x)),)], data, config, device):
        return found[0][0]
    with run_settings(config, device):
        outputs = models.predict(model, x, data.scaling, config.precision)
    y = y if data.is_classes else y.reshape(outputs.shape)
    loss, right, rows = loss_sums(_loss_name(data), outputs, y).tolist()
    if data.is_classes:
        return Score(1.0 - right / rows, loss / rows)
    difference = outputs.double() - y
    if data.target_scaling is not None:
        difference = difference * data.target_scaling.std.to(device)
    return Score(float(difference.square().mean()), loss / rows)


def _best(found: list[Candidate]) -> Candidate:
    finite = [c for c in found if math.isfinite(c.mean("val"))]
    if not finite:
        raise TrainError("every candidate diverged: its loss is no longer finite; try a lower --lr")
    return min(finite, key=lambda c: (c.mean("val"), sum(s.loss for s in c.val)))


def _refit(best: Candidate, data: Data, device: torch.device):
    """(model, history, test score or None, R2 or None, what model.safetensors says of it)."""
    if best.config.keep == "best":
        data = with_validation(data, best.config.val_split)
    whole = prepared(data, best.config.standardize)
    model = models.build_network(best.config, whole)
    config = best.config.replace(standardize=False)
    history = fit(model, replace(whole, x_test=None, y_test=None), config).history
    about = describe_run(model, whole)
    if whole.x_test is None:
        return model, history, None, None, about
    seen = whole.to(device)
    score = _score(model, seen.x_test, seen.y_test, seen, best.config, device)
    if seen.is_classes:
        return model, history, score, None, about
    with run_settings(best.config, device):
        outputs = models.predict(model, seen.x_test, seen.scaling, best.config.precision)
    return model, history, score, models.regression(outputs, seen)["test_r2"], about
