"""The tables of README.md and docs/: the text of each from the rows of a results file.

Where figures become text for people, with evidence_tables.py, which is of many files together;
report.py puts the tables into the documents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

# What each column of a table is called, and what stands in it for a row (or a group of rows).
Columns = dict[str, Callable[..., object]]

# Column heads of the providers whose speed-up over eager is shown, in this order.
_PROVIDERS = {
    "auto": "fused",
    "op": "op alone",
    "native": "native",
    "triton": "triton",
    "reference": "reference",
    "compile": "compile",
    "max-autotune": "max-autotune",
    "graph": "graph of eager",
    "auto graph": "graph of fused",
    "addmm": "addmm",
}
_CASE = ("group", "op", "mode", "M", "dims", "act", "p", "dtype", "device", "cache")
NEVER_BELOW = 0.97  # the bound of the never-slower grid
_LOWEST = 10  # cells of the grid that are shown


def markdown(columns: Columns, items: Iterable, left: int = 1) -> str:
    """A table with a line for each item; the first `left` columns are text, the others numbers."""
    rule = [":--"] * left + ["--:"] * (len(columns) - left)
    lines = [[cell(make(item)) for make in columns.values()] for item in items]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [list(columns), rule, *lines])


def cell(value) -> str:
    """Three numbers are median (p20-p80)."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) == 3:
        return spread(value)
    return str(value)


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(three: list[float], shown: Callable[[float], str] = digits) -> str:
    """median (p20-p80)"""
    return "{} ({}–{})".format(*map(shown, three))


def name_of(text: str | None) -> str:
    return (text or "").replace("_", "\\_")


def _micros(column: str) -> Callable[[dict], str]:
    """The median of a column of microseconds."""
    return lambda r: f"{r[column][0]:.0f}" if r[column][0] >= 100 else f"{r[column][0]:.3g}"


def at(column: str) -> Callable[[dict], object]:
    return lambda row: row.get(column)


# --- ops and networks: bench.run ------------------------------------------------------------------


def key(columns: dict) -> tuple:
    """What tells a case from another in a results file."""
    return tuple(str(columns.get(name)) for name in _CASE)


def _p(row: dict) -> str:
    return "/".join(f"{p:g}" for p in row["p"])


def _shape(row: dict) -> str:
    return f"{row['op']} {row['M']} x {'-'.join(map(str, row['dims']))}"


_CALL: Columns = {
    "": lambda r: name_of(_shape(r)),
    "activation": lambda r: name_of(r.get("act")),
    "p": _p,
    "dtype": lambda r: r["dtype"],
    "mode": lambda r: r["mode"] + (", cold" if r["cache"] == "cold" else ""),
}


def group_table(rows: list[dict]) -> str:
    """Speed-up over eager of every provider, and distance from the floor; a step is read by its
    wall clock."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["mode"] != "step" or row.get("clock") != "device":
            found.setdefault(key(row), {})[row["provider"]] = row
    cases = list(found.values())

    def call(make):
        return lambda case: make(next(iter(case.values())))

    def faster(name: str):
        def made(case):
            row = case.get(name, {})
            return "wrong" if "error" in row else row.get("eager_over_this")

        return made

    def is_shown(case, name: str) -> bool:
        """A backend that automatic choice ran is not shown twice."""
        return "ms" in case.get(name, {}) and case.get("auto", {}).get("route") != name

    columns = {head: call(make) for head, make in _CALL.items()}
    columns["eager, ms"] = lambda c: digits(c["eager"]["ms"]) if "ms" in c.get("eager", {}) else "–"
    for name, head in _PROVIDERS.items():
        if any(is_shown(case, name) for case in cases):
            columns[f"eager / {head}"] = faster(name)
    if any("over_floor" in case.get("auto", {}) for case in cases):
        columns["fused / floor"] = lambda case: case.get("auto", {}).get("over_floor")
    return markdown(columns, cases, len(_CALL))


def describe(row: dict) -> str:
    """A row's case in a few words."""
    return f"{_shape(row)} {row.get('act', '')} p={_p(row)} {row['dtype']} {row['mode']}"


def grid_summary(rows: list[dict]) -> tuple[str, float]:
    """One line on the lowest cell of the grid, and its ratio."""
    cells = [r for r in rows if r["group"] == "grid" and r["provider"] == "auto"]
    timed = sorted((r for r in cells if "ms" in r), key=lambda r: r["eager_over_this"][0])
    if not timed:
        return "grid: no cell was timed", float("nan")
    ratios = [r["eager_over_this"][0] for r in timed]
    below = sum(ratio < NEVER_BELOW for ratio in ratios)
    return (
        f"grid: eager / fused over {len(timed)} cells: lowest {ratios[0]:.3f} at "
        f"{describe(timed[0])}, median {ratios[len(timed) // 2]:.2f}, highest {ratios[-1]:.2f}; "
        f"{below} below {NEVER_BELOW}; {len(cells) - len(timed)} without a figure"
    ), ratios[0]


def grid_table(rows: list[dict]) -> str:
    """The never-slower grid: one line on all of it, its lowest cells, and those that are wrong."""
    rows = [row for row in rows if row["provider"] == "auto"]
    timed = sorted((r for r in rows if "ms" in r), key=lambda r: r["eager_over_this"][0])
    shown = timed[:_LOWEST]
    text = f"{grid_summary(rows)[0]} (bound: {NEVER_BELOW}). The {len(shown)} lowest:\n\n"
    columns = _CALL | {"runs on": lambda r: r.get("route", "")}
    columns["eager / fused"] = lambda r: (
        "wrong" if "error" in r else spread(r["eager_over_this"], "{:.3f}".format)
    )
    lines = shown + [r for r in rows if "error" in r]
    return text[0].upper() + text[1:] + markdown(columns, lines, len(columns) - 1)


# --- tables of one kind of row --------------------------------------------------------------------


def _engine_table(rows: list[dict]) -> str:
    """The native step engine, bench.steps: against its GEMMs and eager, threads, or an ensemble."""
    columns: Columns = {"network": at("case"), "threads": at("threads")}
    if any(r.get("busy") for r in rows):
        columns["busy programs"] = at("busy")
    micros = _micros("native_us")
    if any("starts" in r for r in rows):
        columns["starts"], micros = at("starts"), at("native_us")
    if rows[0]["group"] == "threads":
        columns |= {"native, µs": micros, "times faster than with 1": at("faster")}
    elif rows[0]["group"] == "ensemble":
        columns |= {"networks": at("members"), "a step of each, µs": micros}
        columns |= {"over one network": at("over_one")}
        each = lambda r: [ratio / r["members"] for ratio in r["over_one"]]  # noqa: E731
        columns["a network, over one alone"] = each
    else:
        columns |= {"native, µs": micros, "its GEMMs, µs": _micros("gemms_us")}
        columns |= {"eager, µs": _micros("eager_us"), "native / GEMMs": at("over_gemms")}
        columns["eager / native"] = at("over_eager")
    if any("bf16_us" in r for r in rows):
        columns |= {"in bf16, µs": _micros("bf16_us"), "fp32 / bf16": at("over_bf16")}
        columns["share of peak of bf16"] = at("bf16 share of peak")
    if any("over_quiet" in r for r in rows):
        columns["over quiet"] = at("over_quiet")
    if any("share of peak" in r for r in rows):
        columns["share of peak"] = at("share of peak")
    return markdown(columns, rows)


def _saved_bytes_table(rows: list[dict]) -> str:
    """Bytes per element of a layer's output, in fp32 with dropout."""
    per = lambda name: lambda r: f"{r[name] / r['elements']:.2f}"  # noqa: E731
    columns: Columns = {"activation": lambda r: name_of(r["act"]), "eager, CPU": per("eager_cpu")}
    columns |= {"eager, GPU": per("eager_cuda"), "fused": per("fused_cpu")}
    columns["eager / fused, CPU"] = lambda r: f"{r['eager_cpu'] / r['fused_cpu']:.2f}"
    return markdown(columns, [r for r in rows if r["dtype"] == "fp32" and r["p"]])


def _crossval_table(rows: list[dict]) -> str:
    """Time and score of every way to choose a model; ratios are over this package's of one task."""
    columns: Columns = {"": at("what")}
    columns |= {name: at(name) for name in ("way", "seconds", "time over fusedmlp's")}
    columns["score"] = lambda r: f"{r['score is']} {r['score']:.2%}"
    return markdown(columns | {"rounds": at("rounds")}, rows, 2)


def train_table(rows: list[dict], seeds: list[dict]) -> str:
    """Time of every way to train, beside its test accuracy over seeds (seeds.json)."""
    of = {(row["network"], row["way"]): row for row in seeds}

    def accuracy(row) -> str | None:
        found = of.get((row["network"], row["way"]))
        return found and f"{found['mean']:.4f} ± {found['deviation']:.4f}"

    names = ["network", "way", "seconds", "time over fusedmlp's", "compile, s", "busy", "rounds"]
    names = [name for name in names if any(name in row for row in rows)]
    columns: Columns = {name: at(name) for name in names} | {"test accuracy": accuracy}
    columns["seeds"] = lambda r: of.get((r["network"], r["way"]), {}).get("seeds")
    return markdown(columns, rows, 2)


def _plain_table(rows: list[dict]) -> str:
    """Every column of every row as it is."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = [name for name in names if any(isinstance(row.get(name), str) for row in rows)]
    ordered = text + [name for name in names if name not in text]
    return markdown({name.replace("_", " "): at(name) for name in ordered}, rows, len(text))


# --- compiled kernels -----------------------------------------------------------------------------


def by(rows: Iterable[dict], *names: str) -> list[list[dict]]:
    """Rows that have these columns in common, in the order of their first."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name, "") for name in names), []).append(row)
    return list(found.values())


def _range(column: str, shown: Callable = lambda value: value) -> Callable[[list[dict]], str]:
    """Least and greatest of a column; a kernel that did not compile has no figures."""

    def made(rows):
        values = [shown(r[column]) for r in rows if column in r]
        low, high = min(values, default=None), max(values, default=None)
        return None if low is None else f"{low:g}" if low == high else f"{low:g}–{high:g}"

    return made


def _kib(size: float) -> float:
    return round(size / 1024, 1)


_KINDS = {"half": "16-bit", "tf32": "tf32", "ieee": "ieee fp32", "": "–"}


def _units(rows: list[dict]) -> str | None:
    return ", ".join(sorted({t for r in rows for t in r.get("tensor_core", "").split(", ")} - {""}))


def _triton_table(rows: list[dict]) -> str:
    """One line for each target, op and kind of product; what is wrong is counted, not left out."""
    columns: Columns = {
        "target": lambda g: g[0]["target"],
        "op": lambda g: name_of(g[0]["op"]),
        "product": lambda g: _KINDS[g[0].get("kind", "")],
        "compiled": len,
        "registers": _range("registers"),
        "local memory, bytes": _range("local_bytes"),
        "shared memory, KiB": _range("shared_bytes", _kib),
        "tensor cores": lambda g: _units(g) or None,
        "wrong": lambda g: sum(bool(r["wrong"]) for r in g),
    }
    return markdown(columns, by(rows, "target", "op", "kind"), 3)


def _cuda_table(rows: list[dict]) -> str:
    """One line for each kernel and architecture, its variants together."""
    in_order = sorted(rows, key=lambda r: (r["kernel"], int(re.sub(r"\D", "", r["arch"]))))
    columns: Columns = {
        "kernel": lambda g: name_of(g[0]["kernel"]),
        "architecture": lambda g: g[0]["arch"],
        "variants": len,
        "registers": _range("registers"),
        "local memory, bytes": _range("local"),
        "accesses to it": _range("spills"),
        "shared memory, KiB": _range("shared", _kib),
        "tensor-core instructions": _range("tensor_core"),
    }
    return markdown(columns, by(in_order, "kernel", "arch"), 2)


_WORDS = {"LOP3": "logic", "IMAD": "multiply", "FMUL": "scale", "FSEL": "select", "SEL": "select"}
_WORDS |= {"ISETP": "compare", "PRMT": "pack", "F2FP": "to 16 bits", "MOV": "move", "SHF": "shift"}


def _largest_shares(row: dict) -> str:
    shares: dict[str, float] = {}
    for name, value in row["by_instruction"].items():
        name = _WORDS.get(name, name)
        shares[name] = shares.get(name, 0.0) + value
    largest = sorted(shares.items(), key=lambda item: -item[1])[:5]
    return ", ".join(f"{name} {value:.1f}" for name, value in largest)


def _dropout_table(rows: list[dict]) -> str:
    """What dropout adds to a kernel, an element."""
    columns: Columns = {
        "kernel": lambda r: name_of(r["kernel"].removesuffix("_kernel")),
        "dtype": at("dtype"),
        "target": at("target"),
        "tile": lambda r: r["tile"].replace("x", " x "),
        "largest shares": _largest_shares,
        "instructions without": at("without"),
        "with": at("with"),
        "more, an element": lambda r: f"{r['per_element']:.1f}",
    }
    return markdown(columns, rows, 5)


def _never_slower_table(rows: list[dict]) -> str:
    """Networks drawn at random: how many cells are slower than eager, and the lowest of them."""
    lines = []
    for name in ("step", "infer"):
        part = [row for row in rows if (row["mode"] == "infer") == (name == "infer")]
        ratios = sorted(row["eager_over_this"][0] for row in part)
        if not ratios:
            continue
        below = {
            f"below {bound:g}": f"{sum(r < bound for r in ratios) / len(ratios):.1%}"
            for bound in (0.97, 0.93)
        }
        lowest = {"lowest": ratios[0], "median": ratios[len(ratios) // 2], "highest": ratios[-1]}
        lines.append({"mode": name, "networks": len(ratios)} | lowest | below)
    shown = sorted(rows, key=lambda row: row["eager_over_this"][0])[:_LOWEST]
    columns = _CALL | {"runs on": at("route")}
    columns["eager / fused"] = lambda r: spread(r["eager_over_this"], "{:.3f}".format)
    worst = markdown(columns, shown, len(columns) - 1)
    totals = markdown({name: at(name) for name in lines[0]}, lines, 1) if lines else ""
    return f"{totals}\nThe {len(shown)} lowest:\n\n{worst}"


# By the name of a results file; every other file is a plain table.
OF_FILE = {
    "engine_step": _engine_table,
    "saved_bytes": _saved_bytes_table,
    "crossval": _crossval_table,
    "never_slower": _never_slower_table,
    "kernels": _triton_table,
    "cuda_kernels": _cuda_table,
    "dropout_instructions": _dropout_table,
}


def of_file(name: str, rows: list[dict]) -> str:
    return OF_FILE.get(name, _plain_table)(rows)
