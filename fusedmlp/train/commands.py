"""The commands train, crossval, compare, evaluate and predict: flags in, text out. The work is in
loop.py, crossvalidation.py, compare.py and inference.py."""

import contextlib
import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from . import compare as comparison
from . import crossval_report, crossvalidation, inference, loop, table_files
from .config import RunOptions, TrainConfig, flag_name
from .console import Console
from .crossvalidation import COMPARED, SEQUENCES
from .errors import TrainError, UsageError, printable
from .process import is_quiet_process, pick_device
from .run_folder import load_checkpoint

INTERRUPTED = 130


@dataclass(frozen=True)
class EvaluateArgs:
    run: tyro.conf.Positional[Path]
    """run folder"""
    file: tyro.conf.Positional[Path | None] = None
    """a table (csv or Parquet) with the target; default the run's test rows"""
    data_dir: Path | None = None
    """folder of the image sets, if not that of the run"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one"""
    debug: bool = False
    """show a traceback when something fails"""


@dataclass(frozen=True)
class PredictArgs:
    run: tyro.conf.Positional[Path]
    """run folder"""
    file: tyro.conf.Positional[Path | None] = None
    """a table (csv or Parquet) whose rows are predicted; its columns are matched by name"""
    out: Path | None = None
    """csv file to write, a line for each row of the table; default standard output"""
    proba: bool = False
    """a column probability_<class> for each class beside the prediction"""
    images: tuple[Path, ...] = ()
    """pictures to name: grey or colour, any size; default the run's test rows"""
    invert: bool = False
    """turn light and dark round first, for dark things on a light background"""
    rows: int = 20
    """test rows to show; 0 for all"""
    data_dir: Path | None = None
    """folder of the image sets, if not that of the run"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one"""
    debug: bool = False
    """show a traceback when something fails"""


@dataclass(frozen=True)
class CompareArgs:
    """Runs beside each other: the settings in which they differ, their scores and seconds."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, of train and of crossval"""
    debug: bool = False
    """show a traceback when something fails"""


def _parse(kind: type, name: str, argv: list[str], default=None):
    """The flags as an object of this kind; tyro shows a mistake and ends with exit code 2."""
    argv = list(_with_values(argv))
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if is_quiet_process():
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        settings = (tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands)
        extra = {} if default is None else {"default": default}
        return tyro.cli(kind, prog=f"fusedmlp {name}", args=argv, config=settings, **extra)


def _with_values(argv: list[str]) -> Iterator[str]:
    """The words with a value after --standardize, as tyro wants for a setting that may be None."""
    for place, word in enumerate(argv):
        following = argv[place + 1] if place + 1 < len(argv) else ""
        if word == "--no-standardize":
            yield from ("--standardize", "False")
        elif word == "--standardize" and following not in ("True", "False", "None"):
            yield from (word, "True")
        else:
            yield word


@dataclass(frozen=True)
class TrainArgs(RunOptions, TrainConfig):
    def split(self) -> tuple[TrainConfig, RunOptions]:
        """(what is trained, where the run is kept), both checked."""
        parts = (
            kind(**{field.name: getattr(self, field.name) for field in fields(kind)})
            for kind in (TrainConfig, RunOptions)
        )
        config, options = (part.check() for part in parts)
        return config, options


def parse_train(argv: list[str]) -> tuple[TrainConfig, RunOptions]:
    """The settings of these flags; with --resume what is not given is as in the run."""
    config, options = _parse(TrainArgs, "train", argv, TrainArgs()).split()
    if options.resume is None:
        return config, options
    was = TrainConfig.from_dict(load_checkpoint(options.resume)["config"])
    default = TrainArgs(**vars(was.replace(time_limit=None)), resume=options.resume)
    return _parse(TrainArgs, "train", argv, default).split()


@dataclass(frozen=True)
class CrossvalArgs(TrainArgs):
    """Compare settings by cross-validation; train the best on all training rows, test it once.

    A slash stands between values to compare, and every combination is a candidate:
    --hidden 64 / 128 64 --weight-decay 0 / 0.01. Where a value is one word the slash may be left
    out: --lr 0.1 0.5.

    Of train's options --resume, --log, --time-limit, --preset ensemble and several --networks are
    refused; tables have the preset table.
    """

    folds: int = 5
    """parts of the training rows, each held out once"""


def split_compared(argv: list[str]) -> tuple[list[str], dict[str, list[list[str]]]]:
    """(argv without what is compared, {setting: the words of each of its values}).

    Words between two slashes are one value, as `fusedmlp train` takes it. Where a value is one
    word, each word is a value.
    """
    rest: list[str] = []
    compared: dict[str, list[list[str]]] = {}
    words = list(argv)
    while words:
        flag, values = words.pop(0), []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        name, sign, first = flag.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        values = [first, *values] if sign else values
        groups: list[list[str]] = [[]]
        for word in values:
            if word == "/":
                groups.append([])
            else:
                groups[-1].append(word)
        if name in COMPARED and name not in SEQUENCES:
            groups = [[word] for group in groups for word in group]
        if not flag.startswith("--") or len(groups) < 2:
            rest += [flag, *([] if sign else values)]
        elif name not in COMPARED:
            raise UsageError(
                f"{flag_name(name)} is the same for all candidates, got {' '.join(values)}; what "
                f"can be compared: {', '.join(map(flag_name, COMPARED))}"
            )
        elif name in compared:
            raise UsageError(f"{flag_name(name)} is given twice; put / between its values")
        else:
            compared[name] = groups
    return rest, compared


def crossval(argv: list[str]) -> int:
    def parse(flags: list[str]) -> CrossvalArgs:
        return _parse(CrossvalArgs, "crossval", flags, CrossvalArgs())

    rest, compared = split_compared(argv)
    args = parse(rest)
    config, options = args.split()
    values = {
        name: [getattr(parse([flag_name(name), *words]), name) for words in groups]
        for name, groups in compared.items()
    }
    crossvalidation.crossval(
        config, values, options, folds=args.folds, progress=crossval_report.Report()
    )
    return 0


def train(argv: list[str]) -> int:
    config, options = parse_train(argv)
    result = loop.run(config, options, progress=Console())
    return INTERRUPTED if result.interrupted else 0


def compare(argv: list[str]) -> int:
    args = _parse(CompareArgs, "compare", argv)
    if not args.runs:
        raise UsageError("compare needs run folders: fusedmlp compare runs/0001 runs/0002")
    Console().show(comparison.table(list(args.runs)))
    return 0


def _trained(folder: Path, device: str) -> inference.Trained:
    return inference.load(folder, pick_device(TrainConfig(device=device)))


def evaluate(argv: list[str]) -> int:
    args = _parse(EvaluateArgs, "evaluate", argv)
    trained = _trained(args.run, args.device)
    if args.file is not None:
        name, result = args.file.name, table_files.evaluate_file(trained, args.file, _note)
    else:
        data = inference.test_data(trained, args.data_dir)
        name, result = data.name, inference.evaluate(trained, data)
    print(f"{name}: {result['rows']} test rows, loss {result['test_loss']:.6g}", end="")
    if trained.classes is not None:
        print(f", accuracy {result['test_accuracy']:.4f}")
    else:
        print(f", RMSE {result['test_rmse']:.6g}, R2 {result['test_r2']:.4f}")
    per_class = [(printable(name), *counts) for name, counts in result["per_class"].items()]
    width = max((len(name) for name, *_ in per_class), default=0)
    for name, right, rows in per_class:
        print(f"  {name:<{width}}  {right:>5} of {rows:<5} {right / rows if rows else 0:.4f}")
    return 0


def predict(argv: list[str]) -> int:
    """One line a picture or row, as csv."""
    args = _parse(PredictArgs, "predict", argv)
    if args.rows < 0:
        raise UsageError(f"--rows must be at least 0, got {args.rows}")
    if args.invert and not args.images:
        raise UsageError("--invert belongs to --images")
    if args.file is None and (args.out is not None or args.proba):
        raise UsageError(
            f"--{'proba' if args.out is None else 'out'} belongs to a table to predict"
        )
    if args.file is not None and args.images:
        raise UsageError("a table and --images cannot be predicted at once; leave out one of them")
    trained = _trained(args.run, args.device)
    if args.file is not None:
        count = table_files.predict_file(trained, args.file, args.out, args.proba, _note)
        if args.out is not None:
            print(f"{args.out}: {count} rows predicted")
        return 0
    if args.images:
        if trained.classes is None:
            raise TrainError(f"--images needs a run with classes, but {args.run} predicts a number")
        rows, notes = inference.read_images(trained, list(args.images), args.invert)
        for note in notes:
            _note(note)
        _write_classes(trained, [str(f) for f in args.images], "image", rows, None)
        return 0
    data = inference.test_data(trained, args.data_dir)
    count = len(data.x_test) if args.rows == 0 else min(args.rows, len(data.x_test))
    x, y = data.x_test[:count], data.y_test[:count]
    names, columns = [str(i) for i in range(count)], inference.columns_of(data)
    if trained.classes is None:
        _write_numbers(trained, names, x, y, columns)
    else:
        _write_classes(trained, names, "row", x, y, columns)
    return 0


def _note(text: str) -> None:
    print(f"note: {printable(text)}", file=sys.stderr)


def _write_classes(trained, names, heading, rows, targets, columns=None) -> None:
    probability, predicted = trained.outputs(rows, columns).softmax(1).max(1)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    true = [] if targets is None else ["true"]
    writer.writerow([heading, "predicted", "probability", *true])
    for index, name in enumerate(names):
        is_true = [] if targets is None else [trained.classes[targets[index]]]
        writer.writerow(
            [name, trained.classes[predicted[index]], f"{probability[index]:.4f}", *is_true]
        )


def _write_numbers(trained, names, rows, targets, columns) -> None:
    """Predictions and targets, both in the target's own units."""
    outputs = trained.target_scaling.undo(trained.outputs(rows, columns))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    columns = range(outputs.shape[1])
    suffix = [""] if len(columns) == 1 else [f"_{i}" for i in columns]
    writer.writerow(["row", *(f"predicted{s}" for s in suffix), *(f"true{s}" for s in suffix)])
    for index, name in enumerate(names):
        values = [*outputs[index].tolist(), *targets[index].tolist()]
        writer.writerow([name, *(f"{value:.9g}" for value in values)])
