"""Columns of a table: what kind each is, which are left out, and its cells as fp64 numbers.

A missing cell is NaN. A word is the place of the word among the levels of its column, or UNKNOWN.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import TrainError, printable

KINDS = ("number", "truth", "words", "date")
UNKNOWN = -1.0  # a word that is none of the levels
# What a cell without a value holds in the files of pandas, R, SQL, SAS and the UCI repository.
MISSING = (
    *("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "-nan", "NULL", "null", "None"),
    *("?", "."),
)
MAX_BLANKS = 20  # different words among the numbers of a column that may stand for a missing one
_LARGEST = 3.4028234663852886e38  # of fp32
_INDEX_NAMES = ("", "index", "rownames", "row.names", "row_names", "__index_level_0__")
_ID_NAME = re.compile(r"(?:^|[_ .-])id$|Id$|ID$|^Unnamed: \d+$")
_DECIMAL_COMMA = r"[+-]?\d*(?:,\d+)?(?:[eE][+-]?\d+)?"
_THOUSANDS = r"[+-]?\d{1,3}(?:,\d{3})*(?:\.\d*)?"
_DATE_LIKE = re.compile(r"\d{1,4}[-/.]\d{1,2}(?:[-/.]\d{1,4})?\b")
_DATE_FORMATS = tuple(
    day + time
    for day in ("%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%d-%m-%Y")
    for time in ("", " %H:%M", " %H:%M:%S")
)


@dataclass(frozen=True)
class Column:
    """How the cells of one column are read, now and at prediction."""

    name: str
    kind: str  # one of KINDS
    levels: tuple[str, ...] = ()  # words: the words that are known
    style: str = "plain"  # numbers: plain, decimal comma or thousands (1,234.5)
    blanks: tuple[str, ...] = ()  # numbers: words that stand for a missing one
    format: str | None = None  # dates that are written: as strptime has it, or ISO8601

    def replace(self, **changes) -> "Column":
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Schema:
    """The columns of raw rows, in order; the target; and what the table has besides."""

    columns: tuple[Column, ...]
    target: Column
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """The cells of a column as text: codes (n,) int64, places among the different texts, or -1
    for a missing cell."""

    codes: object
    texts: list[str]

    @property
    def present(self) -> int:
        return int((self.codes >= 0).sum())

    def row(self, place: int) -> int:
        """The number of the first row that has this text; row 1 is the one below the header."""
        return int((self.codes == place).argmax()) + 1


def text_of(series, missing: Sequence[str] = MISSING) -> Text:
    import numpy as np
    import pandas as pd

    values = series.astype(object)
    try:
        first, distinct = pd.factorize(values)
    except TypeError:  # lists and dicts have no hash
        first, distinct = pd.factorize(values.map(str, na_action="ignore"))
    if not len(distinct):
        return Text(np.full(len(series), -1), [])
    written = [v.strip() if type(v) is str else _written(v) for v in distinct]
    codes, texts = pd.factorize(np.array(written, dtype=object))
    texts = list(texts)
    absent = set(missing)
    kept = [place for place, text in enumerate(texts) if text not in absent]
    places = np.full(len(texts) + 1, -1)  # the last one is that of a missing cell
    places[kept] = np.arange(len(kept))
    return Text(places[np.append(codes, len(texts))[first]], [texts[place] for place in kept])


def _written(value) -> str:
    """As a csv file would have it: whole numbers without a point."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    try:
        return str(value).strip()
    except ValueError:  # an integer of more digits than Python writes
        return "inf"


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # Python's own way to group digits


def shown(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 40 else f"{text[:40]}..."


def recognise(name: str, series, where: str) -> tuple[Column | None, str]:
    """(column, note): None where the column is to be left out, and why; else what a reader may not
    expect of it, or nothing."""
    import pandas as pd

    dtype, kinds = series.dtype, pd.api.types
    if kinds.is_bool_dtype(dtype):
        return Column(name, "truth"), ""
    if kinds.is_complex_dtype(dtype):
        raise TrainError(f"{where}: column {name!r} must hold numbers or words, got {dtype}")
    if kinds.is_numeric_dtype(dtype) or kinds.is_timedelta64_dtype(dtype):
        reason = _reason_against_numbers(name, series)
        return (None, reason) if reason else (Column(name, "number"), "")
    if kinds.is_datetime64_any_dtype(dtype):
        return Column(name, "date"), ""
    text = text_of(series)
    if not text.texts:
        return None, "it has no values"
    return _recognise_text(name, text, where)


def _reason_against_numbers(name: str, series) -> str:
    import numpy as np

    if not len(series) or series.isna().all():
        return "it has no values"
    if series.dtype.kind not in "iu":
        return ""
    values = series.to_numpy()
    counts = len(values) >= 10 and values[0] in (0, 1) and bool((np.diff(values) == 1).all())
    if counts:
        return "it counts the rows"
    if is_id_name(name) and len(values) >= 10 and len(np.unique(values)) == len(values):
        return "it numbers the rows"
    return ""


def is_id_name(name: str) -> bool:
    return name.lower() in _INDEX_NAMES or _ID_NAME.search(name) is not None


def _recognise_text(name: str, text: Text, where: str) -> tuple[Column | None, str]:
    import numpy as np

    texts, present = text.texts, text.present
    column = number_column(name, texts, where)
    if column is not None:
        return column, ""
    if all(t.lower() in ("true", "false") for t in texts):
        return Column(name, "truth"), ""
    found, note = date_column(name, texts)
    if found is not None:
        return found, note
    rows = np.bincount(text.codes[text.codes >= 0], minlength=len(texts))
    are_numbers = np.array([is_number(t) for t in texts])
    words = [t for t, number in zip(texts, are_numbers, strict=True) if not number]
    if are_numbers.any():
        share = rows[are_numbers].sum() / present
        first = int(np.argmin(are_numbers))
        what = f"{name} has words among its numbers, {shown(texts[first])} in row {text.row(first)}"
        if share >= 0.9 and len(words) <= MAX_BLANKS and are_numbers.sum() > 10:
            count = int(rows[~are_numbers].sum())
            return (
                Column(name, "number", blanks=tuple(words)),
                f"{what} ({count} in all): they are taken for missing numbers",
            )
    if present >= 20 and len(texts) >= 0.9 * present:
        return None, f"it has nearly as many words as rows, {len(texts)} in {present}"
    if present >= 20 and len(texts) > 0.5 * present and np.mean([len(t) for t in texts]) > 60:
        return None, "it holds long texts"
    return (
        Column(name, "words", levels=tuple(sorted(texts))),
        f"{what}: its values are taken as words" if are_numbers.any() else "",
    )


def number_column(name: str, texts: Sequence[str], where: str) -> Column | None:
    """The column of these different cells where all are numbers in one way of writing.

    raises  TrainError where 1,234 may be two numbers
    """
    import numpy as np

    column = Column(name, "number")
    if not np.isnan(parse_numbers(column, texts)).any():
        return column
    commas = [t for t in texts if "," in t]
    if not commas:
        return None
    could_be_comma = all(re.fullmatch(_DECIMAL_COMMA, t) for t in texts)
    could_be_group = all(re.fullmatch(_THOUSANDS, t) for t in texts)
    if could_be_comma and could_be_group:
        if any(re.match(r"[+-]?0\d*,", t) for t in commas):
            could_be_group = False
        else:
            raise TrainError(
                f"{where}: column {name!r} must hold numbers that can be read in one way, got "
                f"{commas[0]}, which may be {commas[0].replace(',', '.')} or "
                f"{commas[0].replace(',', '')}; write it without a comma, or name the column "
                "under --leave-out"
            )
    if could_be_comma:
        return column.replace(style="decimal comma")
    return column.replace(style="thousands") if could_be_group else None


def date_column(name: str, texts: Sequence[str]) -> tuple[Column | None, str]:
    if not all(_DATE_LIKE.match(t) for t in texts):
        return None, ""
    fitting = [f for f in ("ISO8601", *_DATE_FORMATS) if not _seconds(texts, f).isna().any()]
    if not fitting:
        return None, ""
    note = ""
    if fitting[0].startswith("%m/%d") and len(fitting) > 1:
        note = f"{name} has dates as {texts[0]}, which are read as month/day/year"
    return Column(name, "date", format=fitting[0]), note


def _seconds(values, format: str | None):
    """Seconds since 1970 as a Series, NaN for what is no date."""
    import numpy as np
    import pandas as pd

    times = pd.Series(pd.to_datetime(pd.Series(values), format=format, utc=True, errors="coerce"))
    wide = times.dt.tz_localize(None).astype("datetime64[us]")
    return (wide.astype("int64") / 1e6).where(wide.notna(), np.nan)


def encode(column: Column, series, where: str):
    """(n,) fp64 of the cells.

    raises  TrainError that names the first cell which is not of the column's kind
    """
    if column.kind == "words":
        return _encode_words(column, series, where)
    return _encode_date(column, series, where) if column.kind == "date" else _numbers(
        column, series, where
    )  # fmt: skip


def _encode_words(column: Column, series, where: str):
    import numpy as np
    import pandas as pd

    text = text_of(series)
    known = pd.Index(column.levels)
    places = known.get_indexer(text.texts) if text.texts else np.empty(0, dtype=np.int64)
    if text.texts and (places < 0).all() and all(map(is_number, text.texts)):
        if not any(map(is_number, column.levels)):
            some = ", ".join(shown(level) for level in column.levels[:3])
            _fail(where, column, f"words as in training ({some})", text, 0)
    return np.append(places.astype(np.float64), np.nan)[text.codes]


def _encode_date(column: Column, series, where: str):
    import numpy as np
    import pandas as pd

    if pd.api.types.is_datetime64_any_dtype(series.dtype):
        return _seconds(series, None).to_numpy(dtype=np.float64, copy=True)
    text = text_of(series)
    found = _seconds(text.texts, column.format or "ISO8601").to_numpy(dtype=np.float64)
    bad = np.flatnonzero(np.isnan(found))
    if len(bad):
        written = {None: "", "ISO8601": ""}.get(column.format, f" written as {column.format}")
        _fail(where, column, f"dates{written}", text, int(bad[0]))
    return np.append(found, np.nan)[text.codes]


def _numbers(column: Column, series, where: str):
    """Numbers and truth values."""
    import numpy as np
    import pandas as pd

    kinds = pd.api.types
    if kinds.is_timedelta64_dtype(series.dtype):
        series = series.dt.total_seconds()
    if kinds.is_numeric_dtype(series.dtype) and not kinds.is_complex_dtype(series.dtype):
        # A frame's own memory may be read-only, which torch does not take.
        values = np.require(series.to_numpy(dtype=np.float64, na_value=np.nan), requirements="W")
        infinite = np.flatnonzero(np.abs(values) > _LARGEST)
        if len(infinite):
            raise TrainError(
                f"{where}: column {column.name!r} must hold finite fp32 numbers, got "
                f"{shown(str(series.iloc[infinite[0]]))} in row {infinite[0] + 1} "
                f"({len(infinite)} in all); fill or drop such rows"
            )
    else:
        values = numbers_of_text(column, text_of(series, (*MISSING, *column.blanks)), where)
    if column.kind == "truth":
        odd = np.flatnonzero(~np.isnan(values) & (values != 0) & (values != 1))
        if len(odd):
            given = f"got {shown(str(series.iloc[odd[0]]))} in row {odd[0] + 1}"
            raise TrainError(f"{where}: column {column.name!r} must hold true or false, {given}")
    return values


def numbers_of_text(column: Column, text: Text, where: str):
    """(n,) fp64, as encode has them."""
    import numpy as np

    found = parse_numbers(column, text.texts)
    large = np.flatnonzero(np.abs(found) > _LARGEST)
    if len(large):
        _fail(where, column, "finite fp32 numbers", text, int(large[0]))
    bad = np.flatnonzero(np.isnan(found))
    if len(bad):
        wanted = "true or false" if column.kind == "truth" else "numbers"
        _fail(where, column, wanted, text, int(bad[0]))
    return np.append(found, np.nan)[text.codes]


def parse_numbers(column: Column, texts: Sequence[str]):
    """(n,) fp64; NaN for what is no number, as it is written in this column."""
    import numpy as np
    import pandas as pd

    if column.kind == "truth":
        truth = {"true": "1", "false": "0"}
        texts = [truth.get(t.lower(), t) for t in texts]
    elif column.style == "decimal comma":
        texts = [t.replace(",", ".") for t in texts]
    elif column.style == "thousands":
        texts = [t.replace(",", "") for t in texts]
    values = pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce")
    values = values.to_numpy(dtype=np.float64, copy=True)
    for place in np.flatnonzero(np.isnan(values)):
        if is_number(texts[place]):  # integers too long for pandas
            values[place] = float(texts[place])
    return values


def _fail(where: str, column: Column, wanted: str, text: Text, place: int):
    raise TrainError(
        f"{where}: column {column.name!r} must hold {wanted}, got {shown(text.texts[place])} in "
        f"row {text.row(place)}"
    )
