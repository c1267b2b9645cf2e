"""What the documentation states is what the code does.

`python -m tests.test_docs` writes the parts of the pages that are made from the code.
"""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fusedmlp import cli, environment
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


def _first_sentence(path: Path) -> str:
    """What a file says of itself, up to the first full stop or line without text."""
    text = path.read_text()
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = re.match(r"(?:// ?.*\n)*", text).group()
        said = re.sub(r"^// ?", "", comment, flags=re.M)
    said = " ".join(said.split("\n\n")[0].split())
    return (
        re.split(r"(?<=[\w)`\"])\. (?=[A-Z`])", said)[0]
        .rstrip(".")
        .replace("|", "\\|")
        .replace("<", "&lt;")
    )


def _house(folder: str, ends: tuple[str, ...], left_out: tuple[str, ...] = ()) -> str:
    """Every file of a folder and what it says of itself, by subfolder."""
    lines, root = [], ROOT / folder
    for place in [root, *sorted(p for p in root.rglob("*") if p.is_dir())]:
        files = [p for p in sorted(place.iterdir()) if p.suffix in ends and p.name not in left_out]
        if not files:
            continue
        name = place.relative_to(ROOT).as_posix()
        lines += ["", f"| `{name}/` | |", "|---|---|"]
        for path in files:
            said = _first_sentence(path)
            assert said, f"{path.relative_to(ROOT)} must say what it is in its first lines"
            shown = "" if path.name == "__init__.py" else f"`{path.name}`"
            lines.append(f"| {shown} | {said} |")
    return "\n".join(lines).strip()


def _parts() -> dict[str, dict[str, str]]:
    """page -> name of a part -> its text, made from the code."""
    csrc = (".cpp", ".h", ".cu", ".cuh", ".inl")
    return {
        "dropout.md": {"known-answers": _table(), "known-mask": _mask()},
        "house.md": {
            "house": _house("fusedmlp", (".py",), ("_version.py",)),
            "csrc": _house("csrc", csrc),
        },
    }


def _between(text: str, name: str) -> str:
    return re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.S).group(1).strip()


def test_parts_made_from_the_code_are_those_of_the_code():
    for page, parts in _parts().items():
        text = (ROOT / "docs" / page).read_text()
        for name, made in parts.items():
            assert _between(text, name) == made, f"{page}: run python -m tests.test_docs"


PAGES = ("README.md", "docs/guide.md")


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_of_the_pages_run(page, tmp_path, monkeypatch, capsys):
    """From top to bottom, in one namespace; packages of the extra `integrations` may be missing."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace, missing = {"__name__": "page"}, set()
    for block in _blocks(page, "python"):
        try:
            exec(compile(block, page, "exec"), namespace)
        except ModuleNotFoundError as error:
            missing.add(error.name.split(".")[0])
    assert missing <= {"lightning", "skorch", "onnxruntime", "onnxscript", "dask", "distributed"}


def _commands(page: str) -> list[str]:
    """Lines for a terminal: of the blocks without a language, and in code between words."""
    text = (ROOT / page).read_text()
    lines = [line for block in _blocks(page, "") for line in block.splitlines()]
    # The line under a table names the command of its own commit.
    inline = re.sub(r"^```.*?^```|<sub>.*?</sub>", "", text, flags=re.S | re.M)
    lines += re.findall(r"`([^`\n]+)`", inline)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if re.match(r"(fusedmlp|make|python -m) \w", part)]


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "docs/kernels.md"])
def test_commands_of_the_pages_are_there(page, capsys):
    """Sub-commands with their flags, targets of the Makefile, modules; they are not run."""
    pytest.importorskip("tyro")
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    helps, found = {}, _commands(page)
    assert found
    for line in found:
        program, name, *words = line.split("#")[0].split()
        if program == "make":
            assert name in targets or "=" in name, line
        elif program == "fusedmlp":
            if name not in helps:
                with pytest.raises(SystemExit):
                    cli.main([name, "--help"])
                helps[name] = capsys.readouterr().out
            flags = [word.partition("=")[0] for word in words if word.startswith("--")]
            assert all(flag in helps[name] for flag in flags), line
        else:
            assert find_spec(words[0]), line  # python -m NAME


def test_every_page_is_reached_from_the_readme_and_every_link_leads_somewhere():
    pages = {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")}
    reached, to_see = set(), [ROOT / "README.md"]
    while to_see:
        page = to_see.pop()
        reached.add(page)
        for target in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
                anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
                assert anchor in anchors, f"{page.name}: {target}"
            if path in pages and path not in reached:
                to_see.append(path)
    assert reached >= pages


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


def test_every_test_that_guards_against_a_fault_exists():
    named = re.findall(
        r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "found.md").read_text()
    )
    assert len(named) > 20
    for file, test in named:
        text = (ROOT / file).read_text()
        assert not test or f"def {test}(" in text, f"{file}::{test}"


def _write() -> None:
    for page, parts in _parts().items():
        path = ROOT / "docs" / page
        text = path.read_text()
        for name, made in parts.items():
            marked = f"<!-- {name} -->\n(.*?)<!-- /{name} -->"
            text = re.sub(
                marked,
                lambda m, n=name, made=made: f"<!-- {n} -->\n{made}\n<!-- /{n} -->",
                text,
                flags=re.S,
            )
        path.write_text(text)


if __name__ == "__main__":
    _write()
