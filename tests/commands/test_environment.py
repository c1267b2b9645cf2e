"""Values from the environment get the checks and the wording of arguments."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fusedmlp
from fusedmlp import cli, environment, fuse
from fusedmlp.backends import registry
from fusedmlp.commands import info

WRONG = {
    "FUSEDMLP_BACKEND": ("foo", "one of native, triton, reference"),
    "FUSEDMLP_CPU_ISA": ("foo", "one of baseline, avx2, avx512, avx512_bf16, amx"),
    "FUSEDMLP_DATA": (__file__, "a folder"),
    "FUSEDMLP_BUILD": ("gpu", "one of auto, cpu, cuda, none"),
    "FUSEDMLP_DDP_SECONDS": ("soon", "a number of seconds above 0"),
    "FUSEDMLP_AUTOTUNE": ("yes", "one of 0, 1"),
}
RIGHT = {
    "FUSEDMLP_BACKEND": "reference",
    "FUSEDMLP_CPU_ISA": "avx2",
    "FUSEDMLP_DATA": os.path.dirname(__file__),
    "FUSEDMLP_BUILD": "none",
    "FUSEDMLP_DDP_SECONDS": "2.5",
    "FUSEDMLP_AUTOTUNE": "1",
}


def test_every_variable_is_here():
    assert set(WRONG) == set(RIGHT) == set(environment.VARIABLES)
    assert environment.CHOICES["FUSEDMLP_BACKEND"] == fusedmlp.list_backends()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_names_itself_and_what_was_wanted(name, monkeypatch, capsys):
    value, wanted = WRONG[name]
    message = f"{name} must be {wanted}, got {value!r}; unset it for the default"
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        environment.read(name)
    assert str(error.value) == message and environment.problems() == [message]
    assert any(message in line for line in info.lines())
    assert cli.main(["verify", "--help"]) == cli.MISUSED
    assert capsys.readouterr().err == f"fusedmlp: {message}\n"
    assert cli.main(["info"]) == 0
    monkeypatch.setenv(name, RIGHT[name])
    assert environment.read(name) == RIGHT[name] and environment.problems() == []
    for unset in ("", None):
        monkeypatch.setenv(name, unset) if unset == "" else monkeypatch.delenv(name)
        assert environment.read(name) is None and environment.problems() == []


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_seconds_that_nobody_can_wait(seconds, monkeypatch):
    monkeypatch.setenv("FUSEDMLP_DDP_SECONDS", seconds)
    with pytest.raises(ValueError, match="must be a number of seconds above 0"):
        environment.read("FUSEDMLP_DDP_SECONDS")


def test_a_wrong_backend_is_named_by_whatever_asks_for_one(monkeypatch):
    """A container once raised KeyError: 'foo'."""
    monkeypatch.setattr(registry, "_from_environment", "foo")
    x, net = torch.ones(4, 6), nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))
    calls = (
        lambda: fuse(net)(x),
        lambda: fusedmlp.FusedLinear(6, 3)(x),
        lambda: fusedmlp.FusedDropout(0.5)(x),
        lambda: fusedmlp.functional.linear_act(x, net[0].weight),
        lambda: fusedmlp.functional.dropout(x),
        lambda: fusedmlp.functional.cross_entropy(x, torch.zeros(4, dtype=torch.int64)),
        fusedmlp.explain,
        lambda: fusedmlp.report(fuse(net)),
    )
    for call in calls:
        with pytest.raises(ValueError, match="FUSEDMLP_BACKEND must be one of .* got 'foo'"):
            call()
    with fusedmlp.use_backend("reference"):
        calls[0]()


def test_importing_and_info_work_with_every_value_wrong():
    wrong = {name: value for name, (value, _) in WRONG.items()}
    code = "import fusedmlp; from fusedmlp.cli import main; raise SystemExit(main(['info']))"
    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | wrong, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert all(f"{name} must be" in out.stdout for name in WRONG)
