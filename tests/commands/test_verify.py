"""`fusedmlp verify`: what it prints, and that a wrong backend, mask or bit does not pass."""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from fusedmlp import cli
from fusedmlp.backends import native
from fusedmlp.commands import cases, repeats, verify

from ..native import needs_native

FP32 = torch.float32
FEW = [
    cases.Case("linear_act", 37, 5, 29, "gelu", 0.3, FP32),
    cases.Case("linear_act", 37, 5, 29, "relu", 0.5, FP32, integers=True),
]


@pytest.fixture
def few(monkeypatch):
    """The table has two cases, and only one op's calls are repeated."""
    monkeypatch.setattr(
        cases,
        "table",
        lambda op, dtype, device="cpu": FEW if (op, dtype) == (FEW[0].op, FP32) else [],
    )
    monkeypatch.setattr(cases, "shared", lambda op, dtype: FEW)
    monkeypatch.setattr(repeats, "CIRCUMSTANCES", {"again": repeats.CIRCUMSTANCES["again"]})
    monkeypatch.setattr(repeats, "promised", lambda op, device: ["again"])
    monkeypatch.setattr(verify, "runners", lambda op, dtype, device: WHO if device == "cpu" else [])


WHO = [verify.Runner("reference")]


@needs_native
def test_every_instruction_set_of_the_processor_is_run():
    found = {runner.isa for runner in verify.runners("linear_act", FP32, "cpu")} - {""}
    assert found == set(native.cpu_isas()) and "baseline" in found
    before = native.cpu_isa()
    for isa in found:
        with verify.Runner("native", isa).set():
            assert native.cpu_isa() == isa
    assert native.cpu_isa() == before


def test_it_prints_how_many_cases_ran(few, capsys):
    assert cli.main(["verify"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"reference +cpu +linear_act +fp32 +2 +1 +0\.\d\d equal  ok", told), told
    assert re.search(r"all right: 2 cases in \d+ s\n$", told), told


@pytest.mark.parametrize(
    "bug, said",
    [
        (
            lambda case, t: t if case.integers else t * 1.01,
            r"1 WRONG: gelu, p = 0.3, 37x5x29.*: y takes .* the error budget",
        ),
        (
            # One unit in the last place: the budget does not see it, equality does.
            lambda case, t: torch.nextafter(t, t + 1) if case.integers else t,
            r"1 WRONG: relu, p = 0.5, 37x5x29, .*integers, .*: y is not equal to the truth",
        ),
        (lambda case, t: t.double(), r"2 WRONG: .*: y is torch.float64 \(37, 29\)"),
        (lambda case, t: t[:, 1:], r"2 WRONG: .*: y is torch.float32 \(37, 28\)"),
        (lambda case, t: 1 / 0, r"2 WRONG: .*: ZeroDivisionError: division by zero"),
        (lambda case, t: t * torch.nan, r"2 WRONG: .*: y takes inf times the error budget"),
    ],
    ids=["1 %", "last place", "dtype", "shape", "raises", "NaN"],
)
def test_a_wrong_backend_is_named_with_its_first_case(bug, said, few, monkeypatch, capsys):
    right = verify.run

    def wrong(case, backend, inputs=None):
        found = right(case, backend, inputs)
        return found | {"y": bug(case, found["y"])} if inputs else found

    monkeypatch.setattr(verify, "run", wrong)
    assert cli.main(["verify"]) == 1
    told = capsys.readouterr().out
    assert re.search(said, told), told
    assert re.search(r"\n1 WRONG: 2 cases in", told)


def test_wrong_masks_are_named(few, monkeypatch, capsys):
    monkeypatch.setattr(verify, "masks_agree", lambda backend, device: False)
    assert cli.main(["verify"]) == 1
    assert "DIFFER" in capsys.readouterr().out


# --- the same bits ------------------------------------------------------------------------------


# In a process of its own: where a test before this one has started the threads that PyTorch's
# backward has for other devices, PyTorch refuses to go backward in a forked process.
_BITS = """
import sys
from fusedmlp.commands import cases, repeats, verify
op, fp32 = sys.argv[1], cases.DTYPES["fp32"]
found = [*cases.shared(op, fp32), *cases.spread(cases.table(op, fp32), pairs=False)]
promised = repeats.promised(op, "cpu")
for what, wrong in repeats.changed(found, lambda c: verify.run(c, "native"), promised):
    print(what, *wrong, sep="; ")
"""


@needs_native
@pytest.mark.parametrize("op", cases.OPS)
def test_bits_are_the_same_in_every_circumstance(op):
    command = [sys.executable, "-c", _BITS, op]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == repeats.promised(op, "cpu")


_calls = []


@pytest.mark.parametrize(
    "what, of",
    [
        ("again", lambda: len(_calls)),
        ("1 thread", torch.get_num_threads),
        ("several at once", lambda: int(threading.current_thread() is threading.main_thread())),
        ("forked", os.getpid),
        ("forked", lambda: 1 / (os.getpid() == PID)),
    ],
    ids=["call", "threads", "Python thread", "process", "failure in a fork"],
)
def test_bits_that_depend_on_something_are_seen(what, of):
    def results(case):
        _calls.append(case)
        return {"y": torch.tensor([float(of())])}

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert dict(repeats.changed(FEW, results, [what])) == {what: FEW}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


PID = os.getpid()
