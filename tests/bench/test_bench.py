"""The benchmark harness: what it refuses to time, how it compares, that no table is typed."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import cases, check, providers, record, report, run, tables, timing, train
from bench.cases import Case

SMALL = Case("t", "bias_act_dropout", "fwd+bwd", 64, (48,), p=(0.5,))
LINEAR = Case("t", "linear_act", "fwd+bwd", 64, (24, 48))


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors on a busy machine: waiting for a second thread would be most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class CountingTimer:
    """Takes no time; says which function it was given, and how long that one pretends to take."""

    max_calls = 4
    sample_ms = 1.0

    def __init__(self, ms: dict, disturbed_rounds: tuple = ()):
        self.ms, self.seen, self.disturbed = ms, [], disturbed_rounds
        self.asked = self.count = 0

    def disturbances(self):
        """Asked before and after each round."""
        self.asked += 1
        if self.asked % 2 == 0 and self.asked // 2 - 1 in self.disturbed:
            self.count += 1
        return self.count

    def sample(self, function, calls):
        self.seen.append(function)
        return self.ms[function], self.ms[function] / 2


def test_a_spread_is_linear_between_neighbours():
    assert timing.spread([3.0, 1.0, 2.0])[0] == 2.0
    assert timing.spread([0.0, 10.0]) == [5.0, 2.0, 8.0]
    assert timing.spread(list(range(11))) == [5, 2, 8]
    assert timing.spread([7.0]) == [7, 7, 7]


def test_a_ratio_is_taken_round_by_round():
    """The machine slows down tenfold half-way; both functions do, so the ratio does not move."""
    slow = timing.Timing(ms=[2.0, 2.0, 20.0, 20.0])
    fast = timing.Timing(ms=[1.0, 1.0, 10.0, 10.0])
    assert timing.ratio(slow, fast) == [2.0, 2.0, 2.0]


def test_every_round_times_every_function_once_in_changing_order():
    def a(): ...

    def b(): ...

    def c(): ...

    clock = CountingTimer({a: 1.0, b: 2.0, c: 4.0})
    timings = timing.measure({"a": a, "b": b, "c": c}, clock, budget_s=0, min_rounds=12)
    rounds = [clock.seen[-36:][i : i + 3] for i in range(0, 36, 3)]
    assert all(set(one) == {a, b, c} for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert {name: t.ms for name, t in timings.items()} == {
        "a": [1.0] * 12, "b": [2.0] * 12, "c": [4.0] * 12,
    }  # fmt: skip
    assert timings["c"].host_ms == [2.0] * 12


def test_a_disturbed_round_is_left_out_for_all_functions():
    def a(): ...

    def b(): ...

    ms = {a: 1.0, b: 2.0}
    clock = CountingTimer(ms, disturbed_rounds=(3, 7))
    found = timing.measure({"a": a, "b": b}, clock, budget_s=0, min_rounds=5, max_rounds=5)
    assert len(found["a"].ms) == 5, "with too few rounds left, all are kept"
    clock = CountingTimer(ms, disturbed_rounds=(0, 2))
    found = timing.measure({"a": a, "b": b}, clock, budget_s=9, min_rounds=5, max_rounds=8)
    assert [(len(t.ms), len(t.host_ms), t.left_out) for t in found.values()] == [(6, 6, 2)] * 2


def test_the_cpu_timer_reads_the_time_of_one_call():
    ms, _ = timing.CpuTimer().sample(lambda: time.sleep(0.002), 3)
    assert 2 <= ms < 60


def test_the_cpu_timer_rests_outside_the_clock():
    started = time.perf_counter()
    ms, _ = timing.CpuTimer(rest=0.5).sample(lambda: None, 1)
    assert ms < 250 and time.perf_counter() - started >= 0.5


def test_the_cpu_timer_does_not_rest_by_itself(monkeypatch):
    """Asleep for 0 s, a processor still forgets what it had in its caches."""
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: pytest.fail("it slept"))
    timing.CpuTimer().sample(lambda: None, 1)


def test_a_time_budget_ends_the_rounds():
    started = time.perf_counter()
    found = timing.measure(
        {"x": lambda: time.sleep(0.001)}, timing.CpuTimer(), budget_s=0.05, min_rounds=2
    )
    assert time.perf_counter() - started < 5
    assert 2 <= len(found["x"].ms) < 500


@pytest.mark.parametrize("case", [
    SMALL,
    LINEAR,
    Case("t", "dropout", "fwd+bwd", 64, (48,), p=(0.25,)),
    Case("t", "bias_act_dropout", "infer", 64, (48,), "gelu", (0.25,)),
    Case("t", "linear_act", "infer", 64, (24, 48), p=(0.5,)),
    Case("t", "linear_act", "bwd", 32, (24, 48), "tanh", dtype="bf16"),
    Case("t", "layer", "fwd+bwd", 64, (24, 48), "gelu", (0.5,)),
    Case("t", "net", "step", 64, (24, 48, 10), p=(0.5,)),
    Case("t", "net", "step", 64, (24, 48, 32, 10), p=(0.2, 0.5)),
], ids=str)  # fmt: skip
def test_right_providers_get_a_number(case):
    names = ["eager", "reference", "auto", "floor"]
    names += ["op"] * (case.mode == "infer" and case.p[0] > 0)
    rows = run.run_case(case, names, 0.0)
    by_name = {row["provider"]: row for row in rows}
    assert not [row for row in rows if "error" in row]
    for name in names:
        row = by_name[name]
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["rounds"] >= 10
        assert len(row["eager_over_this"]) == 3
    assert by_name["eager"]["eager_over_this"] == [1.0, 1.0, 1.0]
    assert "over_floor" in by_name["auto"]


def _wrong_forward(monkeypatch, replacement):
    """Puts `replacement(y)` in place of what this package's providers return."""
    right = providers.Problem._functional

    def functional(self, name, backend, ours):
        forward = right(self, name, backend, ours)
        return (lambda: replacement(forward())) if ours else forward

    monkeypatch.setattr(providers.Problem, "_functional", functional)


@pytest.mark.parametrize("bug", [
    lambda y: y * 1.001,
    lambda y: y + 0 * y.detach().roll(1, 0) + (y.roll(1, 0) - y) * 0.01,
    lambda y: torch.where(torch.arange(y.shape[-1]) == 5, torch.nan, y),
    lambda y: F.dropout(y, 0.1),
], ids=["scaled", "shifted", "nan", "dropped_twice"])  # fmt: skip
def test_a_wrong_provider_gets_no_number(monkeypatch, bug):
    _wrong_forward(monkeypatch, bug)
    rows = {row["provider"]: row for row in run.run_case(SMALL, ["eager", "reference"], 0.0)}
    assert "ms" in rows["eager"]
    assert "ms" not in rows["reference"]
    assert "is wrong: relative error" in rows["reference"]["error"]


def test_a_wrong_gradient_gets_no_number(monkeypatch):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    _wrong_forward(monkeypatch, Doubled.apply)
    row = next(r for r in run.run_case(LINEAR, ["reference"], 0.0) if r["provider"] == "reference")
    assert row["error"].startswith("dx is wrong")


def test_a_baseline_that_drops_at_another_rate_gets_no_number(monkeypatch):
    monkeypatch.setattr(providers.F, "dropout", lambda x, p: torch.dropout(x, p / 2, True))
    problem = providers.Problem(SMALL)
    assert "drops a share of" in check.wrong(problem, problem.provider("eager"))


def test_a_provider_that_raises_is_a_row_and_not_the_end(monkeypatch):
    _wrong_forward(monkeypatch, lambda y: y.no_such_thing)
    rows = {row["provider"]: row for row in run.run_case(SMALL, ["eager", "auto"], 0.0)}
    assert "AttributeError" in rows["auto"]["error"] and "ms" in rows["eager"]


def test_rounds_run_every_way_once_with_the_seed_of_the_round():
    seen: dict[str, list[int]] = {"a": [], "b": []}
    ways = {name: lambda seed, name=name: seen[name].append(seed) or seed for name in seen}
    found = timing.rounds(ways, 3, only_first={"b": 2})
    assert seen == {"a": [0, 1, 2], "b": [0, 1]}
    assert [(len(seconds), values) for seconds, values in found.values()] == [
        (3, [0, 1, 2]), (2, [0, 1]),
    ]  # fmt: skip
    found = timing.rounds(ways, 3, until=-math.inf)
    assert found["a"][1] == [0], "the first round is always made"


def test_work_is_counted_once():
    assert cases.bytes_moved(SMALL) == 5 * 64 * 48 * 4
    assert cases.flops(LINEAR) == 3 * 2 * 64 * 24 * 48
    net = Case("t", "net", "step", 8, (4, 6, 2))
    assert cases.flops(net) == 2 * 8 * (4 * 6 * 2 + 6 * 2 * 3)  # no gradient of the input


def test_the_suites_hold_what_the_claims_need():
    grid = cases.grid()
    assert len({(c.m, c.dims) for c in grid if c.op == "layer"}) >= 30
    assert {c.act for c in grid} == {"relu", "gelu", "tanh"}
    wanted = {("bias_act_dropout", "fwd+bwd", n, (n,)) for n in (256, 1024, 4096)}
    wanted |= {("net", "step", 256, (784, 256, 10)), ("net", "step", 256, (784, 256, 256, 10))}
    assert wanted <= {(c.op, c.mode, c.m, c.dims) for c in cases.SUITES["cpu"]()}
    for name in cases.SUITES:
        found = [tables.key(case.columns()) for case in cases.SUITES[name]()]
        assert len(found) == len(set(found)), f"a case is twice in {name}"


@pytest.mark.parametrize("bad", [
    dict(op="mlp"), dict(mode="forward"), dict(dtype="fp8"), dict(dims=(3,)), dict(p=(0.1, 0.2)),
    dict(mode="step"),
], ids=str)  # fmt: skip
def test_a_case_that_makes_no_sense_is_refused(bad):
    good = dict(group="t", op="layer", mode="fwd", m=2, dims=(3, 4))
    with pytest.raises(ValueError, match="bench: "):
        Case(**(good | bad))


def _results(root: Path, rows: list[dict]) -> Path:
    out = root / "bench" / "results" / "cpu.json"
    record.write(out, record.header("cpu", "bench.run", ["--suite", "cpu"]) | {"rows": rows})
    return out


@pytest.fixture
def checkout(tmp_path):
    """A README and a results file with one figure and one wrong provider."""
    columns = Case("step", "net", "step", 256, (784, 256, 10)).columns() | {"clock": "wall"}
    eager = columns | {"provider": "eager", "ms": 2.0, "eager_over_this": [1.0, 1.0, 1.0]}
    ours = columns | {"provider": "auto", "ms": 1.0, "eager_over_this": [2.0, 1.9, 2.1]}
    bad = columns | {"provider": "compile", "error": "y is wrong"}
    _results(tmp_path, [eager, ours | {"over_floor": [1.1, 1.0, 1.2]}, bad])
    text = "before\n<!-- bench:step -->\n<!-- /bench:step -->\nafter\n"
    (tmp_path / "README.md").write_text(text)
    return tmp_path


def test_report_writes_tables_and_then_finds_nothing_to_write(checkout):
    readme = checkout / "README.md"
    arguments = ["--root", str(checkout)]
    assert report.main([*arguments, "--check"]) == 1
    assert "| " not in readme.read_text(), "--check must write nothing"
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| net 256 x 784-256-10 | relu | 0 | fp32 | step | 2.00 | 2.00 (1.90–2.10) |" in text
    assert "python -m bench.run --suite cpu" in text
    assert report.main([*arguments, "--check"]) == 0


@pytest.mark.parametrize("what", ["a figure in the table", "a results file"])
def test_check_fails_when_table_and_results_differ(checkout, what, capsys):
    arguments = ["--root", str(checkout)]
    report.main(arguments)
    if what == "a results file":
        path = checkout / "bench" / "results" / "cpu.json"
        path.write_text(path.read_text().replace("[2.0, 1.9, 2.1]", "[3.0, 1.9, 2.1]"))
    else:
        readme = checkout / "README.md"
        readme.write_text(readme.read_text().replace("2.00 (1.90", "9.00 (1.90"))
    assert report.main([*arguments, "--check"]) == 1
    assert "README.md: differs from the results files" in capsys.readouterr().out


def test_a_marker_without_its_twin_is_an_error(checkout):
    (checkout / "README.md").write_text("<!-- bench:step -->\nno end\n")
    with pytest.raises(ValueError, match="opening and closing twin"):
        report.main(["--root", str(checkout)])


def test_times_and_accuracies_over_seeds_become_one_table(checkout):
    times = {"seconds": [2.0, 1.9, 2.2], "time over fusedmlp's": [1.0, 1.0, 1.0], "rounds": 3}
    scores = {"mean": 0.8456, "deviation": 0.0123, "seeds": 10}
    for name, found in (("train", times), ("seeds", scores)):
        row = {"network": "784-256-10", "way": "fusedmlp"} | found
        head = record.header(name, f"bench.{name}", [])
        record.write(checkout / "bench" / "results" / f"{name}.json", head | {"rows": [row]})
    (checkout / "README.md").write_text("<!-- bench:train -->\n<!-- /bench:train -->\n")
    report.main(["--root", str(checkout)])
    text = (checkout / "README.md").read_text()
    cells = ["784-256-10", "fusedmlp", "2.00 (1.90–2.20)", "1.00 (1.00–1.00)", "3"]
    assert "| " + " | ".join([*cells, "0.8456 ± 0.0123", "10"]) + " |" in text
    assert "python -m bench.train" in text and "python -m bench.seeds" in text


def test_seeds_are_compared_in_standard_errors():
    rows = [
        {"network": "n", "way": "fusedmlp", "mean": 0.84, "deviation": 0.03, "seeds": 9},
        {"network": "n", "way": "other", "mean": 0.85, "deviation": 0.04, "seeds": 16},
    ]
    train.compare(rows)
    assert "ours off by" not in rows[0]
    assert rows[1]["ours off by"] == pytest.approx(-0.01 / math.hypot(0.01, 0.01))


def test_the_engines_results_become_a_table_a_group(checkout):
    step = {"group": "batch", "case": "784-256-10 batch 1", "threads": 2}
    step |= {"native_us": [10, 9, 11], "gemms_us": [8, 7, 9], "eager_us": [30, 29, 31]}
    step |= {"over_gemms": [1.25, 1.2, 1.3], "over_eager": [3.0, 2.9, 3.1]}
    many = {"group": "ensemble", "case": "20-64-64-10 batch 32", "threads": 2, "members": 4}
    many |= {"native_us": [40, 39, 41], "over_one": [2.0, 1.8, 2.2]}
    header = record.header("engine_step", "bench.steps", [])
    path = checkout / "bench" / "results" / "engine_step.json"
    record.write(path, header | {"rows": [step, many]})
    names = ["batch", "ensemble", "width"]
    marked = (f"<!-- bench:engine-{n} -->\n<!-- /bench:engine-{n} -->\n" for n in names)
    (checkout / "README.md").write_text("".join(marked))
    report.main(["--root", str(checkout)])
    parts = (checkout / "README.md").read_text().split("<!-- bench:")[1:]
    steps = "| 784-256-10 batch 1 | 2 | 10 | 8 | 30 | 1.25 (1.20–1.30) | 3.00 (2.90–3.10) |"
    both = "| 20-64-64-10 batch 32 | 2 | 4 | 40 | 2.00 (1.80–2.20) | 0.50 (0.45–0.55) |"
    assert [steps in part for part in parts] == [True, False, False]
    assert [both in part for part in parts] == [False, True, False]
    assert "Not measured yet" in parts[2]


def test_the_searches_results_become_a_table(checkout):
    from bench import crossval

    ways = {"crossval": lambda seed: 0.02 + seed / 100, "fit": lambda seed: 0.04}
    rows = crossval.rows_of("2 candidates x 3 folds", ways, 2, "validation error")
    for row, seconds in zip(rows, (2.0, 5.0), strict=True):
        row["seconds"], row["time over fusedmlp's"] = [seconds] * 3, [seconds / 2] * 3
    found = record.header("crossval", "bench.crossval", ["--threads", "2"]) | {"rows": rows}
    record.write(checkout / "bench" / "results" / "crossval.json", found)
    readme = checkout / "README.md"
    readme.write_text("<!-- bench:crossval -->\n<!-- /bench:crossval -->\n")
    report.main(["--root", str(checkout)])
    text, folds = readme.read_text(), "| 2 candidates x 3 folds |"
    fit = "5.00 (5.00–5.00) | 2.50 (2.50–2.50) | validation error 4.00% | 2 |"
    assert (
        f"{folds} crossval | 2.00 (2.00–2.00) | 1.00 (1.00–1.00) | validation error 2.50%" in text
    )
    assert f"{folds} fit | {fit}" in text
    assert "python -m bench.crossval --threads 2" in text
    (checkout / "bench" / "results" / "crossval.json").unlink()
    report.main(["--root", str(checkout)])
    assert "Not measured yet" in readme.read_text()


def test_a_table_without_results_says_so(checkout):
    (checkout / "README.md").write_text("<!-- bench:gpu-step -->\n<!-- /bench:gpu-step -->\n")
    report.main(["--root", str(checkout)])
    assert "Not measured yet" in (checkout / "README.md").read_text()


def test_run_writes_a_results_file_that_report_reads(tmp_path, capsys):
    out = tmp_path / "bench" / "results" / "one.json"
    command = ["--op", "bias_act_dropout", "--m", "16", "--dims", "32", "--p", "0.5"]
    command += ["--mode", "fwd", "--providers", "eager", "auto", "--budget", "0"]
    assert run.main([*command, "--out", str(out)]) == 0
    found = record.read(out)
    assert {row["provider"] for row in found["rows"]} == {"eager", "auto"}
    assert found["command"].startswith("python -m bench.run --op bias_act_dropout")
    before = found["rows"]
    assert run.main([*command, "--out", str(out), "--resume"]) == 0
    assert record.read(out)["rows"] == before, "--resume must keep what was measured"


def test_run_names_what_it_had_no_time_for(tmp_path, capsys):
    out = tmp_path / "grid.json"
    assert run.main(["--suite", "grid", "--seconds", "-1", "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["left_out"]) == len(cases.grid())
    assert "cases left" in capsys.readouterr().out


def test_the_grid_fails_below_its_bound():
    cell = Case("grid", "layer", "infer", 8, (8, 8)).columns() | {"provider": "auto", "ms": 1.0}
    rows = [cell | {"eager_over_this": [r, r, r]} for r in (1.3, 0.955, 1.1)]
    text, lowest = tables.grid_summary(rows)
    assert lowest == 0.955 and "lowest 0.955 at layer 8 x 8-8" in text and "1 below 0.97" in text
