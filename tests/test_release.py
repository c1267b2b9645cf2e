"""What `make release` says of archives and rows; the installs themselves take an hour."""

import io
import tarfile
import zipfile

import pytest

from bench import check_tables
from build_tools import matrix, release
from build_tools.matrix import ROWS, Failed, Row
from fusedmlp import cli
from fusedmlp.commands import verify

TRACKED = {"LICENSE", "setup.py", "csrc/cpu/a.cpp", "tests/test_a.py", "fusedmlp/ops.py"}
PACKED = {"fusedmlp/ops.py", "fusedmlp/_build_info.json", "fusedmlp-0.1.0.dist-info/METADATA"}
LICENCE = "fusedmlp-0.1.0.dist-info/licenses/LICENSE"


def sdist(folder, names):
    path = folder / "fusedmlp-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in sorted(names):
            archive.addfile(tarfile.TarInfo(f"fusedmlp-0.1.0/{name}"), io.BytesIO())
    return path


def wheel(folder, names):
    path = folder / "fusedmlp-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(names):
            archive.writestr(name, "")
    return path


def test_an_sdist_holds_the_files_of_the_commit_and_no_other(tmp_path):
    made = {"PKG-INFO", "setup.cfg", "fusedmlp.egg-info/SOURCES.txt"}
    assert release.check_sdist(sdist(tmp_path, TRACKED | made), TRACKED | {".gitignore"}) == []
    strangers = {"tests/.hypothesis/a", "bench/big.npz"}
    wrong = release.check_sdist(sdist(tmp_path, (TRACKED - {"LICENSE"}) | strangers), TRACKED)
    assert wrong == [
        "fusedmlp-0.1.0.tar.gz lacks LICENSE",
        "fusedmlp-0.1.0.tar.gz must not have bench/big.npz",
        "fusedmlp-0.1.0.tar.gz must not have tests/.hypothesis/a",
    ]


def test_a_wheel_holds_the_package_its_licence_and_its_libraries(tmp_path):
    name = "fusedmlp-0.1.0-py3-none-any.whl"
    assert release.check_wheel(wheel(tmp_path, PACKED | {LICENCE}), TRACKED) == []
    library = {"fusedmlp/_native_cpu.so"}
    wrong = release.check_wheel(wheel(tmp_path, PACKED | library | {"csrc/a.cpp"}), TRACKED)
    assert wrong == [
        f"{name} lacks LICENSE",
        f"{name} must not have csrc/a.cpp",
        f"{name} must not have fusedmlp/_native_cpu.so",
    ]
    assert (
        release.check_wheel(wheel(tmp_path, PACKED | library | {LICENCE}), TRACKED, ["cpu"]) == []
    )


def test_every_value_of_every_column_has_a_row():
    def values(name):
        return {getattr(row, name) for row in ROWS}

    assert values("python") == {"3.11", "3.12", "3.13"}
    assert values("torch") == {matrix.OLDEST, matrix.CPU, matrix.NEWEST}
    assert values("compiler") == {"gcc", "clang", None}
    assert values("nvcc") == values("triton") == {True, False}
    assert {"sdist", "plain wheel"} < values("source")
    for number, row in enumerate(ROWS, 1):
        builder = ROWS[row.builder - 1] if row.builder else None
        assert builder is None or (row.builder < number and builder.source == "sdist"), row


def test_what_a_row_must_have_follows_from_its_tools():
    lines = [{"row": 2, "built": ["cpu", "cuda"]}]
    assert Row("3.11", "2.11.0", "sdist", "gcc").wanted(True, lines) == ["cpu"]
    assert Row("3.11", "2.11.0", "sdist", "gcc", nvcc=True).wanted(True, lines) == ["cpu", "cuda"]
    assert Row("3.11", "2.13.0", "sdist", "gcc", nvcc=True).wanted(False, lines) == ["cpu"]
    assert Row("3.11", "2.11.0", "sdist").wanted(True, lines) == []
    assert Row("3.11", "2.11.0", "plain wheel", "gcc").wanted(True, lines) == []
    assert Row("3.11", "2.11.0", "wheel 2").wanted(True, lines) == ["cpu", "cuda"]
    assert release.missing_for(Row("3.11", "2.11.0", "sdist", "clang"), {"as": "", "ld": ""}) == [
        "clang++"
    ]


def test_the_environment_of_a_row_has_its_tools_and_no_others(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(matrix.Environment, "run", lambda self, *words, **_: said.append(words))
    for name in ("CXX", "CUDA_HOME", "FUSEDMLP_BUILD", "PYTHONPATH"):
        monkeypatch.setenv(name, "of the caller")
    tools = {name: f"/usr/bin/{name}" for name in ("uv", "g++", "clang++", "as", "ld")}
    row = Row("3.12", "2.11.0", "sdist", "clang", triton=False)
    made = matrix.Environment(row, tmp_path / "row", tools, "2.11.0")
    assert {p.name for p in (tmp_path / "row" / "bin").iterdir()} == {"clang++", "as", "ld"}
    assert made.variables["PATH"].split(":") == [
        str(tmp_path / "row" / "env" / "bin"),
        str(tmp_path / "row" / "bin"),
    ]
    assert not {"CXX", "CUDA_HOME", "FUSEDMLP_BUILD", "PYTHONPATH"} & set(made.variables)
    assert [words[1:3] for words in said] == [
        ("venv", "--no-project"),
        ("pip", "install"),
        ("pip", "uninstall"),
    ]
    assert "torch==2.11.0" in said[1] and "triton" not in said[1]


@pytest.mark.parametrize("words", [["false"], ["there-is-no-such-program", "x"]])
def test_a_command_that_fails_ends_its_row_in_one_line(words, tmp_path):
    environment = object.__new__(matrix.Environment)
    environment.folder, environment.variables = tmp_path, {"PATH": "/usr/bin:/bin"}
    with pytest.raises(Failed) as raised:
        environment.run(*words)
    assert words[0] in str(raised.value) and "\n" not in str(raised.value)


def test_the_line_of_an_error_is_found_in_a_long_output():
    text = "Collecting a\nfusedmlp: FUSEDMLP_BUILD=cpu: cpu: no ninja\nnote: see above\n\n"
    assert matrix.last_line(text) == "fusedmlp: FUSEDMLP_BUILD=cpu: cpu: no ninja"
    assert matrix.last_line("a\nb\n") == "b"


def test_the_cases_of_verify_are_all_that_it_counts(monkeypatch, capsys):
    monkeypatch.setattr(verify, "verify", lambda full: [])
    monkeypatch.setattr(
        verify, "verify_bits", lambda: [("mlp", "again", 5, ""), ("mlp", "x", 7, "")]
    )
    assert cli.main(["verify"]) == 0
    assert matrix.verified(capsys.readouterr().out) == 12
    with pytest.raises(Failed, match="fusedmlp verify: 1 WRONG: 12 cases"):
        matrix.verified("1 WRONG: 12 cases in 3 s\n")


def test_the_table_shows_what_was_there_and_what_came_of_it():
    ran = {"row": 1, "python": "3.11.7", "torch": "2.11.0+cu130", "source": "sdist", "nvcc": True}
    ran |= {"compiler": "g++ (Debian 12.2.0-14) 12.2.0", "triton": None, "seconds": 90, "cpu": True}
    ran |= {"cuda": True, "archs": ["9.0"], "verified": 700, "tests": {"passed": 5}}
    missing = {"row": 2, "python": "3.14", "torch": "newest", "source": "sdist", "nvcc": False}
    missing |= {"compiler": "none", "triton": True, "cpu": None, "cuda": None, "seconds": 1}
    lines = check_tables.OF_FILE["installs"](
        [ran | {"result": "passed"}, missing | {"result": "not run: no 3.14"}]
    ).splitlines()
    first = "| 1 | 3.11.7 | 2.11.0+cu130 | sdist | g++ 12.2.0 | yes | no | yes | 9.0 | passed | 700"
    assert lines[2].startswith(first)
    assert "| 3.14 | newest | sdist | none | no | yes | – | – | not run: no 3.14 | – |" in lines[3]


def test_a_number_without_a_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        release.main(["--rows", "99"])
    assert f"--rows: there are 1 to {len(ROWS)}, got [99]" in capsys.readouterr().err
