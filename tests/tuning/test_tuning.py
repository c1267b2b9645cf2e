"""Measured choices: candidates of every kind of failure, the table that they are kept in, and what
a call does with it. The times of most tests are made up."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import fusedmlp
from fusedmlp import cli
from fusedmlp.backends import choice, measured, registry
from fusedmlp.commands import tune
from fusedmlp.trial.candidates import Problem, candidates
from fusedmlp.trial.check import wrong
from fusedmlp.tuning import classes, measure
from fusedmlp.tuning.work import Work

from . import fakes
from .works import DROPS, WORK, keep, network, ran

HAS_NATIVE = registry.is_usable("native", "cpu", torch.float32, "mlp")


# --- candidates ---------------------------------------------------------------------------------


def test_candidates_that_fail_are_reported_and_not_timed(caplog):
    """In another process, which is started again after the one that hangs and the one that ends
    it."""
    (found,) = measure.measure([WORK], 0.02, limit=20, module="tests.tuning.fakes")
    work, result = found
    assert set(result["times"]) == {"eager", "right", "slow"}
    assert result["times"]["slow"] > result["times"]["right"]
    reasons = result["wrong"]
    assert reasons["hangs"] == "it did not return within 20 s"
    assert reasons["dies"] == "it ended the process, exit code 11"
    assert reasons["does not compile"] == "it raises RuntimeError: ptxas: no such instruction"
    assert reasons["off"].startswith("the output takes ")
    assert reasons["bad gradient"].startswith("the gradient of weight of layer 0 takes ")
    lines = measure.bugs(work, result)
    assert len(lines) == 5 and all("please report this line: fusedmlp" in line for line in lines)
    assert all(f"torch {torch.__version__}" in line and str(work) in line for line in lines)
    assert "right" in measure.summary(work, result)


def test_a_process_that_cannot_measure_plain_pytorch_is_an_error(monkeypatch):
    with pytest.raises(registry.BackendError, match="tune: .*did not start: it ended the process"):
        list(measure.measure([WORK], module="tests.tuning.no_such_module"))


@pytest.mark.parametrize(
    "work",
    [
        WORK,
        DROPS,
        Work("cpu", "fp32", 7, 33, (("gelu", False, 5),), False),
        Work("cpu", "fp32", 1, 8, (("prelu", True, 3), ("tanh", True, 300)), True),
        Work("cpu", "bf16", 64, 32, (("relu", True, 16), ("none", False, 10)), True),
        Work("cpu", "fp32", 300, 0, (("sigmoid", True, 40),), True),
        # Of few numbers plain PyTorch's errors can be next to nothing by luck.
        classes.work_of(1, [511, 5, 503, 93], "relu", True, True),
        classes.work_of(1, [219, 14, 756], "gelu", True, True),
        classes.work_of(2, [238, 4, 9, 13], "relu", True, True),
        classes.work_of(17, [741, 6, 6, 746], "tanh", True, True),
        classes.work_of(171, [631, 18, 6, 12], "gelu", True, True),
    ],
    ids=str,
)
def test_what_the_package_has_is_right_and_a_mistake_is_found(work):
    found = candidates(work)
    assert next(iter(found)) == "eager"
    for name, candidate in found.items():
        if candidate.call is not None:
            assert wrong(work, candidate.call) is None, name
    assert "times the error budget" in wrong(work, lambda p: lambda: 1.01 * p.reference())
    if work.gradients:
        assert "the gradient of" in wrong(work, fakes._bad_gradient)


def test_the_same_work_has_the_same_numbers():
    a, b = Problem(DROPS), Problem(DROPS)
    assert all(torch.equal(s, t) for s, t in zip(a.params, b.params, strict=True))
    assert torch.equal(a.reference(), b.reference())


# --- the choice ---------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_NATIVE, reason="the native backend is not built")
def test_a_network_runs_on_what_was_the_fastest_at_its_size():
    assert ran(network()) == "eager"
    for times, wanted in (
        (dict(eager=100.0, native_mlp=80.0, native_layers=90.0), "native mlp"),
        (dict(eager=100.0, native_mlp=95.0, native_layers=90.0), "native layers"),
        (dict(eager=100.0, native_mlp=99.0, native_layers=120.0), "eager"),  # not worth it
        (dict(eager=100.0), "eager"),
    ):
        keep(WORK, **times)
        assert ran(network()) == wanted
        assert ran(network(), 31) == wanted  # the same size class
        assert ran(network(), 64) == "eager"
    keep(WORK, {"native mlp": "its output is wrong"}, eager=100.0)
    assert ran(network()) == "eager"


@pytest.mark.skipif(not HAS_NATIVE, reason="the native backend is not built")
def test_with_dropout_plain_pytorch_is_not_chosen_however_fast():
    keep(DROPS, eager=1.0, native_mlp=50.0, native_layers=40.0, reference=90.0)
    assert ran(network(DROPS)) == "native layers"
    keep(DROPS, eager=1.0, native_mlp=50.0, native_layers=40.0, reference=9.0)
    assert ran(network(DROPS)) == "reference"


@pytest.mark.skipif(not HAS_NATIVE, reason="the native backend is not built")
def test_the_ways_of_a_network_agree(monkeypatch):
    torch.manual_seed(3)
    nets = [network(DROPS) for _ in range(3)]
    outputs = []
    for net, times in zip(
        nets, (dict(native_mlp=1.0), dict(native_layers=1.0), dict(reference=1.0)), strict=True
    ):
        net.load_state_dict(nets[0].state_dict())
        keep(DROPS, eager=9.0, **times)
        torch.manual_seed(5)
        x = torch.randn(32, 20)
        outputs.append(net(x))
    assert all(torch.equal(outputs[0] == 0, y == 0) for y in outputs)
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0])


def _with_classes(monkeypatch, **kinds) -> None:
    shipped = {
        name.replace("_", " "): {
            "versions": {},
            "classes": {WORK.class_key: {"networks": 9, "ratios": {"native mlp": list(pair)}}},
        }
        for name, pair in kinds.items()
    }
    monkeypatch.setattr(measured, "shipped", lambda: shipped)


@pytest.mark.skipif(not HAS_NATIVE, reason="the native backend is not built")
@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        (dict(Test_cpu=(0.98, 1.2)), "native mlp"),
        (dict(Test_cpu=(0.96, 1.9)), "eager"),  # slower on some
        (dict(Test_cpu=(0.99, 1.01)), "eager"),
        (dict(Test_cpu=(0.98, 1.2), other=(0.5, 0.6)), "native mlp"),
        (dict(other=(1.2, 1.5)), "native mlp"),  # a CPU that nobody measured
        (dict(other=(1.05, 1.5)), "eager"),
        (dict(other=(1.2, 1.5), another=(0.9, 1.5)), "eager"),
        ({}, "eager"),
    ],
)
def test_a_class_of_networks_decides_where_the_size_is_not_known(kinds, wanted, monkeypatch):
    _with_classes(monkeypatch, **kinds)
    assert ran(network()) == wanted


@pytest.mark.skipif(not HAS_NATIVE, reason="the native backend is not built")
def test_the_size_comes_before_the_class(monkeypatch):
    _with_classes(monkeypatch, Test_cpu=(1.5, 2.0))
    assert ran(network()) == "native mlp"
    keep(WORK, eager=10.0, native_mlp=20.0)
    assert ran(network()) == "eager"


@pytest.mark.skipif(not HAS_NATIVE, reason="the native backend is not built")
def test_deterministic_mode_and_the_environment_read_what_was_shipped_alone(monkeypatch):
    keep(WORK, eager=100.0, native_mlp=10.0)
    net = network()
    assert ran(net) == "native mlp"
    torch.use_deterministic_algorithms(True)
    try:
        assert ran(net) == "eager"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("FUSEDMLP_AUTOTUNE", "0")
    assert ran(network()) == "eager"


@pytest.mark.skipif(not HAS_NATIVE, reason="the native backend is not built")
def test_report_and_explain_quote_the_times():
    rows_256 = Work("cpu", "fp32", 256, 20, WORK.layers, True)
    keep(rows_256, eager=100.0, native_mlp=80.0)
    text = str(fusedmlp.report(network()))
    assert "measured on this machine: native mlp 80 us, eager 100 us" in text
    one = Work("cpu", "fp32", 256, 784, (("relu", False, 256),), True)
    keep(one, eager=100.0, native_layers=70.0)
    e = fusedmlp.explain()
    assert e.choice == "native" and "native layers 70 us, eager 100 us" in e.why


def test_every_class_that_is_shipped_can_be_read_and_is_met():
    """By the package's own loader; each key is one that a network can have."""
    shipped = measured._read(measured.SHIPPED)
    keys = {work.class_key for work in classes.random_works(4000, 3)}
    for name, entry in shipped.items():
        assert entry["classes"], name
        assert len(set(entry["classes"]) - keys) < 0.1 * len(entry["classes"])


@pytest.mark.parametrize("drops", [False, True])
def test_enough_wide_networks_are_drawn_to_speak_for_their_class(drops):
    wide = classes.work_of(256, [784, 1024, 1024, 10], "relu", drops, True)
    drawn = [work.class_key for work in classes.random_works(tune._NETWORKS, 0)]
    assert drawn.count(wide.class_key) >= 2 * classes._FEWEST


# --- measuring at the first call ----------------------------------------------------------------


@pytest.fixture
def made_up(monkeypatch) -> list[Work]:
    """The works that are measured, in no time: native mlp is right and fast, triton wrong."""
    seen = []

    def measured_(works, *rest, **more):
        for work in works:
            seen.append(work)
            times = {"eager": 100.0, "native mlp": 50.0}
            ratios = {"eager": 1.0, "native mlp": 2.0}
            wrong = {"triton mlp": "the output takes 7 times the error budget"}
            yield work, {"times": times, "ratios": ratios, "wrong": wrong}

    monkeypatch.setattr(measure, "measure", measured_)
    return seen


@pytest.mark.skipif(not HAS_NATIVE, reason="the native backend is not built")
def test_the_first_call_of_a_size_measures_where_it_was_asked_for(made_up, monkeypatch, caplog):
    assert ran(network()) == "eager" and not made_up
    monkeypatch.setenv("FUSEDMLP_AUTOTUNE", "1")
    for _ in range(2):
        assert ran(network()) == "native mlp"
    assert made_up == [WORK]
    assert "triton mlp is never chosen here" in caplog.text
    with torch.no_grad():
        network()(torch.randn(32, 20))
    assert [work.gradients for work in made_up] == [True, False]


def test_a_first_call_that_cannot_be_measured_runs_all_the_same(monkeypatch, caplog):
    def fails(works, *rest, **more):
        raise registry.BackendError("tune: the process that measures did not start")
        yield

    monkeypatch.setattr(measure, "measure", fails)
    monkeypatch.setenv("FUSEDMLP_AUTOTUNE", "1")
    for _ in range(2):
        assert ran(network()) == "eager"
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "could not be measured: tune: the process that measures did not start" in message


def test_a_cpu_that_nobody_measured_is_told_once(monkeypatch, caplog):
    _with_classes(monkeypatch, other=(1.05, 1.5))
    registry.log_once.cache_clear()
    with caplog.at_level(logging.INFO, "fusedmlp"):
        for _ in range(2):
            ran(network())
    (message,) = [r.getMessage() for r in caplog.records if "was not measured" in r.getMessage()]
    assert message.startswith("a CPU like this one (Test cpu) was not measured")


def test_nothing_is_measured_inside_of_a_trace_or_in_deterministic_mode(made_up, monkeypatch):
    monkeypatch.setenv("FUSEDMLP_AUTOTUNE", "1")
    torch.use_deterministic_algorithms(True)
    try:
        network()(torch.randn(32, 20))
    finally:
        torch.use_deterministic_algorithms(False)
    net = nn.Sequential(*network())
    torch.compile(fusedmlp.fuse(net), backend="eager")(torch.randn(32, 20))
    torch.fx.symbolic_trace(fusedmlp.fuse(net))
    assert not made_up
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    from fusedmlp.tuning import first_call

    assert not first_call.is_allowed("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert first_call.is_allowed("cuda") and not first_call.is_allowed("mps")


# --- the command --------------------------------------------------------------------------------


def test_the_command_says_what_was_tried_what_won_and_what_is_wrong(made_up, capsys):
    asked = ["tune", "--net", "20-64-10", "--rows", "32", "--device", "cpu", "--dropout"]
    assert cli.main(asked) == cli.FAILED  # a candidate is wrong
    said = capsys.readouterr()
    assert made_up == [WORK, Work(*_values(WORK, gradients=False)), DROPS]
    assert (
        "native mlp wins, 2.00 times as fast as plain PyTorch (native mlp 50 us, eager" in said.out
    )
    assert said.out.count("This is a bug; please report this line: fusedmlp") == 3
    assert f"kept in {measured.path()}" in said.out and "3 failed" in said.err
    assert cli.main([*asked, "--missing"]) == 0 and len(made_up) == 3
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert f"cpu, {WORK.key}: native mlp 50 us, eager 100 us, triton mlp WRONG" in shown


def _values(work: Work, **changes) -> list:
    return list((work.__dict__ | changes).values())


def test_without_sizes_a_cpu_measures_classes_of_networks(made_up, capsys):
    assert cli.main(["tune", "--device", "cpu", "--networks", "400"]) == cli.FAILED
    rows = measured.own("cpu")["classes"]
    assert rows and all(row["networks"] >= 5 for row in rows.values())
    assert all(row["ratios"]["native mlp"] == [2.0, 2.0] for row in rows.values())
    said = capsys.readouterr().out
    assert f"native mlp in {len(rows)}; 2.00 to 2.00 times as fast" in said
    assert said.count("triton mlp is never chosen here") == 1


def test_a_class_in_which_all_were_wrong_is_plain_pytorchs():
    said = classes.summary({"a class": {"networks": 5, "ratios": {}}})
    assert said[1:] == ["  plain PyTorch in 1"]


def test_ctrl_c_keeps_what_there_is(made_up, monkeypatch, capsys):
    whole = measure.measure

    def stopped(works, *rest):
        for i, found in enumerate(whole(works)):
            if i == 300:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(tune.measure, "measure", stopped)
    cli.main(["tune", "--device", "cpu", "--networks", "400"])
    assert "ended after 300 of" in capsys.readouterr().out
    assert measured.own("cpu")["classes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "0"], "--networks must be at least 1, got 0"),
        (["--networks", "9", "1x2x3", "--device", "cpu"], "--networks is for a CPU, without sizes"),
        (["--device", "tpu"], "invalid choice"),
        (["--act", "swish", "1x2x3"], "invalid choice"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", *arguments])
    assert stop.value.code == cli.MISUSED
    assert message in capsys.readouterr().err


def test_a_named_backend_is_not_overruled():
    keep(WORK, eager=100.0, native_mlp=1.0)
    with fusedmlp.use_backend("reference"):
        assert choice.select_net("cpu", torch.float32, 32, 20, WORK.kinds, "reference") is None
        assert ran(network()) == "reference"
