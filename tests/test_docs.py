"""What the documentation states is what the code does."""

import re
from pathlib import Path

import torch

from fusedmlp import environment
from fusedmlp.spec import philox

ROOT = Path(__file__).parent.parent
DROPOUT = (ROOT / "docs" / "dropout.md").read_text()

# seed, stream, row, first column
KNOWN = [
    (0, 0, 0, 0),
    (42, 7, 0, 0),
    (42, 7, 3, 8),
    (-1, -1, 2**32 - 1, 0),
    (0x0123456789ABCDEF, -(2**63), 1000, 8 * (2**20)),
]


def _table() -> str:
    lines = ["| seed | stream | row | columns | windows |", "|---|---|---|---|---|"]
    for seed, stream, row, column in KNOWN:
        group, state = column // 8, torch.tensor([seed, stream])
        words = philox.philox(
            (
                torch.tensor(group),
                torch.tensor(row),
                state[1] & philox._LOW32,
                state[1] >> 32 & philox._LOW32,
            ),
            (state[0] & philox._LOW32, state[0] >> 32 & philox._LOW32),
        )
        w = [int(x) for x in words]
        both = [(w[k], (w[k] >> 16 | w[(k + 1) % 4] << 16) & philox._LOW32) for k in range(4)]
        shown = " ".join(f"{x:08x}" for pair in both for x in pair)
        lines.append(f"| {seed} | {stream} | {row} | {column} to {column + 7} | `{shown}` |")
    return "\n".join(lines)


def _mask() -> str:
    keep = philox.dropout_mask(42, 7, 4, 32, 0.5)
    rows = ["".join("1" if k else "0" for k in row) for row in keep.tolist()]
    return "\n".join(["```", *rows, "```"])


def _between(text: str, name: str) -> str:
    return re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.S).group(1).strip()


def test_the_known_answers_are_those_of_the_code():
    assert _between(DROPOUT, "known-answers") == _table()
    assert _between(DROPOUT, "known-mask") == _mask()


def test_windows_of_a_whole_row_are_the_known_answers():
    """The table is made word by word; a row of rng.windows must hold the same."""
    for seed, stream, row, column in KNOWN[:4]:
        got = philox.windows(torch.tensor([seed, stream]), 0, 1, column + 8, row)[0, column:]
        shown = " ".join(f"{x:08x}" for x in got.tolist())
        assert shown in _between(DROPOUT, "known-answers")


def test_the_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:fusedmlp|csrc|tests|bench)/[\w./]+)`", text)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_file_that_knows_an_activation_is_in_contributing():
    """A file that names one activation, by its constant or its string, knows activations."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Adding an activation") : text.index("## Adding an op")]
    named = set(re.findall(r"`([\w./]+\.\w+)`", section))
    knows = re.compile(r"activations\.SILU\b|\bkSilu\b|[Aa]ct\.SILU|\bSILU\b|\"silu\"")
    found = set()
    for folder, ends in (("fusedmlp", ".py"), ("csrc", (".h", ".cpp", ".cu", ".cuh"))):
        for path in (ROOT / folder).rglob("*"):
            if path.name.endswith(ends) and knows.search(path.read_text()):
                found.add(path.relative_to(ROOT).as_posix())
    assert found <= named, sorted(found - named)


def test_the_readme_lists_every_environment_variable():
    readme = (ROOT / "README.md").read_text()
    used = set()
    for folder in ("fusedmlp", "csrc", "build_tools", "bench"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".sh"):
                used |= set(
                    re.findall(r"\bFUSEDMLP_[A-Z]+(?:_[A-Z]+)*\b(?!_[A-Z])", path.read_text())
                )
    # Macros of the C++ code are not environment variables.
    read = {v for v in used if v in environment.VARIABLES}
    assert read == set(environment.VARIABLES)
    missing = [v for v in environment.VARIABLES if v not in readme]
    assert not missing
