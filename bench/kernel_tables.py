"""Tables of docs/ about compiled kernels: (head, rows, columns of text), from results files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Table = tuple[list[str], list[list[str]], int]


def _by(rows: Iterable[dict], key: Callable[[dict], tuple]) -> dict[tuple, list[dict]]:
    """Rows of the same key, in the order of their first."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _range(values: Iterable[float]) -> str:
    values = list(values)
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def _kib(size: float) -> float:
    return round(size / 1024, 1)


_KINDS = {"half": "16-bit", "tf32": "tf32", "ieee": "ieee fp32", "": "–"}


def triton(found: dict) -> Table:
    """One line for each target, op and kind of product; what is wrong is counted, not left out."""
    lines = []
    groups = _by(found["rows"], lambda r: (r["target"], r["op"], r.get("kind", "")))
    for (target, op, kind), rows in groups.items():
        # A kernel that did not compile has nothing but the reason.
        made = [r for r in rows if "registers" in r]
        wrong = sum(bool(r["wrong"]) for r in rows)
        cells = ["–"] * 4
        if made:
            units = sorted({t for r in made for t in r["tensor_core"].split(", ") if t})
            cells = [
                _range(r["registers"] for r in made),
                _range(r["local_bytes"] for r in made),
                _range(_kib(r["shared_bytes"]) for r in made),
                ", ".join(units) or "–",
            ]
        name = op.replace("_", "\\_")
        lines.append([target, name, _KINDS[kind], str(len(rows)), *cells, str(wrong)])
    head = ["target", "op", "product", "compiled", "registers", "local memory, bytes"]
    return head + ["shared memory, KiB", "tensor cores", "wrong"], lines, 3


def cuda(found: dict) -> Table:
    """One line for each kernel and architecture, its variants together."""
    lines = []
    in_order = sorted(found["rows"], key=lambda r: (r["kernel"], int(re.sub(r"\D", "", r["arch"]))))
    for (kernel, arch), rows in _by(in_order, lambda r: (r["kernel"], r["arch"])).items():
        lines.append(
            [
                kernel.replace("_", "\\_"),
                arch,
                str(len(rows)),
                _range(r["registers"] for r in rows),
                _range(r["local"] for r in rows),
                _range(r["spills"] for r in rows),
                _range(_kib(r["shared"]) for r in rows),
                _range(r["tensor_core"] for r in rows),
            ]
        )
    head = ["kernel", "architecture", "variants", "registers", "local memory, bytes"]
    head += ["accesses to it", "shared memory, KiB", "tensor-core instructions"]
    return head, lines, 2


_NAMES = {
    "LOP3": "logic",
    "IMAD": "multiply",
    "FMUL": "scale",
    "FSEL": "select",
    "SEL": "select",
    "ISETP": "compare",
    "PRMT": "pack",
    "F2FP": "to 16 bits",
    "MOV": "move",
    "SHF": "shift",
}


def dropout(found: dict) -> Table:
    """What dropout adds to a kernel, an element."""
    lines = []
    for r in found["rows"]:
        shares: dict[str, float] = {}
        for name, value in r["by_instruction"].items():
            name = _NAMES.get(name, name)
            shares[name] = shares.get(name, 0.0) + value
        largest = sorted(shares.items(), key=lambda item: -item[1])[:5]
        lines.append(
            [
                r["kernel"].removesuffix("_kernel").replace("_", "\\_"),
                r["dtype"],
                r["target"],
                r["tile"].replace("x", " x "),
                ", ".join(f"{name} {value:.1f}" for name, value in largest),
                str(r["without"]),
                str(r["with"]),
                f"{r['per_element']:.1f}",
            ]
        )
    head = ["kernel", "dtype", "target", "tile", "largest shares"]
    head += ["instructions without", "with", "more, an element"]
    return head, lines, 5


TABLES = {"kernels": triton, "cuda-kernels": cuda, "dropout-instructions": dropout}
