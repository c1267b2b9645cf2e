"""Preparation: how the columns of a table become inputs of a network, fitted on training rows.

number, truth, date   (x - center) * scale, cut smoothly: z / sqrt(1 + (z / 3)^2). center is the
                      median, scale 1 / (q75 - q25), or 2 / (max - min) where the quartiles are
                      equal; a missing one is filled with the median and has a flag beside it. The
                      formulas are those of RealMLP (Holzmueller, Grinsztajn, Steinwart: Better by
                      Default, 2024, arXiv 2407.04491). Of a date: the time, and sine and cosine of
                      the year, the week and the day
words                 an input each, 0 or 1, up to ONE_HOT words; a missing one is a word too. Of
                      more than FEW words those of fewer than RARE rows share an input, which
                      unknown words have as well; without it an unknown one has zeros everywhere
more words            the mean target of the rows with that word, drawn towards that of all rows,
                      for classes the share of each: scikit-learn's TargetEncoder. For training rows
                      it is fitted out of fold. Then as numbers
Values are fp64 until they are scaled.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from ..errors import TrainError
from .columns import KINDS, Column, Schema

ONE_HOT = 50
FEW, RARE = 10, 3
MOST_WORDS = 10_000  # of a column that has more, the most frequent ones are known
MOST_CLASSES = 20  # with more, target statistics would take more inputs than words do
CLIP = 3.0
WAYS = ("number", "one-hot", "target")
_FLAG = "missing"
_DAY = 86_400.0
_CYCLES = {"year": 365.2425 * _DAY, "week": 7 * _DAY, "day": _DAY}


@dataclass(frozen=True)
class Part:
    """One column, and its inputs."""

    column: Column  # of words: with the levels that are kept
    way: str  # one of WAYS
    names: tuple[str, ...]  # of the inputs
    kept: tuple[int, ...] = ()  # number: which of the column's numbers vary
    center: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    has_flag: bool = False  # an input says that the cell was missing
    has_rest: bool = False  # one-hot: an input for rare and unknown words
    # target: a row for each level, then one for missing, then one for rare and unknown words
    statistics: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Preparation:
    parts: tuple[Part, ...]
    is_scaled: bool
    target: Column
    left_out: tuple[str, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(part.column for part in self.parts)

    @property
    def width(self) -> int:
        return sum(len(part.names) for part in self.parts)

    def __call__(self, raw: Tensor, columns: tuple[Column, ...]) -> Tensor:
        """(n, width) fp32 of raw rows (n, k) fp64, whose columns these are."""
        place = {column.name: number for number, column in enumerate(columns)}
        inputs = torch.empty(len(raw), self.width)
        start = 0
        for part in self.parts:
            number = place[part.column.name]
            values = _recoded(raw[:, number].cpu(), columns[number], part.column)
            end = start + len(part.names)
            inputs[:, start:end] = _inputs(part, values, self.is_scaled)
            start = end
        return inputs

    def to_dict(self) -> dict:
        return {
            "parts": [asdict(part) for part in self.parts],
            "is_scaled": self.is_scaled,
            "target": asdict(self.target),
            "left_out": list(self.left_out),
        }

    @classmethod
    def from_dict(cls, listed: dict, where: str) -> "Preparation":
        """raises  TrainError for what to_dict cannot have made"""
        try:
            parts = tuple(_part(each) for each in listed["parts"])
            found = cls(
                parts,
                _checked("is_scaled", listed["is_scaled"], bool),
                _column(listed["target"]),
                tuple(_checked("left_out", name, str) for name in listed["left_out"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise TrainError(f"{where}: the preparation of its table is damaged: {what}") from error
        return found


def fit(
    schema: Schema, raw: Tensor, y: Tensor, classes: int | None, is_scaled: bool, seed: int
) -> tuple[Preparation, Tensor, list[str]]:
    """(preparation, inputs of these rows, notes).

    raw      (n, k) fp64 training rows
    y        (n,) int64 classes or (n, 1) floats
    classes  how many there are; None for regression
    seed     of the folds of target statistics
    raises   TrainError where no column is left
    """
    parts, blocks, constant = [], [], []
    for number, column in enumerate(schema.columns):
        values = raw[:, number].cpu()
        if column.kind == "words":
            part, inputs = _fit_words(column, values, y.cpu(), classes, is_scaled, seed)
        else:
            part = _fit_numbers(column, values)
            inputs = None if part is None else _inputs(part, values, is_scaled)
        if part is None:
            constant.append(column.name)
        else:
            parts.append(part)
            blocks.append(inputs.float())
    notes = []
    if constant:
        notes = [f"left out, with one value in all training rows: {', '.join(constant)}"]
    if not parts:
        raise TrainError(
            f"no column is left to predict {schema.target.name} from: {'; '.join(notes)}"
        )
    left_out = (*schema.left_out, *constant)
    return (
        Preparation(tuple(parts), is_scaled, schema.target, left_out),
        torch.cat(blocks, dim=1),
        notes,
    )


def _numbers(column: Column, values: Tensor) -> tuple[Tensor, list[str]]:
    """((n, p) fp64, names): what a column of numbers or dates is looked at as."""
    if column.kind != "date":
        return values.unsqueeze(1), [column.name]
    found, names = [values], [column.name]
    for cycle, seconds in _CYCLES.items():
        angle = 2 * math.pi * (values / seconds).frac()
        found += [angle.sin(), angle.cos()]
        names += [f"{column.name} {cycle} sine", f"{column.name} {cycle} cosine"]
    return torch.stack(found, dim=1), names


def _fit_numbers(column: Column, values: Tensor) -> Part | None:
    numbers, names = _numbers(column, values)
    missing = values.isnan()
    if missing.all():
        return None
    spread = numbers[~missing].amax(0) - numbers[~missing].amin(0)
    kept = tuple(i for i, width in enumerate(spread.tolist()) if width > 1e-9 * (i > 0))
    has_flag = bool(missing.any())
    if not kept and not has_flag:
        return None
    center, scale = _robust(numbers[:, kept]) if kept else ((), ())
    shown = [names[i] for i in kept] + [f"{column.name} {_FLAG}"] * has_flag
    return Part(column, "number", tuple(shown), kept, center, scale, has_flag)


def _robust(numbers: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(center, scale) of each of the columns (n, p) fp64, missing ones left aside."""
    import numpy as np

    robust = _sklearn("preprocessing").RobustScaler().fit(numbers.numpy())
    quartiles = np.nanquantile(numbers.numpy(), (0.25, 0.75), axis=0)
    whole = np.nanmax(numbers.numpy(), axis=0) - np.nanmin(numbers.numpy(), axis=0)
    scale = np.where(quartiles[0] == quartiles[1], 2 / np.where(whole > 0, whole, 1), 0)
    scale = np.where(scale == 0, 1 / robust.scale_, scale)
    return tuple(robust.center_.tolist()), tuple(scale.tolist())


def _sklearn(module: str):
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise TrainError(
            f"a table needs scikit-learn ({error}): pip install 'fusedmlp[train]'"
        ) from error


def _fit_words(
    column: Column, values: Tensor, y: Tensor, classes: int | None, is_scaled: bool, seed: int
) -> tuple[Part | None, Tensor | None]:
    missing = values.isnan()
    has_flag = bool(missing.any())
    counts = torch.bincount(values[~missing].long(), minlength=len(column.levels))
    seen = int((counts > 0).sum())
    frequent = torch.nonzero(counts >= (RARE if seen > FEW else 1)).flatten()
    most = counts[frequent].argsort(descending=True, stable=True)
    if seen + has_flag < 2:
        return None, None
    distinct = 2 if classes is None else len(y.unique())
    by_target = len(frequent) > ONE_HOT and 2 <= distinct <= MOST_CLASSES
    limit = MOST_WORDS if by_target else ONE_HOT
    # Sorted, so that the inputs stand in an order that people can follow.
    frequent = frequent[most[:limit]].sort().values
    has_rest = seen > len(frequent)
    if len(frequent) + has_flag + has_rest < 2:
        return None, None  # every word is rare
    kept = column.replace(levels=tuple(column.levels[i] for i in frequent.tolist()))
    codes = _recoded(values, column, kept)
    if by_target:
        return _fit_target(kept, codes, y, classes, is_scaled, seed)
    names = [f"{column.name}={level}" for level in kept.levels]
    names += [f"{column.name} {_FLAG}"] * has_flag + [f"{column.name} other"] * has_rest
    part = Part(kept, "one-hot", tuple(names), has_flag=has_flag, has_rest=has_rest)
    return part, _inputs(part, codes, is_scaled)


def _fit_target(
    column: Column, codes: Tensor, y: Tensor, classes: int | None, is_scaled: bool, seed: int
) -> tuple[Part, Tensor]:
    """A row does not see its own target: its statistics are those of the other four fifths."""
    places = _places(codes, len(column.levels))
    if classes is None:
        targets = y.double().reshape(len(y), -1)
    else:  # of two classes one says it all
        distinct = y.unique()
        targets = (y.unsqueeze(1) == distinct[1 if len(distinct) == 2 else 0 :]).double()
    folds = _sklearn("model_selection").KFold(5, shuffle=True, random_state=seed)
    found = torch.empty_like(targets)
    for rest, held in folds.split(places):
        found[held] = _statistics(places[rest], targets[rest], len(column.levels))[places[held]]
    statistics = _statistics(places, targets, len(column.levels))
    center, scale = _robust(found)
    ends = [""] if targets.shape[1] == 1 else [f" {int(c)}" for c in distinct]
    part = Part(
        column,
        "target",
        tuple(f"{column.name} target{end}" for end in ends),
        center=center,
        scale=scale,
        statistics=tuple(map(tuple, statistics.tolist())),
    )
    return part, _scaled(part, found, is_scaled)


def _statistics(places: Tensor, targets: Tensor, levels: int) -> Tensor:
    """(levels + 2, k): the mean of the targets (n, k) at each place, drawn towards that of all."""
    found = targets.mean(0).repeat(levels + 2, 1)
    for output, target in enumerate(targets.T):
        encoder = _sklearn("preprocessing").TargetEncoder(target_type="continuous")
        encoder.fit(places.numpy()[:, None], target.numpy())
        found[torch.from_numpy(encoder.categories_[0]), output] = torch.from_numpy(
            encoder.encodings_[0]
        )
    return found


def _recoded(values: Tensor, was: Column, now: Column) -> Tensor:
    """Words as places among other levels."""
    if was.kind != "words" or was.levels == now.levels:
        return values
    index = {level: float(place) for place, level in enumerate(now.levels)}
    table = [index.get(level, -1.0) for level in was.levels]
    table = torch.tensor([*table, -1.0, math.nan], dtype=torch.float64)  # unknown, missing
    places = torch.where(values < 0, len(was.levels), values.nan_to_num(len(was.levels) + 1))
    return table[places.long()]


def _places(codes: Tensor, levels: int) -> Tensor:
    """(n,) int64: the level, or `levels` for missing, or `levels` + 1 for another word."""
    return torch.where(codes < 0, levels + 1, codes.nan_to_num(levels)).long()


def _inputs(part: Part, values: Tensor, is_scaled: bool) -> Tensor:
    """(n, inputs of the part) of values (n,) fp64 as its column has them."""
    levels = len(part.column.levels)
    if part.way == "number":
        numbers = _numbers(part.column, values)[0][:, part.kept]
        found = _scaled(part, numbers, is_scaled)
        return (
            torch.cat([found, values.isnan().double().unsqueeze(1)], 1) if part.has_flag else found
        )
    places = _places(values, levels)
    if part.way == "target":
        statistics = torch.tensor(part.statistics, dtype=torch.float64)
        return _scaled(part, statistics[places], is_scaled)
    # A missing word is as an unknown one where training had none.
    flags = torch.zeros(len(places), levels + 2).scatter_(1, places.unsqueeze(1), 1.0)
    missing, rest = flags[:, levels], flags[:, levels + 1]
    if not part.has_flag:
        rest = rest + missing
    chosen = [flags[:, :levels]]
    chosen += [missing.unsqueeze(1)] * part.has_flag + [rest.unsqueeze(1)] * part.has_rest
    return torch.cat(chosen, 1)


def _scaled(part: Part, numbers: Tensor, is_scaled: bool) -> Tensor:
    center = torch.tensor(part.center, dtype=torch.float64)
    if not is_scaled:
        return torch.where(numbers.isnan(), center, numbers)
    z = (numbers - center) * torch.tensor(part.scale, dtype=torch.float64)
    # hypot does not overflow where a square would.
    return (z / torch.hypot(torch.ones(()), z / CLIP)).nan_to_num(0.0)


def _part(listed: dict) -> Part:
    """raises  KeyError, TypeError, ValueError for what is none"""
    known = {field.name for field in fields(Part)}
    if set(listed) != known:
        raise KeyError(", ".join(sorted(known ^ set(listed))))
    column = _column(listed["column"])
    part = replace(
        Part(**{**listed, "column": column}),
        names=tuple(_checked("names", n, str) for n in listed["names"]),
        kept=tuple(_checked("kept", n, int) for n in listed["kept"]),
        center=tuple(map(_finite, listed["center"])),
        scale=tuple(map(_finite, listed["scale"])),
        statistics=tuple(tuple(map(_finite, row)) for row in listed["statistics"]),
    )
    if part.way not in WAYS:
        raise ValueError(f"the way of {column.name!r} must be one of {', '.join(WAYS)}")
    levels, outputs = len(column.levels), len(part.center)
    wanted = {
        "number": len(part.kept) + part.has_flag,
        "one-hot": levels + part.has_flag + part.has_rest,
        "target": outputs,
    }[part.way]
    if part.way == "target" and {len(row) for row in part.statistics} != {outputs}:
        raise ValueError(f"the statistics of {column.name!r} have other lengths than its scale")
    is_whole = len(part.statistics) == (levels + 2 if part.way == "target" else 0)
    has_scale = outputs == len(part.scale) == (0 if part.way == "one-hot" else len(part.scale))
    fits = part.way != "number" or outputs == len(part.kept)
    if not (len(part.names) == wanted and is_whole and has_scale and fits):
        raise ValueError(f"the numbers of {column.name!r} do not fit one another")
    return part


def _column(listed: dict) -> Column:
    column = Column(**listed)
    if column.kind not in KINDS:
        raise ValueError(f"the kind of {column.name!r} must be one of {', '.join(KINDS)}")
    words: Iterable = (column.name, column.style, *column.levels, *column.blanks)
    for word in words:
        _checked("a column", word, str)
    return column.replace(levels=tuple(column.levels), blanks=tuple(column.blanks))


def _checked(name: str, value, kind: type):
    if type(value) is not kind:
        raise TypeError(f"{name} must hold {kind.__name__}, got {type(value).__name__}")
    return value


def _finite(value) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"its numbers must be finite, got {value}")
    return float(value)
