"""A planted mutant is killed, one that changes nothing survives; the results say how all fared."""

import ast

import pytest

from bench import record
from build_tools import kinds, mutants, mutations
from build_tools.kinds import KINDS
from build_tools.mutations import Mutation
from fusedmlp.backends import native

ROOT = mutants.ROOT


@pytest.mark.slow
def test_a_planted_mutant_is_killed_and_a_comment_survives(tmp_path):
    file = "fusedmlp/spec/philox.py"
    lines = (ROOT / file).read_text().split("\n")
    number, before = next(
        (n, line) for n, line in enumerate(lines, 1) if "= round(p * TWO32)" in line
    )
    tree = mutants.Tree(tmp_path / "tree")
    outcomes = {}
    for after in (before.replace("p * TWO32", "p / TWO32"), before + "  # nothing"):
        planted = mutants.Mutant("rules", file, Mutation(number, before, after, "planted"))
        outcomes[after] = mutants.run(tree, planted, ["tests/spec/test_rng.py"])
    killed, survived = outcomes.values()
    assert killed["outcome"] == "killed" and killed["by"].startswith("tests/spec/test_rng.py::")
    assert survived["outcome"] == "survived"
    assert (tree.root / file).read_text() == (ROOT / file).read_text()
    assert mutants.failing_when_right(tree, [killed]) == []


def changes(text: str, made) -> set[tuple[str, str]]:
    return {(m.operator, m.after.strip()) for m in made(text)}


def test_python_is_changed_where_it_counts():
    text = '"""a - b"""\nif n < 3 and not done:\n    x.y = f(a, b) - 1\n'
    assert changes(text, mutations.of_python) >= {
        ("lt to lte", "if n <= 3 and not done:"),
        ("and to or", "if n < 3 or not done:"),
        ("not dropped", "if n < 3 and done:"),
        ("condition inverted", "if not (n < 3 and (not done)):"),
        ("constant +1", "if n < 4 and not done:"),
        ("arguments swapped", "x.y = f(b, a) - 1"),
        ("sub to add", "x.y = f(a, b) + 1"),
        ("a term dropped", "x.y = f(a, b)"),
        ("statement deleted", "pass"),
    }
    silent = '"""a + 1"""\nfrom a import b\ndef f(a: 1 | 2 = None) -> 3 | 4: ...\nx = f"{1 + 2}"\n'
    assert mutations.of_python(silent) == []


def test_cpp_is_changed_where_it_counts():
    text = "// a + b\n    if (a < b && c)\n        x[i] += f(a, b) * 2;  // c + d\n#if A > 1\n"
    found = changes(text, mutations.of_cpp)
    assert found >= {
        ("lt to lte", "if (a <= b && c)"),
        ("and to or", "if (a < b || c)"),
        ("condition inverted", "if (!(a < b && c))"),
        ("add to sub", "x[i] -= f(a, b) * 2;  // c + d"),
        ("mult to div", "x[i] += f(a, b) / 2;  // c + d"),
        ("arguments swapped", "x[i] += f(b, a) * 2;  // c + d"),
        ("constant -1", "x[i] += f(a, b) * 1;  // c + d"),
        ("statement deleted", ";  // c + d"),
    }
    assert {m.line for m in mutations.of_cpp(text)} == {2, 3}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_seed_decides_and_every_file_has_tests(kind):
    made = [mutants.chosen(kind, seed, 12) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    assert len({(m.file, m.mutation.line) for m in made[0]}) == 12
    for mutant in made[0]:
        text = (ROOT / mutant.file).read_text()
        changed = mutant.mutation.apply(text)
        assert sum(a != b for a, b in zip(text.split("\n"), changed.split("\n"), strict=True)) == 1
        if mutant.file.endswith(".py"):
            ast.parse(changed)
    for path in kind.paths(ROOT):
        files = [word for word in kind.tests_of(path) if word.startswith("tests/")]
        assert files and all((ROOT / name).exists() for name in files), path


@pytest.mark.parametrize(
    ("status", "printed", "outcome", "by"),
    [
        (0, "3 passed", "survived", None),
        (1, "FAILED tests/a.py::test_b[c d] - assert", "killed", "tests/a.py::test_b[c d]"),
        (2, "ERROR tests/a.py - ImportError", "killed", "tests/a.py"),
        (-11, "", "killed", "crash, status -11"),
        (None, "", "killed", "no end within"),
    ],
)
def test_what_the_end_of_pytest_says(status, printed, outcome, by):
    found = mutants.judged(status, printed)
    assert found["outcome"] == outcome and found.get("by", "").startswith(by or "")


@pytest.mark.parametrize(("status", "printed"), [(5, ""), (0, "54 skipped in 3.00s")])
def test_no_test_at_all_is_no_survivor(status, printed):
    with pytest.raises(RuntimeError, match="no test was run"):
        mutants.judged(status, printed)


@pytest.mark.skipif("cpu" not in (native.build_info() or {}).get("built", ()), reason="not built")
def test_another_extension_is_loaded_as_if_it_had_been_built(tmp_path):
    """The package refuses a file whose checksum is not that of the build."""
    tree = mutants.Tree(tmp_path / "tree")
    tree.extension = tree.root / "fusedmlp" / "_native_cpu.so"
    other = tmp_path / "other.so"
    other.write_bytes(tree.extension.read_bytes() + b"0")
    tree._put(other)
    ended = tree.call("pytest", 60, "tests/backends/test_native.py", "-k", "masks_are_those")
    assert mutants.judged(*ended) == {"outcome": "survived"}


def test_no_code_is_broken_that_this_processor_does_not_run(monkeypatch):
    cpp = next(kind for kind in KINDS if kind.name == "C++ kernels")
    monkeypatch.setattr(kinds, "has", lambda flags: "-mamx-tile" not in flags)
    assert "csrc/cpu/isa_avx512_bf16.cpp" in cpp.paths(ROOT)
    assert "csrc/cpu/isa_amx.cpp" not in cpp.paths(ROOT)
    monkeypatch.setattr(kinds, "has", lambda flags: "-mavx512f" not in flags)
    assert "csrc/cpu/vec/avx2.h" in cpp.paths(ROOT)
    assert not any("avx512" in path for path in cpp.paths(ROOT))


def test_the_results_are_complete():
    rows = record.read(mutants.RESULTS)["rows"]
    assert len([row for row in rows if row["outcome"] != "does not compile"]) >= 100
    assert {row["kind"] for row in rows} == {kind.name for kind in KINDS}
    assert all(row.get("why") for row in rows if row["outcome"] == "equivalent")
    assert all(row.get("by") for row in rows if row["outcome"] == "killed")
