"""TrainConfig: what is trained. RunOptions: where the run is kept. Both with the default and the
one-line help of each setting, from which the command line is generated.

Nothing here touches data, devices or files.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Literal, get_args, get_origin, get_type_hints

from ..spec import activations
from .errors import UsageError

Activation = Literal[*activations.NAMES]
TABLE_FILES = (".csv", ".tsv", ".txt", ".parquet")
TRACKER_VERBS = ("init", "log", "finish")
FRAME = "table"  # the data set of a run on a DataFrame of the caller's


@dataclass(frozen=True)
class TrainConfig:
    """What is trained and how: data set, network, optimizer, schedule, precision and engine.

    None leaves a setting to the data. `check` raises UsageError for a setting that cannot be.
    """

    dataset: str = "auto"
    """auto, fashion_mnist, mnist, kmnist, digits, synthetic, or a FILE.npz, FILE.csv (.tsv, .txt),
    FILE.parquet"""
    data_dir: Path | None = None
    """folder of the image sets; default $FUSEDMLP_DATA, else a cache folder"""
    target: str | None = None
    """of a table: the column to predict; default the last one"""
    leave_out: tuple[str, ...] = ()
    """columns of a table that are not used"""
    weight_column: str | None = None
    """of a table: the column with the weight of each training row in the loss"""
    class_weight: Literal["balanced"] | None = None
    """balanced: training rows weigh in the loss as if all classes had as many"""
    preset: Literal["plain", "table", "ensemble"] | None = None
    """defaults of the settings below: plain: those that each names; table: a regularised network
    for tables, its best epoch kept; ensemble: several of them, averaged. Unset it is ensemble for
    a csv or Parquet file of up to 20,000 training rows, table for larger ones, else plain"""
    networks: int | None = None
    """networks to train, whose predictions are averaged, each with another eighth of the rows held
    out to tell its best epoch; default 1"""
    hidden: tuple[int, ...] | None = None
    """widths of the hidden layers; default 256"""
    activation: Activation = "relu"
    """activation of the hidden layers"""
    dropout: tuple[float, ...] | None = None
    """dropout after the hidden layers: one number, or one for each; default 0"""
    init: Literal["normal", "default"] | None = None
    """normal: weights of deviation --init-std, biases 0; default: PyTorch's own. Unset it is normal
    with --init-std, and for image sets with one hidden layer or 256 256; else default"""
    init_std: float | None = None
    """deviation of the initial weights with --init normal; default 0.01"""
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    """update rule; default sgd, for tables adam"""
    lr: float | None = None
    """learning rate; default 0.1 for sgd (0.01 with mse), 0.001 for adam and adamw"""
    lr_schedule: Literal["constant", "cosine", "linear"] | None = None
    """how the learning rate goes down to 0 over the steps of the run; constant, the default: it
    does not"""
    warmup_epochs: float | None = None
    """first the learning rate rises in equal steps, for that many epochs or parts of one; default
    0"""
    momentum: float = 0.0
    """momentum of sgd"""
    weight_decay: float | None = None
    """L2 penalty of sgd and adam, decoupled decay of adamw; default 0"""
    loss: Literal["auto", "cross_entropy", "mse"] = "auto"
    """auto: cross_entropy for classes, mse for a float target"""
    label_smoothing: float | None = None
    """share of a label that goes to all classes alike; cross_entropy only; default 0"""
    clip_norm: float | None = None
    """largest norm of all gradients together, longer ones are shortened to it; 0, the default:
    any"""
    val_split: float | None = None
    """share of the training rows held out for validation; default 0, with
    --keep best 0.1, with --preset table 0.125"""
    keep: Literal["last", "best"] | None = None
    """weights of the last epoch, or of the one with the best accuracy, for numbers the best loss,
    on the rows held out; default last, best with --patience and for presets of tables"""
    patience: int | None = None
    """stop after so many epochs without a better one; default none"""
    standardize: bool | None = None
    """--standardize or --no-standardize: scale inputs, and a float target, to mean 0 and deviation
    1 over the training rows, columns of a csv or Parquet file robustly; default: tables are
    scaled"""
    epochs: int | None = None
    """passes over the training rows; default 10, for digits 30, for tables 50, and 30 from 10,000
    rows on"""
    time_limit: float | None = None
    """seconds of training, tests included: it ends after an epoch, as soon as no other one fits"""
    batch_size: int | None = None
    """rows a step, over all processes; default 256, for digits 32, for tables a power of 2 near a
    50th of the rows, from 16 to 256"""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """of the arithmetic; bf16 and fp16 keep fp32 weights"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one"""
    backend: Literal["auto", "native", "triton", "reference"] = "auto"
    """kernels of the fused layers; auto: the fastest known"""
    engine: Literal["auto", "autograd", "native", "graph"] = "auto"
    """how a training step is run; auto: the fastest that supports it"""
    tune: Literal["auto", "off"] = "auto"
    """auto: on a GPU that was not measured for this network, measure it first, in seconds; off: do
    not"""
    seed: int = 0
    """of the initial weights, the order of the rows and the dropout masks"""

    def __post_init__(self):
        if isinstance(self.dataset, Path):
            object.__setattr__(self, "dataset", str(self.dataset))
        for name in ("hidden", "dropout", "leave_out"):
            value = getattr(self, name)
            if isinstance(value, int | float):  # one for all layers, as FusedMLP takes it
                value = (value,)
            if isinstance(value, list):
                value = tuple(value)
            object.__setattr__(self, name, value)

    def check(self) -> "TrainConfig":
        """Raise TypeError or UsageError for the first setting that cannot be; return self."""
        _check_kinds(self)
        _check_numbers(self)
        if None not in (self.dropout, self.hidden) and len(self.dropout) not in (
            1,
            len(self.hidden),
        ):
            raise UsageError(
                f"--dropout must be one number or one for each of the {len(self.hidden)} hidden "
                f"layers, got {len(self.dropout)}: {_words(self.dropout)}"
            )
        _check_contradictions(self)
        return self

    def dropout_per_layer(self) -> tuple[float, ...]:
        return self.dropout * len(self.hidden) if len(self.dropout) == 1 else self.dropout

    def validation_share(self) -> float:
        """Of the training rows."""
        if self.val_split is not None:
            return self.val_split
        is_best = self.keep == "best" or self.patience is not None
        return 0.1 if is_best and self.networks in (None, 1) else 0.0

    def learning_rate(self, loss: str) -> float:
        """loss: cross_entropy, or mse, whose gradient grows with the error."""
        if self.lr is not None:
            return self.lr
        if self.optimizer in ("sgd", None):
            return {"cross_entropy": 0.1, "mse": 0.01}[loss]
        return 1e-3

    def filled(self, settings: dict) -> "TrainConfig":
        """Settings that are None as they are in {name: value}, but for the limit of its time."""
        unset = {k: v for k, v in settings.items() if getattr(self, k) is None}
        unset.pop("time_limit", None)
        return self.replace(**unset)

    def replace(self, **changes) -> "TrainConfig":
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """Plain values only (str, int, float, bool, None, list), as checkpoints hold them."""
        return _plain_values(self)

    @classmethod
    def from_dict(cls, plain: dict) -> "TrainConfig":
        """The config of a checkpoint or a config.json, whose run options are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {k: v for k, v in plain.items() if k not in RunOptions.__dataclass_fields__}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError(
                f"config: unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        for name in ("hidden", "dropout", "leave_out"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        if values.get("data_dir") is not None:
            values["data_dir"] = Path(values["data_dir"])
        return cls(**values)

    def with_absolute_paths(self) -> "TrainConfig":
        """The same data from any working folder, so that a run can be resumed from another one."""
        config = self
        if config.dataset.lower().endswith((".npz", *TABLE_FILES)):
            config = config.replace(dataset=str(Path(config.dataset).absolute()))
        if config.data_dir is not None:
            config = config.replace(data_dir=config.data_dir.absolute())
        return config


def is_table_file(dataset: str) -> bool:
    return str(dataset).lower().endswith(TABLE_FILES)


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def shown(value) -> str:
    """A value of a setting as the command line takes it."""
    if isinstance(value, tuple | list):
        return " ".join(shown(v) for v in value) or "(none)"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain_values(settings) -> dict:
    """{name: value} of a dataclass: paths as text, tuples as lists."""
    plain = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        value = list(value) if isinstance(value, tuple) else value
        plain[field.name] = str(value) if isinstance(value, Path) else value
    return plain


def _words(values) -> str:
    return " ".join(str(value) for value in values)


# What a value from Python may be, by the type that stands beside its setting.
_KINDS = {int: (Integral, "an int"), float: (Real, "a number"), bool: (bool, "True or False")}
_KINDS |= {str: (str, "a str"), Path: ((str, Path), "a path")}


# Evaluating the annotations takes 0.2 ms, and a search has hundreds of configs.
_hints_of = functools.cache(get_type_hints)


def _check_kinds(config: TrainConfig) -> None:
    for name, hint in _hints_of(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is UnionType or type(None) in get_args(hint):
            if value is None:
                continue
            hint = get_args(hint)[0]
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                known = ", ".join(get_args(hint))
                raise UsageError(f"{flag_name(name)} must be one of {known}, got {value!r}")
            continue
        is_many = get_origin(hint) is tuple
        if is_many and not isinstance(value, tuple):
            raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")
        kind, wanted = _KINDS[get_args(hint)[0] if is_many else hint]
        for one in value if is_many else (value,):
            if not isinstance(one, kind) or (isinstance(one, bool) and kind is not bool):
                raise TypeError(f"{name} must be {wanted}, got {type(one).__name__}")


def _check_numbers(config: TrainConfig) -> None:
    def need(name, value, holds, wanted):
        if not holds:
            raise UsageError(f"{flag_name(name)} must be {wanted}, got {value}")

    for width in config.hidden or ():
        need("hidden", _words(config.hidden), width >= 1, "widths of at least 1")
    for p in config.dropout or ():
        need("dropout", _words(config.dropout), 0.0 <= p <= 1.0, "between 0 and 1")
    for name in ("epochs", "batch_size", "patience", "networks"):
        value = getattr(config, name)
        need(name, value, value is None or value >= 1, "at least 1")
    for name in ("lr", "time_limit"):
        value = getattr(config, name)
        need(name, value, value is None or 0 < value < math.inf, "a number above 0")
    for name in ("momentum", "weight_decay", "init_std", "clip_norm", "warmup_epochs"):
        value = getattr(config, name)
        holds = value is None or (math.isfinite(value) and value >= 0)
        need(name, value, holds, "a number of at least 0")
    smoothing = config.label_smoothing
    holds = smoothing is None or 0.0 <= smoothing <= 1.0
    need("label_smoothing", smoothing, holds, "between 0 and 1")
    share = config.val_split
    need("val_split", share, share is None or 0.0 <= share < 1.0, "at least 0 and below 1")
    need("seed", config.seed, -(2**63) <= config.seed < 2**63, "a 64-bit integer")


def _check_contradictions(config: TrainConfig) -> None:
    if config.optimizer not in ("sgd", None) and config.momentum:
        raise UsageError(f"--momentum belongs to --optimizer sgd; {config.optimizer} has none")
    if config.loss == "mse" and config.label_smoothing:
        raise UsageError("--label-smoothing belongs to --loss cross_entropy; mse has no labels")
    if config.epochs is not None and (config.warmup_epochs or 0.0) > config.epochs:
        raise UsageError(
            f"--warmup-epochs must be at most --epochs, {config.epochs}, got "
            f"{config.warmup_epochs:g}"
        )
    if config.val_split and (config.networks or 1) > 1:
        raise UsageError(
            f"--val-split belongs to one network; each of {config.networks} holds out other rows"
        )
    if config.keep == "last" and config.patience is not None:
        raise UsageError(
            "--patience belongs to --keep best; the last epoch needs none to be better"
        )
    if config.init == "default" and config.init_std is not None:
        raise UsageError("--init-std belongs to --init normal; --init default is PyTorch's own")
    for name in ("target", "leave_out", "weight_column"):
        if getattr(config, name) and config.dataset != FRAME and not is_table_file(config.dataset):
            raise UsageError(
                f"{flag_name(name)} names a column of a table (a file ending in "
                f"{', '.join(TABLE_FILES)}), but --dataset is {config.dataset}"
            )
    if config.loss == "mse" and config.class_weight is not None:
        raise UsageError("--class-weight belongs to --loss cross_entropy; mse has no classes")
    if config.precision == "tf32" and config.device == "cpu":
        raise UsageError("--precision tf32 needs --device cuda; on a CPU take fp32 or bf16")


@dataclass(frozen=True)
class RunOptions:
    """Where a run is kept: the folder that it writes, or the one that it resumes."""

    out: Path | None = None
    """run folder; default a new numbered one under runs/"""
    overwrite: bool = False
    """replace the run that is in --out"""
    resume: Path | None = None
    """go on with the run in this folder"""
    log: str | None = None
    """where each epoch's figures go too: tensorboard, wandb, trackio, or a module with the three
    functions init, log and finish of wandb"""
    debug: bool = False
    """show a traceback when something fails"""

    def check(self) -> "RunOptions":
        """Raise TypeError for what is no path, UsageError for a contradiction; return self."""
        for name in ("out", "resume"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, Path)):
                raise TypeError(f"--{name} must be a path, got {type(value).__name__}")
        if self.log is not None and not isinstance(self.log, str):
            lacks = [verb for verb in TRACKER_VERBS if not callable(getattr(self.log, verb, None))]
            if lacks:
                raise TypeError(
                    f"log must be a module's name or have init, log and finish, but "
                    f"{type(self.log).__name__} has no {lacks[0]}"
                )
        if self.resume is not None and self.out is not None:
            raise UsageError("--resume goes on in the run's own folder; leave out --out")
        if self.resume is not None and self.overwrite:
            raise UsageError("--resume and --overwrite contradict each other")
        if self.overwrite and self.out is None:
            raise UsageError("--overwrite needs --out, the run to replace")
        return self

    def to_dict(self) -> dict:
        """Plain values only (str, bool, None)."""
        plain = _plain_values(self)
        if self.log is not None and not isinstance(self.log, str):
            plain["log"] = getattr(self.log, "__name__", type(self.log).__name__)
        return plain


def checked(where: str, config: TrainConfig | None, options: RunOptions | None) -> TrainConfig:
    """The config, by default a new one; TypeError and UsageError for what no run could have."""
    config = TrainConfig() if config is None else config
    for name, value, kind in (("config", config, TrainConfig), ("options", options, RunOptions)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(
                f"{where}: {name} must be a {kind.__name__}, got {type(value).__name__}"
            )
    if options is not None:
        options.check()
    return config.check()
