"""The tables of what was done to the package to find faults: installs, injected faults, mutants,
fuzzing, the table of cases and long runs beside fp64."""

from __future__ import annotations

import re
from collections.abc import Callable

from . import tables


def _installs_table(rows: list[dict]) -> str:
    """A line for each environment that the package was installed in."""
    is_there = {True: "yes", False: "no"}
    columns: tables.Columns = {
        "row": tables.at("row"),
        "Python": tables.at("python"),
        "torch": tables.at("torch"),
        "installed from": tables.at("source"),
        "compiler": lambda r: re.sub(r"\(.*?\) ?| version", "", r["compiler"]),
        "nvcc": lambda r: is_there[r["nvcc"]],
        "Triton": lambda r: is_there.get(r["triton"] or False, r["triton"]),
        "C++ part": lambda r: is_there.get(r["cpu"]),
        "CUDA part": lambda r: " ".join(r["archs"]) if r["cuda"] else is_there.get(r["cuda"]),
        "result": tables.at("result"),
        "cases of verify": tables.at("verified"),
        "tests passed": lambda r: r.get("tests", {}).get("passed"),
        "skipped": lambda r: r.get("tests", {}).get("skipped"),
        "seconds": tables.at("seconds"),
    }
    return tables.markdown(columns, rows, 10)


def _faults_table(rows: list[dict]) -> str:
    names = ("fault", "wanted", "injected", "survived", "failed")
    return tables.markdown({name: tables.at(name) for name in names}, rows, 2)


def _mutants_table(rows: list[dict]) -> str:
    """One line for each kind of code; what does not compile is no mutant."""

    def count(outcome: str, is_new: bool = False) -> Callable[[list[dict]], int]:
        new = "by a new test"
        return lambda g: sum(r["outcome"] == outcome and bool(r.get(new)) == is_new for r in g)

    columns: tables.Columns = {
        "what was broken": lambda g: g[0]["kind"],
        "mutants": lambda g: len(g) - count("does not compile")(g),
        "killed at once": count("killed"),
        "by a test written for it": count("killed", is_new=True),
        "equivalent": count("equivalent"),
        "survived": count("survived"),
    }
    every = [r | {"kind": "all"} for r in rows]
    return tables.markdown(columns, [*tables.by(rows, "kind"), every])


def _fuzz_table(rows: list[dict]) -> str:
    """One line for each reader, and one for all."""
    add = lambda name: lambda g: sum(r[name] for r in g)  # noqa: E731
    columns: tables.Columns = {
        "reader": lambda g: g[0]["reader"],
        "examples": add("examples"),
        "of them read": add("accepted"),
        "kept for new lines": add("kept"),
        "findings": lambda g: sum(len(r["findings"]) for r in g),
    }
    every = [r | {"reader": "all"} for r in rows]
    return tables.markdown(columns, [*tables.by(rows, "reader"), every])


def _numerics_table(rows: list[dict]) -> str:
    """A line for each backend, op and what was asked of it; dtypes and circumstances together."""
    asked = {
        "table": "within the budget",
        "interpreter": "within the budget, a spread",
        "bits": "the same bits",
        "large": "equal, more than 2^31 elements",
        "dropout": "mean and correlations of 2^28 draws",
    }
    lines = []
    for part in tables.by(rows, "part", "backend", "op"):
        first = part[0]
        dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in part))
        line = {"backend": first["backend"], "op": first["op"], "dtypes": dtypes}
        line |= {"asked": asked[first["part"]], "cases": sum(row["cases"] for row in part)}
        line["of these on integers, equal"] = sum(row.get("equal", 0) for row in part) or None
        budgets = [row["worst"] for row in part if "worst" in row]
        line["most of the budget"] = f"{max(budgets):.2f}" if budgets else None
        lines.append(line | {"wrong": sum(row["wrong"] for row in part)})
    return tables.markdown({name: tables.at(name) for name in lines[0]}, lines, 4)


def _parity_table(rows: list[dict]) -> str:
    """How far training has gone from fp64; errors are medians over seeds."""
    columns: tables.Columns = {"network": tables.at("network")}
    columns |= {name: tables.at(name) for name in ("steps", "seeds")}
    for kind in ("RMS", "max"):
        for whose in ("", " of PyTorch"):
            name = f"{kind} error{whose}"
            columns[name] = lambda r, name=name: f"{r[name]:.1e}"
        columns[f"{kind}, ours over PyTorch's"] = tables.at(f"{kind} ratio")
    return tables.markdown(columns, rows)


# By the name of a results file.
OF_FILE = {
    "installs": _installs_table,
    "faults": _faults_table,
    "mutants": _mutants_table,
    "fuzz": _fuzz_table,
    "numerics": _numerics_table,
    "parity": _parity_table,
}
