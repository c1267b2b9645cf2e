"""Writes the tables of README.md and docs/ from the results files; no figure is typed by hand.

    python -m bench.report              # write; --check: only tell whether they are up to date
    python -m bench.report --plots docs/plots

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`. NAME is `grid`, a group of
bench/cases.py (these with `gpu-` before them for a GPU's figures), `gpu-steps` or `gpu-epochs` of
gpu_step.py, `engine-` and a group of engine_step.py, or the name of another results file, such as
`train` or `saved-bytes`. Losing shapes stay in. Measures nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from fusedmlp.train import TrainError, plots

from . import engine_tables, kernel_tables, record
from .run import NEVER_BELOW, grid_summary, key

_MARKED = re.compile(
    r"(?P<open><!-- bench:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<close><!-- /bench:(?P=name) -->)",
    re.DOTALL,
)
_ANY_MARKER = re.compile(r"<!-- /?bench:([\w-]+) -->")
NOTHING = "*Not measured yet: no results file holds it.*\n"
# Column heads of the providers whose speed-up over eager is shown, in this order.
_COLUMNS = {
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


def markdown(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table; the first `left` columns are text, the others numbers."""
    rule = [":--"] * left + ["--:"] * (len(head) - left)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [head, rule, *rows])


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(three: list[float]) -> str:
    """median (p20-p80)"""
    median, p20, p80 = map(digits, three)
    return f"{median} ({p20}–{p80})"


def _words(value) -> str:
    if isinstance(value, dict):
        cpu, gpu, threads = (value.get(name) for name in ("cpu", "gpu", "threads"))
        plural = "" if threads == 1 else "s"
        parts = [gpu or cpu, f"{threads} thread{plural}" if threads and not gpu else None]
        return ", ".join(part for part in parts if part) or ", ".join(map(str, value.values()))
    return str(value)


def source(found: dict) -> str:
    """The line under a table: command, machine, versions, commit, date."""
    versions = found["versions"]
    names = versions.items() if isinstance(versions, dict) else ()
    shown = [f"{k} {v}" for k, v in names if v and k in ("torch", "triton", "scikit-learn")]
    parts = [
        _words(found["machine"]),
        ", ".join(shown) or str(versions),
        f"commit {found['commit'] or 'unknown'}",
        str(found["date"])[:10],
    ]
    command = f"`{found['command']}` on " if found.get("command") else ""
    return f"\n<sub>{command}{'; '.join(parts)}.</sub>\n"


def _cases(rows: list[dict]) -> list[dict[str, dict]]:
    """Rows of each case as {provider: row}, in the order of the file; a step by its wall clock."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["mode"] == "step" and row.get("clock") == "device":
            continue
        cases.setdefault(key(row), {})[row["provider"]] = row
    return list(cases.values())


def _p(row: dict) -> str:
    return "/".join(f"{p:g}" for p in row["p"])


def _call(row: dict) -> list[str]:
    """The cells that say what was run."""
    act = row.get("act") or ""
    dims = "-".join(map(str, row["dims"]))
    cold = ", cold" if row["cache"] == "cold" else ""
    call = f"{row['op']} {row['M']} x {dims}".replace("_", "\\_")
    return [call, act.replace("_", "\\_"), _p(row), row["dtype"], row["mode"] + cold]


_CALL_HEAD = ["", "activation", "p", "dtype", "mode"]


def group_table(found: dict, group: str) -> str:
    """Speed-up over eager of every provider, and distance from the floor, for one group."""
    cases = _cases([row for row in found["rows"] if row["group"] == group])
    shown = [name for name in _COLUMNS if any("ms" in case.get(name, {}) for case in cases)]
    # A backend that automatic choice ran is not shown twice.
    shown = [name for name in shown if any(_differs(case, name) for case in cases)]
    floors = any("over_floor" in case.get("auto", {}) for case in cases)
    head = _CALL_HEAD + ["eager, ms"] + [f"eager / {_COLUMNS[name]}" for name in shown]
    lines = []
    for case in cases:
        first = next(iter(case.values()))
        eager = case.get("eager", {})
        cells = _call(first) + [digits(eager["ms"]) if "ms" in eager else "–"]
        for name in shown:
            row = case.get(name, {})
            failed = "wrong" if "error" in row else "–"
            cells.append(spread(row["eager_over_this"]) if "eager_over_this" in row else failed)
        if floors:
            ours = case.get("auto", {})
            cells.append(spread(ours["over_floor"]) if "over_floor" in ours else "–")
        lines.append(cells)
    return markdown(head + ["fused / floor"] * floors, lines, len(_CALL_HEAD))


def _differs(case: dict[str, dict], name: str) -> bool:
    return "ms" in case.get(name, {}) and case.get("auto", {}).get("route") != name


_LOWEST = 10  # cells of the grid that are shown


def grid_table(found: dict) -> str:
    """The never-slower grid: one line on all of it, and its lowest cells."""
    rows = [row for row in found["rows"] if row["group"] == "grid" and row["provider"] == "auto"]
    timed = sorted((r for r in rows if "ms" in r), key=lambda r: r["eager_over_this"][0])
    shown = timed[:_LOWEST]
    text = f"{grid_summary(rows)[0]} (bound: {NEVER_BELOW}). The {len(shown)} lowest:\n\n"
    lines = [_call(r) + [r.get("route", ""), _three_decimals(r)] for r in shown]
    lines += [_call(r) + ["", "wrong"] for r in rows if "error" in r]
    head = [*_CALL_HEAD, "runs on", "eager / fused"]
    return text[0].upper() + text[1:] + markdown(head, lines, len(head) - 1)


def _three_decimals(row: dict) -> str:
    return "{:.3f} ({:.3f}–{:.3f})".format(*row["eager_over_this"])


def saved_bytes_table(found: dict) -> str:
    """Bytes per element of a layer's output, in fp32 with dropout."""
    head = ["activation", "eager, CPU", "eager, GPU", "fused", "eager / fused, CPU"]
    lines = []
    for row in found["rows"]:
        if row["dtype"] != "fp32" or not row["p"]:
            continue
        per = {k: v / row["elements"] for k, v in row.items() if k.startswith(("eager_", "fused_"))}
        cells = [row["act"].replace("_", "\\_")]
        cells += [f"{per[k]:.2f}" for k in ("eager_cpu", "eager_cuda", "fused_cpu")]
        lines.append([*cells, f"{per['eager_cpu'] / per['fused_cpu']:.2f}"])
    return markdown(head, lines, 1)


def crossval_table(found: dict) -> str:
    """Time and score of every way to choose a model; ratios are over this package's of one task."""
    head = ["", "way", "seconds", "time over fusedmlp's", "score", "rounds"]
    lines = []
    for row in found["rows"]:
        score = f"{row['score is']} {row['score']:.2%}"
        times = [spread(row["seconds"]), spread(row["time over fusedmlp's"])]
        lines.append([row["what"], row["way"], *times, score, str(row["rounds"])])
    return markdown(head, lines, 2)


def train_table(found: dict, seeds: list[dict]) -> str:
    """Time of every way to train, beside its test accuracy over seeds (seeds.json)."""
    accuracies = {(row["network"], row["way"]): row for row in seeds}
    head = ["network", "way", "seconds", "time over fusedmlp's", "rounds", "test accuracy", "seeds"]
    lines = []
    for row in found["rows"]:
        of = accuracies.get((row["network"], row["way"]))
        accuracy = f"{of['mean']:.4f} ± {of['deviation']:.4f}" if of else "–"
        times = [spread(row["seconds"]), spread(row["time over fusedmlp's"]), str(row["rounds"])]
        lines.append(
            [row["network"], row["way"], *times, accuracy, str(of["seeds"]) if of else "–"]
        )
    return markdown(head, lines, 2)


def plain_table(found: dict) -> str:
    """Every column of every row as it is; three numbers are median (p20-p80)."""
    columns: list[str] = []
    for row in found["rows"]:
        columns += [name for name in row if name not in columns]
    text = [c for c in columns if any(isinstance(row.get(c), str) for row in found["rows"])]
    ordered = text + [c for c in columns if c not in text]

    def cell(value) -> str:
        if value is None:
            return "–"
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, list) and len(value) == 3:
            return spread(value)
        return str(value)

    lines = [[cell(row.get(name)) for name in ordered] for row in found["rows"]]
    return markdown([name.replace("_", " ") for name in ordered], lines, len(text))


def _whole_file_table(name: str) -> Callable[[dict], str]:
    if name in kernel_tables.TABLES:
        return lambda found: markdown(*kernel_tables.TABLES[name](found))
    return {"saved-bytes": saved_bytes_table, "crossval": crossval_table}.get(name, plain_table)


# Of a results file whose rows say by `table` which one they belong to.
_TABLES_OF = {"gpu-steps": ("gpu_steps", "steps"), "gpu-epochs": ("gpu_steps", "epochs")}


def _part(found: dict, name: str) -> dict:
    """The rows of one table of a file, without that column."""
    rows = [row for row in found["rows"] if row.get("table") == name]
    return {"rows": [{k: v for k, v in row.items() if k != "table"} for row in rows]}


def _is_ops(found: dict, device: str, group: str) -> bool:
    return any(row.get("group") == group and row.get("device") == device for row in found["rows"])


def table(name: str, results: dict[Path, dict]) -> str:
    """The text of table `name`: one part for each results file that holds it."""
    pick: Callable[[Path, dict], bool]
    whole_file = name.replace("-", "_")
    ungrouped = {f["name"] for f in results.values() if not any("group" in r for r in f["rows"])}
    if name in _TABLES_OF:
        file, part = _TABLES_OF[name]
        pick = lambda path, found: found["name"] == file and _part(found, part)["rows"]  # noqa: E731
        make = lambda found: plain_table(_part(found, part))  # noqa: E731
    elif name == "train":
        seeds = [found for found in results.values() if found["name"] == "seeds"]
        rows = [row for found in seeds for row in found["rows"]]
        parts = [
            train_table(found, rows) + source(found) + "".join(source(other) for other in seeds)
            for found in results.values()
            if found["name"] == "train"
        ]
        return "\n".join(parts) or NOTHING
    elif name.startswith("engine-"):
        pick = lambda path, found: engine_tables.rows_of(found, name)  # noqa: E731
        make = lambda found: markdown(  # noqa: E731
            *engine_tables.table(engine_tables.rows_of(found, name), spread)
        )
    elif whole_file in ungrouped:
        pick = lambda path, found: found["name"] == whole_file  # noqa: E731
        make = _whole_file_table(name)
    else:
        device, group = ("cuda", name[4:]) if name.startswith("gpu-") else ("cpu", name)
        if group == "grid":
            pick = lambda path, found: _is_ops(found, device, "grid")  # noqa: E731
            make = grid_table
        else:
            pick = lambda path, found: _is_ops(found, device, group)  # noqa: E731
            make = lambda found: group_table(found, group)  # noqa: E731
    parts = [make(found) + source(found) for path, found in results.items() if pick(path, found)]
    return "\n".join(parts) or NOTHING


def filled(text: str, results: dict[Path, dict], where: str) -> str:
    """A document with its tables written anew; raises ValueError for a marker without its twin."""
    whole = {m["name"] for m in _MARKED.finditer(text)}
    for m in _ANY_MARKER.finditer(text):
        if m[1] not in whole:
            raise ValueError(f"report: {where}: '{m[0]}' must have its opening and closing twin")
    return _MARKED.sub(lambda m: m["open"] + table(m["name"], results) + m["close"], text)


def load(folder: Path) -> dict[Path, dict]:
    """Every results file under `folder`, by path; files of other kinds are left alone."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            found[path] = record.read(path)
        except ValueError:
            continue
    return found


_PLOTTED_BY = ("device", "op", "mode", "dtype", "act")


def plot(results: dict[Path, dict], folder: Path) -> list[Path]:
    """One log-x plot an op, mode and dtype that was timed at 3 sizes or more."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for found in results.values():
        series: dict[tuple, dict[str, list[dict]]] = {}
        for row in found["rows"]:
            if "ms" in row and row["group"] != "grid":
                what = (*(row.get(name) for name in _PLOTTED_BY), _p(row))
                series.setdefault(what, {}).setdefault(row["provider"], []).append(row)
        for what, providers in series.items():
            if len({row["M"] * row["N"] for row in providers.get("eager", [])}) < 3:
                continue
            figure, ((axes,),) = plots.new_figure(6, 4)
            for provider, rows in providers.items():
                rows.sort(key=lambda row: row["M"] * row["N"])
                x = [row["M"] * row["N"] for row in rows]
                axes.plot(x, [row["ms"] for row in rows], marker="o", label=provider)
                low, high = ([row[k] for row in rows] for k in ("ms_p20", "ms_p80"))
                axes.fill_between(x, low, high, alpha=0.2)
            device, op, mode, dtype, act, p = what
            axes.set(xscale="log", yscale="log", xlabel="elements of the output", ylabel="ms")
            axes.set_title(f"{op}, {act}, p = {p}, {mode}, {dtype}\n{_words(found['machine'])}")
            axes.legend()
            name = "-".join(str(part) for part in what).replace("/", "_").replace("+", "_")
            made.append(folder / f"{name}.png")
            made[-1].write_bytes(plots.png(figure))
    return made


def documents(root: Path) -> list[Path]:
    """README.md and docs/*.md of a checkout."""
    return [p for p in [root / "README.md", *sorted((root / "docs").glob("*.md"))] if p.exists()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    parser.add_argument("--root", type=Path, default=record.ROOT, help="the checkout")
    parser.add_argument("--plots", type=Path, help="also draw plots into this folder")
    args = parser.parse_args(argv)
    results = load(args.root / "bench" / "results")
    stale = []
    for path in documents(args.root):
        before = path.read_text()
        after = filled(before, results, path.name)
        if before != after:
            stale.append(path)
            if not args.check:
                path.write_text(after)
    if args.plots and not args.check:
        try:
            print(f"report: {len(plot(results, args.plots))} plots in {args.plots}")
        except TrainError as error:
            print(f"report: {error}", file=sys.stderr)
            return 1
    told = "differs from the results files; python -m bench.report" if args.check else "written"
    for path in stale:
        print(f"report: {path.relative_to(args.root)}: {told}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
