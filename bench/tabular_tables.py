"""The tables of bench.tabular: ours beside the other networks and trees, over public tables."""

from collections.abc import Iterable

from . import tables

TABULAR_OURS = "fusedmlp, preset table"


def _shared(rows: list[dict]) -> dict[str, list[dict]]:
    """{way: its rows}, the ways that were measured on every split first."""
    ways = {
        way: [r for r in rows if r["way"] == way] for way in dict.fromkeys(r["way"] for r in rows)
    }
    return dict(sorted(ways.items(), key=lambda item: -len(item[1])))


def _mean(values: Iterable) -> float | None:
    found = [v for v in values if v is not None]
    return sum(found) / len(found) if found else None


def tabular_table(rows: list[dict]) -> str:
    """Each way over all tables and splits, compared with our single preset on the same splits."""
    ours = {(r["table"], r["split"]): r for r in rows if r["way"] == TABULAR_OURS}
    ways = _shared(rows)
    most = max(map(len, ways.values()))
    ranks: dict[str, list[float]] = {way: [] for way in ways}
    for place in ours:
        there = {w: r["score"] for w, of in ways.items() for r in of if _place(r) == place}
        whole = [w for w in there if len(ways[w]) == most]
        for way in whole:
            above = sum(there[w] > there[way] for w in whole)
            equal = sum(there[w] == there[way] for w in whole)
            ranks[way].append(above + (equal + 1) / 2)
    lines = []
    for way, of in ways.items():
        of = [r for r in of if _place(r) in ours]
        against = [ours[_place(r)] for r in of]
        pairs = list(zip(of, against, strict=True))
        seconds, other = (sum(r["fit"] for r in which) for which in (of, against))
        lines.append(
            {
                "way": way,
                "splits": len(of),
                "score": f"{_mean(r['score'] for r in of):.4f}",
                "over ours": f"{_mean(r['score'] - o['score'] for r, o in pairs):+.4f}",
                "log loss": loss
                if (loss := _mean(r["log loss"] for r in of)) is None
                else f"{loss:.4f}",
                "rank": f"{_mean(ranks[way]):.2f}" if ranks[way] else None,
                "fit": f"{seconds / len(of):.2f}",
                "predict": f"{_mean(r['predict'] for r in of):.3f}",
                "time": f"{seconds / other:.2f}",
            }
        )
    lines.sort(key=lambda line: (line["rank"] is None, line["rank"] or line["score"]))
    columns: tables.Columns = {
        "": tables.at("way"),
        "tables x splits": tables.at("splits"),
        "score": tables.at("score"),
    }
    columns |= {"over our one network": tables.at("over ours"), "log loss": tables.at("log loss")}
    columns |= {
        "rank": tables.at("rank"),
        "fit, s": tables.at("fit"),
        "predict, s": tables.at("predict"),
    }
    columns["time over our one network"] = tables.at("time")
    return tables.markdown(columns, lines, 1)


def _place(row: dict) -> tuple[str, int]:
    return row["table"], row["split"]


def tabular_each(rows: list[dict]) -> str:
    """The mean score of each way on each table."""
    ways = _shared(rows)
    columns: tables.Columns = {
        "": lambda g: tables.name_of(g[0]["table"]),
        "target": lambda g: g[0]["kind"],
    }
    columns |= {"training rows": lambda g: g[0]["rows"], "columns": lambda g: g[0]["columns"]}

    def score(way: str):
        def made(group):
            mean = _mean(r["score"] for r in group if r["way"] == way)
            return None if mean is None else f"{mean:.3f}"

        return made

    columns |= {way: score(way) for way in ways}
    return tables.markdown(columns, tables.by(rows, "table"), 2)
