"""Writes the tables of README.md and docs/ from the results files; no figure is typed by hand.

    python -m bench.report              # write; --check: only tell whether they are up to date
    python -m bench.report --plots docs/plots

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`. NAME is `grid`, a group of
bench/cases.py (these with `gpu-` before them for a GPU's figures), `gpu-steps` or `gpu-epochs` and
`engine-` with a group, both of bench/steps.py, `evidence-table` or `evidence-summary`, of all
files, or the name of another results file, such as `train` or `saved-bytes`; `tabular-each` has a
line for each table of `tabular`. Losing shapes stay in.
Measures nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from fusedmlp.train import TrainError, drawing

from . import check_tables, evidence_tables, record, rivals, tables, tabular_tables

_MARKED = re.compile(
    r"(?P<open><!-- bench:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<close><!-- /bench:(?P=name) -->)",
    re.DOTALL,
)
_ANY_MARKER = re.compile(r"<!-- /?bench:([\w-]+) -->")
NOTHING = "*Not measured yet: no results file holds it.*\n"


def _words(machine: dict) -> str:
    threads = machine["threads"]
    return machine.get("gpu") or f"{machine['cpu']}, {threads} thread{'s' * (threads != 1)}"


def source(found: dict) -> str:
    """The lines under a table, one a run: command, machine, versions, commit, date."""
    names = ("torch", "triton", *rivals.PACKAGES, "lightgbm", "pytabkit")
    named = ((name, found["versions"].get(name)) for name in names)
    versions = [f"{name} {version}" for name, version in named if version]
    where = "; ".join([_words(found["machine"]), ", ".join(versions)])
    when = f"commit {found['commit'] or 'unknown'}; {found['date'][:10]}"
    line = f"\n<sub>`{found['command']}` on {where}; {when}.</sub>\n"
    return "".join(map(source, found.get("earlier", []))) + line


def _rows(found: dict, name: str) -> list[dict]:
    """The rows of table `name` in a results file; none where it is in another file."""
    file, rows = found["name"], found["rows"]
    kind, _, part = name.partition("-")
    if kind == "engine":
        return [r for r in rows if r["group"] == part] if file == "engine_step" else []
    if name == "tabular-each":
        return rows if file == "tabular" else []
    if name in ("gpu-steps", "gpu-epochs"):
        of_part = [r for r in rows if r.get("table") == part] if file == "gpu_steps" else []
        return [{k: v for k, v in r.items() if k != "table"} for r in of_part]
    if file == name.replace("-", "_") and not any("group" in r for r in rows):
        return rows
    device, group = ("cuda", part) if kind == "gpu" else ("cpu", name)
    return [r for r in rows if r.get("group") == group and r.get("device") == device]


def table(name: str, results: dict[Path, dict]) -> str:
    """The text of table `name`: one part for each results file that holds it."""
    if name in ("evidence-table", "evidence-summary"):
        rows = {found["name"]: found["rows"] for found in results.values()}
        gpus = {found["machine"].get("gpu") for found in results.values()} - {None}
        made = evidence_tables.table if name == "evidence-table" else evidence_tables.summary
        return made(rows | {"gpus": sorted(gpus)})
    parts = []
    seeds = [found for found in results.values() if found["name"] == "seeds"]
    for found in results.values():
        rows = _rows(found, name)
        if not rows:
            continue
        if name == "train":
            text = tables.train_table(rows, [row for other in seeds for row in other["rows"]])
            parts.append(text + source(found) + "".join(map(source, seeds)))
            continue
        if name == "tabular-each":
            text = tabular_tables.tabular_each(rows)
        elif name == "tabular":
            text = tabular_tables.tabular_table(rows)
        elif found["name"] in check_tables.OF_FILE:
            text = check_tables.OF_FILE[found["name"]](rows)
        elif "provider" not in rows[0]:
            text = tables.of_file(found["name"], rows)
        else:
            is_grid = rows[0]["group"] == "grid"
            text = (tables.grid_table if is_grid else tables.group_table)(rows)
        parts.append(text + source(found))
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


_PLOTTED_BY = ("device", "op", "mode", "dtype", "act", "p")


def plot(results: dict[Path, dict], folder: Path) -> list[Path]:
    """One log-log plot an op, mode and dtype that was timed at 3 sizes or more."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for found in results.values():
        rows = [r for r in found["rows"] if "ms" in r and r["group"] != "grid"]
        if not rows:
            continue
        import pandas

        frame = pandas.DataFrame([r | {"p": "/".join(map(str, r["p"]))} for r in rows])
        frame["elements"] = frame["M"] * frame["N"]
        for what, part in frame.groupby(list(_PLOTTED_BY), dropna=False, sort=False):
            if part[part["provider"] == "eager"]["elements"].nunique() < 3:
                continue
            figure, ((axes,),) = drawing.new_figure(6, 4)
            for provider, of in part.sort_values("elements").groupby("provider", sort=False):
                axes.plot(of["elements"], of["ms"], marker="o", label=provider)
                axes.fill_between(of["elements"], of["ms_p20"], of["ms_p80"], alpha=0.2)
            device, op, mode, dtype, act, p = what
            axes.set(xscale="log", yscale="log", xlabel="elements of the output", ylabel="ms")
            axes.set_title(f"{op}, {act}, p = {p}, {mode}, {dtype}\n{_words(found['machine'])}")
            axes.legend()
            name = "-".join(map(str, what)).replace("/", "_").replace("+", "_")
            made.append(folder / f"{name}.png")
            made[-1].write_bytes(drawing.png(figure))
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
