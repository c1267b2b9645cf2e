"""What has run where of each kernel: the table of docs/kernels.md and the lines of README.md.

Made from the results of bench.evidence, bench.semantics, bench.kernels and bench.cuda_kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from . import tables

# Name of a results file -> its rows, and under `gpus` the GPUs that any file is of.
Evidence = dict[str, list]


def _kernels(found: Evidence) -> list[dict]:
    """For each kernel what the results files say of it."""
    made: dict[tuple[str, str], dict] = {}

    def of(language: str, name: str) -> dict:
        key = language, name.removesuffix("_kernel")
        start = {"language": key[0], "name": key[1], "stages": 0, "targets": []}
        return made.setdefault(key, start | {"source": Counter(), "compiled": Counter()})

    for row in found.get("evidence", []):
        is_source = row["where"] == "interpreter"
        kernel = of("Triton" if is_source else "CUDA", row["kernel"])
        kernel["source" if is_source else "compiled"][row["where"]] += row["launches"]
    for row in found.get("semantics", []):
        for name, launches in row.get("kernels", {}).items() if not row["wrong"] else ():
            of("Triton", name)["compiled"]["sm_90"] += launches if row["kind"] == "tests" else 0
            of("Triton", name)["stages"] += row["kind"] == "stages"
    for file, language, target in (
        ("kernels", "Triton", "target"),
        ("cuda_kernels", "CUDA", "arch"),
    ):
        for row in found.get(file, []):
            if not row["wrong"] and row[target] not in of(language, row["kernel"])["targets"]:
                of(language, row["kernel"])["targets"].append(row[target])
    return [made[key] for key in sorted(made, key=lambda key: (key[0] == "CUDA", key[1]))]


def _launches(column: str, counted: bool) -> Callable[[dict], str | None]:
    """Their number, by where they were; what bench.evidence has not counted is no dash."""

    def made(kernel: dict) -> str | None:
        there = "; ".join(f"{where}: {n}" for where, n in kernel[column].items())
        counts = (column == "source") == (kernel["language"] == "Triton")
        return there or ("not counted" if counts and not counted else None)

    return made


def table(found: Evidence) -> str:
    """A line for each kernel: launches on a CPU, and what it was compiled for."""
    columns: tables.Columns = {
        "kernel": lambda k: f"`{k['name']}`",
        "": tables.at("language"),
        "launches of its source": _launches("source", "evidence" in found),
        "launches of its compiled code": _launches("compiled", "evidence" in found),
        "machine code for": lambda k: ", ".join(k["targets"]) or None,
        "programs run at every stage of the compiler": lambda k: k["stages"] or None,
    }
    where = ", ".join(found["gpus"])
    last = f"Results files of a GPU: {where}." if where else "On a GPU: none of them, never."
    return tables.markdown(columns, _kernels(found), 5) + f"\n{last}\n"


def summary(found: Evidence) -> str:
    """The same in a few lines."""
    kernels = _kernels(found)

    def of(language: str) -> tuple[int, str, str]:
        rows = [k for k in kernels if k["language"] == language]
        launches = sum(k["compiled"].total() for k in rows)
        targets = dict.fromkeys(target for k in rows for target in k["targets"])
        return len(rows), f" in {launches} launches" if launches else "", ", ".join(targets)

    where = ", ".join(found["gpus"])
    begin = f"Results of a GPU: {where}." if where else "**Nothing has run on a GPU so far.**"
    return (
        f"{begin} The {{}} Triton kernels run in Triton's interpreter;\n"
        "the code that its compiler makes of them for sm_90 ran on a CPU{}; machine\n"
        "code is made for {}. Of the {} CUDA kernels nvcc's PTX ran\n"
        "on a CPU{}; machine code is made for {}.\n"
    ).format(*of("Triton"), *of("CUDA"))
