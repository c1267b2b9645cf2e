"""The readers take damaged files: a short form of `make fuzz`, and what it has found."""

import json
import random
import subprocess
import sys

import pytest

from build_tools import fuzz, fuzz_changes, fuzz_readers
from fusedmlp.backends.registry import BackendError
from fusedmlp.train import TrainError

from . import made_data

made_data.need(*made_data.TRAIN_EXTRA, "pandas", "pyarrow", "PIL", "rich")


@pytest.mark.slow
def test_no_damaged_file_ends_in_anything_but_one_message():
    command = [sys.executable, "-m", "build_tools.fuzz", "--seconds", "15", "--seed", "16"]
    done = subprocess.run(command, cwd=made_data.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in fuzz_readers.READERS:
        assert f"\n{name}: " in done.stdout
    assert "\nfuzz: seed 16: " in done.stdout and " 0 findings" in done.stdout


def reader(read, **more):
    return fuzz_readers.Reader(lambda folder: [b"12345678"], fuzz_readers._file("f"), read, **more)


PLANTED = {
    "another_error": (lambda path: {}[path], "KeyError"),
    "no_name": (lambda path: (_ for _ in ()).throw(TrainError("it is damaged")), "names no file"),
    "two_lines": (
        lambda path: (_ for _ in ()).throw(BackendError(f"{path}\nis damaged")),
        "in one line",
    ),
    "hang": (lambda path: [0 for _ in iter(int, 1)], "Hang"),
    "memory": (lambda path: len(bytearray(8 << 30)), "MemoryError"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_what_is_wrong_with_a_reader_is_found(case, tmp_path):
    """In a process of its own, as it limits memory."""
    code = (
        "import sys; from pathlib import Path; from build_tools import fuzz, fuzz_readers;"
        "from tests import test_fuzz; fuzz.LIMIT_S = 1; fuzz.FOUND = Path(sys.argv[2]) / 'found';"
        "read = test_fuzz.PLANTED[sys.argv[1]][0]; fuzz.ROOT = Path(sys.argv[2]);"
        "first = iter([True]);"
        "fuzz_readers.READERS['planted'] = test_fuzz.reader("
        "lambda path: None if next(first, False) else read(path));"
        "print(*fuzz.fuzz('planted', 1, 1, Path(sys.argv[2])).findings)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, case, str(tmp_path)],
        cwd=made_data.ROOT,
        capture_output=True,
        text=True,
    )
    assert PLANTED[case][1] in done.stdout, done.stdout + done.stderr
    assert list((tmp_path / "found").iterdir())


def test_inputs_that_reach_new_lines_are_kept_and_others_are_not():
    reached = fuzz.Reached()
    from fusedmlp.train import schedule

    def run(call):
        reached.new = False
        sys.settrace(reached)
        try:
            call()
        finally:
            sys.settrace(None)
        return reached.new

    call = lambda: list(map(str, fuzz_changes.NUMBERS))  # noqa: E731
    assert not run(call)  # none of the package
    inside = lambda: schedule.__dict__ and TrainErrorLine()  # noqa: E731
    assert run(inside) and not run(inside)


def TrainErrorLine():
    from fusedmlp.train.errors import first_line

    return first_line(ValueError("one\ntwo"))


def test_the_same_seed_makes_the_same_inputs():
    kinds = [fuzz_readers.READERS[name] for name in ("csv", "measured.json")]
    for kind in kinds:
        seed = kind.seeds(None)[0]
        made = [
            [fuzz_changes.changed(pick, seed, [seed], kind) for _ in range(50)]
            for pick in (random.Random(3), random.Random(3), random.Random(4))
        ]
        assert made[0] == made[1] != made[2]
        assert len(set(made[0])) > 30


def test_json_stays_json_most_of_the_time():
    kind, pick = fuzz_readers.READERS["measured.json"], random.Random(0)
    seed = b'{"a": {"b": [1, 2.5, "c"]}, "d": null}'
    good = 0
    for _ in range(200):
        try:
            json.loads(fuzz_changes.changed(pick, seed, [seed], kind))
            good += 1
        except ValueError:
            pass
    assert good > 100
