"""What a cross-validation compares: values of settings, from the command line or from Python, as
one TrainConfig for each combination.

On the command line a slash stands between values: --hidden 64 / 128 64 --lr 0.1 / 0.5. Between the
slashes stands what `fusedmlp train` takes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from .config import TrainConfig
from .errors import UsageError

# Settings that say how a network is trained, and not on what or where the run is kept.
COMPARED = (
    "hidden",
    "activation",
    "dropout",
    "init",
    "init_std",
    "optimizer",
    "lr",
    "lr_schedule",
    "warmup_epochs",
    "momentum",
    "weight_decay",
    "label_smoothing",
    "clip_norm",
    "epochs",
    "batch_size",
    "precision",
    "seed",
)
_SEVERAL = ("hidden", "dropout")  # one value of theirs is several words
SLASH = "/"


def split(argv: Sequence[str]) -> tuple[list[str], dict[str, list[list[str]]]]:
    """(argv without what is compared, {setting: the words of each of its values})."""
    rest: list[str] = []
    compared: dict[str, list[list[str]]] = {}
    words = list(argv)
    while words:
        flag = words.pop(0)
        values = []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        name, sign, first = flag.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        values = [first, *values] if sign else values
        groups = _groups(values, name)
        if not flag.startswith("--") or len(groups) < 2:
            rest += [flag, *([] if sign else values)]
            continue
        if name not in COMPARED:
            raise UsageError(
                f"--{name.replace('_', '-')} is the same for all candidates, got "
                f"{' '.join(values)}; what can be compared: {', '.join(map(flag_of, COMPARED))}"
            )
        if name in compared:
            raise UsageError(f"{flag_of(name)} is given twice; put {SLASH} between its values")
        compared[name] = groups
    return rest, compared


def _groups(words: list[str], name: str) -> list[list[str]]:
    """Words between slashes; of a setting that is one word, each word."""
    groups: list[list[str]] = [[]]
    for word in words:
        if word == SLASH:
            groups.append([])
        else:
            groups[-1].append(word)
    if name in COMPARED and name not in _SEVERAL:
        groups = [[word] for group in groups for word in group] or [[]]
    return groups


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def parsed(
    argv: Sequence[str], parse: Callable[[list[str]], TrainConfig]
) -> tuple[TrainConfig, dict[str, list]]:
    """(settings common to all, {setting: its values}); parse makes a config of flags and ends the
    program where they are wrong."""
    rest, compared = split(argv)
    common = parse(rest)
    values = {
        name: [getattr(parse([flag_of(name), *words]), name) for words in groups]
        for name, groups in compared.items()
    }
    return common, values


def candidates(config: TrainConfig, compare: Mapping[str, Sequence]) -> list[TrainConfig]:
    """One checked config for each combination, the last setting changing fastest.

    raises  UsageError for a setting that cannot be compared, for none or equal values, and where
            a combination cannot be
    """
    columns = []
    for name, values in compare.items():
        if name not in COMPARED:
            known = {field.name for field in dataclasses.fields(TrainConfig)}
            what = "is the same for all candidates" if name in known else "is no setting"
            raise UsageError(f"crossval: {name} {what}; compared can be {', '.join(COMPARED)}")
        if isinstance(values, str) or not isinstance(values, Sequence) or len(values) == 0:
            raise UsageError(f"crossval: {name} must be a list of values to compare, got {values}")
        plain = [_value(name, value) for value in values]
        twice = next((v for i, v in enumerate(plain) if v in plain[:i]), None)
        if twice is not None:
            hint = (
                f"; {flag_of(name)} takes one network's layers between two slashes"
                if name in _SEVERAL
                else ""
            )
            raise UsageError(f"crossval: {shown(twice)} is twice in {flag_of(name)}{hint}")
        columns.append([(name, value) for value in plain])
    return [config.replace(**dict(chosen)).check() for chosen in itertools.product(*columns)]


def _value(name: str, value):
    if name not in _SEVERAL:
        return value
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def shown(value) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple | list):
        return " ".join(shown(v) for v in value) or "(none)"
    return f"{value:g}" if isinstance(value, float) else str(value)
