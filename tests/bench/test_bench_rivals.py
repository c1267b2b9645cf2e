"""The rivals of bench.steps and bench.train: their values, what is left out, busy programs."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from bench import cases, peak, record, report, rivals, steps, timing, train, ways
from bench.ways import network

SMALL = "--group rivals --dims 12-16-3 --batch 16 --rows 64 --steps 4 --budget 0 --threads 1"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _need(name: str) -> None:
    if name == "JAX":
        pytest.importorskip("jax", reason="needs jax of the rivals extra")
    if name == "NumPy":
        pytest.importorskip("threadpoolctl", reason="needs threadpoolctl of the rivals extra")


RIVALS = ["NumPy", "JAX", pytest.param("compiled step", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("rows", [40, 128, 136], ids=lambda n: f"{n} rows")
def test_a_rival_takes_pytorchs_steps(name, rows):
    """Also where the last batch is smaller, or the only one."""
    _need(name)
    case, data = network("12-32-16-3", batch=64), ways.noise(160, 50, 12, 3)
    order = torch.randperm(160)[:rows]
    plain, rival = ways.Eager(case, data), rivals.WAYS[name](case, data)
    for way in (plain, rival):
        way.steps(order)
        way.steps(order)
    torch.testing.assert_close(ways.flat(rival.net), ways.flat(plain.net), rtol=0, atol=1e-6)
    assert rival.read() == pytest.approx(plain.read(), rel=1e-5)
    assert rival.read() == 0
    x = data.scaling(data.x_test)
    assert rival.accuracy(x, data.y_test) == pytest.approx(plain.accuracy(x, data.y_test))


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_drops_at_the_networks_rates(name):
    """At rate 0 the weights stay, and the mean loss of many steps is that of our masks."""
    _need(name)
    case = network("12-64-64-3", (0.2, 0.6), batch=64, rate=0.0)
    data, order = ways.noise(1024, 1, 12, 3), torch.arange(1024)
    losses = []
    for way in (ways.Masked(case, data), rivals.WAYS[name](case, data)):
        for p in way.net.parameters():
            p.data.mul_(4)  # masks count for more
        for _ in range(6):
            way.steps(order)
        losses.append(way.read())
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_numpys_gradients_pass_where_units_were_kept():
    _need("NumPy")
    case, data = network("12-8-3", (0.5,), batch=16), ways.noise(16, 1, 12, 3)
    rival, plain = rivals.NumPy(case, data), ways.Eager(case, data)
    keep = torch.rand(16, 8) >= 0.5

    class Draws:
        random = staticmethod(lambda shape, dtype: keep.float().numpy())

    rival.random = Draws
    first, _, _, last = plain.net
    plain.loss = lambda x, y: F.cross_entropy(last(F.relu(first(x)) * keep * 2), y)
    for way in (rival, plain):
        way.steps(torch.arange(16))
    torch.testing.assert_close(ways.flat(rival.net), ways.flat(plain.net), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["NumPy", "JAX"])
def test_a_rival_that_is_wrong_is_found(name, monkeypatch):
    _need(name)
    case, data = network("12-32-3", batch=64), ways.noise(256, 1, 12, 3)
    checker = ways.Checker(case, data, torch.randperm(256))
    assert checker.wrong(rivals.WAYS[name](case, data)) is None
    slower = network("12-32-3", batch=64, rate=0.97 * case.rate)
    assert "relative error" in checker.wrong(rivals.WAYS[name](slower, data))


def test_coarse_products_are_held_to_their_own_precision():
    case, data = network("256-256-3", batch=256), ways.noise(512, 1, 256, 3)
    try:
        way = rivals.Medium(case, data)
    except RuntimeError as error:
        pytest.skip(str(error))
    before = torch.get_float32_matmul_precision()
    assert ways.Checker(case, data, torch.randperm(512)).wrong(way) is None
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("name", ["NumPy", "JAX", "eager, medium"])
def test_what_is_written_for_fp32_says_so(name):
    _need(name)
    with pytest.raises(RuntimeError, match="written for fp32, not for bf16"):
        rivals.WAYS[name](network("12-8-3", precision="bf16"), ways.noise(8, 1, 12, 3))


def test_the_table_of_rivals_beside_a_busy_program(tmp_path):
    _need("NumPy")
    out = tmp_path / "bench" / "results" / "rivals.json"
    arguments = [*SMALL.split(), "--ways", "eager", "NumPy", "--busy", "0", "1", "--out", str(out)]
    assert steps.main(arguments) == 0
    rows = [row for row in record.read(out)["rows"] if "left out" not in row]
    found = [(row["way"], row["busy"]) for row in rows if row["way"] in ("eager", "NumPy")]
    assert found == [("eager", 0), ("NumPy", 0), ("eager", 1), ("NumPy", 1)]
    assert all(("over_quiet" in row) == (row["busy"] == 1) for row in rows)
    (tmp_path / "README.md").write_text("<!-- bench:rivals -->\n<!-- /bench:rivals -->\n")
    report.main(["--root", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "| 12-16-3 batch 16 | fp32 | NumPy |" in text and "--busy 0 1" in text


def test_without_jax_its_row_has_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax", None)
    out = tmp_path / "rivals.json"
    assert steps.main([*SMALL.split(), "--ways", "JAX", "--out", str(out)]) == 0
    (row,) = [row for row in record.read(out)["rows"] if row["way"] == "JAX"]
    assert "jax" in row["left out"] and "us a step" not in row
    (job, _), data = train.jobs(None, 1, "cpu"), ways.noise(64, 8)
    assert [type(way) for way in train.ready(job, data, ["JAX"])] == [train.Ours]
    assert "JAX, jitted epoch is left out: " in capsys.readouterr().err


@pytest.mark.parametrize("make", [train.NumPy, train.Jax], ids=lambda make: make.name)
def test_a_rivals_training_is_pytorchs(make):
    _need(make.name.split()[0].rstrip(","))
    (job, _), data = train.jobs(None, 2, "cpu"), ways.noise(600, 200)
    plain, rival = train.InMemory(job, data), make(job, data)
    assert rival.run(3) == pytest.approx(plain.run(3), abs=0.011)
    nets = [ways.flat(way.loop.net) for way in (rival, plain)]
    torch.testing.assert_close(*nets, rtol=0, atol=1e-5)
    assert rival.run(3) == pytest.approx(plain.run(3), abs=0.011), "it begins anew"
    (row,) = [r for r in train.time_rows(job, data, [plain, rival], 1) if r["way"] == make.name]
    assert ("compile, s" in row) == (make is train.Jax)


def test_resuming_adds_a_way_to_the_table(tmp_path):
    def rows(*names: str, busy: dict | None = None) -> list[dict]:
        columns = {"network": "784-256-10", "epochs": 10, "rounds": 3} | (busy or {})
        return [columns | {"way": n, "seconds": [1.0, 1.0, 1.0]} for n in names]

    out = tmp_path / "bench" / "results" / "train.json"
    first = record.Results(record.header("train", "bench.train", ["--threads", "2"]), out)
    train.put(first, rows("fusedmlp", train.ScikitLearn.name))
    head = record.header("train", "bench.train", ["--ways", "JAX", "--resume"])
    second = record.resumed(head, out)
    train.put(second, rows("fusedmlp", train.Jax.name))
    train.put(second, rows("fusedmlp", busy={"busy": 1}))
    found = [(row["way"], row.get("busy")) for row in record.read(out)["rows"]]
    wanted = [("fusedmlp", None), ("fusedmlp", 1), (train.Jax.name, None)]
    assert found == [*wanted, (train.ScikitLearn.name, None)]
    (tmp_path / "README.md").write_text("<!-- bench:train -->\n<!-- /bench:train -->\n")
    report.main(["--root", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "| 784-256-10 | JAX, jitted epoch | 1.00" in text
    assert text.index("--threads 2`") < text.index("--ways JAX --resume`")


def test_the_distance_from_fp64_beside_that_of_pytorch():
    job = train.jobs(None, 1, "cpu")[0]
    data = ways.noise(600, 100)
    one, two = train.parity_rows(job, data, [1, 2], seeds=2)
    assert (one["steps"], two["steps"]) == (1, 2)
    for row in (one, two):
        assert 0 < row["max error"] < 1e-6 and row["RMS ratio"][0] <= 2


def test_busy_programs_spin_until_the_end(monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or started[-1]
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with timing.busy(2):
        time.sleep(0.3)
        assert [program.poll() for program in started] == [None, None]
    assert all(program.poll() is not None for program in started)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before > 0.05


def test_beside_busy_programs_every_round_counts():
    class Disturbed(timing.CpuTimer):
        count = 0

        def disturbances(self):
            self.count += 1
            return self.count

    function = {"x": lambda: None}
    taken = timing.measure(function, Disturbed(), budget_s=0, max_rounds=12, every_round=True)
    assert len(taken["x"].ms) == 10 and taken["x"].left_out == 0


def test_the_peak_needs_a_compiler(monkeypatch):
    best = peak.gflops(1)
    assert best is None or best > 1
    monkeypatch.setenv("CC", "no-such-compiler")
    peak._loop.cache_clear()
    assert peak.gflops(1) is None
    peak._loop.cache_clear()


def test_a_peak_below_what_a_step_reached_is_no_peak(monkeypatch):
    # As measured where the host let both processors share one core while the samples were taken.
    monkeypatch.setattr(peak, "_best", {(2, "fp32"): 1e-3})
    monkeypatch.setattr(peak, "_loop", lambda dtype: lambda rounds: 0.0)
    t = timing.Timing([1.0, 1.0, 1.0])
    assert steps._share(t, 10**6, 2) == {}
    assert steps._share(t, 10**2, 2)["share of peak"][0] == pytest.approx(0.1)


def test_the_peak_is_the_best_of_all_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(peak, "_best", {(1, "fp32"): 1e9})
    monkeypatch.setattr(peak, "_loop", lambda dtype: lambda rounds: 1.0)
    assert peak.gflops(1) == 1e9


def test_operations_of_a_step_are_counted_alike():
    case = cases.Case("t", "net", "step", 8, (4, 6, 5, 2), p=(0.0, 0.0))
    assert network("4-6-5-2", batch=8).flops == cases.flops(case)


def test_groups_that_busy_is_not_for(capsys):
    with pytest.raises(SystemExit):
        steps.parse(["--group", "ways", "--busy", "1"])
    assert "--busy is for the groups of a CPU" in capsys.readouterr().err
