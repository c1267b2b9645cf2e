"""Tables of docs/ about the native step engine: (head, rows, columns of text), from results files
of engine_step.py."""

from __future__ import annotations

from collections.abc import Callable

Table = tuple[list[str], list[list[str]], int]
Shown = Callable[[list[float]], str]


def _micros(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _steps(rows: list[dict], spread: Shown) -> Table:
    head = ["network", "threads", "native, µs", "its GEMMs, µs", "eager, µs"]
    head += ["native / GEMMs", "eager / native"]
    lines = []
    for row in rows:
        times = [_micros(row[f"{name}_us"][0]) for name in ("native", "gemms", "eager")]
        ratios = [spread(row["over_gemms"]), spread(row["over_eager"])]
        lines.append([row["case"], str(row["threads"]), *times, *ratios])
    return head, lines, 1


def _threads(rows: list[dict], spread: Shown) -> Table:
    head = ["network", "threads", "native, µs", "times faster than with 1"]
    lines = []
    for row in rows:
        cells = [str(row["threads"]), _micros(row["native_us"][0]), spread(row["faster"])]
        lines.append([row["case"], *cells])
    return head, lines, 1


def _ensemble(rows: list[dict], spread: Shown) -> Table:
    head = ["network", "threads", "networks", "a step of each, µs", "over one network"]
    head += ["a network, over one alone"]
    lines = []
    for row in rows:
        each = [ratio / row["members"] for ratio in row["over_one"]]
        cells = [str(row["threads"]), str(row["members"]), _micros(row["native_us"][0])]
        lines.append([row["case"], *cells, spread(row["over_one"]), spread(each)])
    return head, lines, 1


_GROUPS = {"threads": _threads, "ensemble": _ensemble}


def rows_of(found: dict, name: str) -> list[dict]:
    """Of the table engine-GROUP in a results file; none where that is not its kind."""
    if found["name"] != "engine_step" or not name.startswith("engine-"):
        return []
    return [row for row in found["rows"] if row["group"] == name.removeprefix("engine-")]


def table(rows: list[dict], spread: Shown) -> Table:
    """rows: of one group; spread: how a median with p20 and p80 is written."""
    return _GROUPS.get(rows[0]["group"], _steps)(rows, spread)
