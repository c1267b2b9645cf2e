"""The file of tuned tiles: looked up, written, and never in the way. The timer is a fake one."""

import json

import pytest
import torch

from fusedmlp import cli
from fusedmlp.backends import measured, registry
from fusedmlp.commands import tune as tune_command

pytest.importorskip("triton", reason="Triton is not installed")

ROWS = "--rows", "16", "--dtype", "bf16"
SIZES = "linear_act", "half", 4000, 1008, 1008
DEVICE = "NVIDIA Test"


@pytest.fixture
def tune(tmp_path, monkeypatch):
    from fusedmlp.backends.triton import tile_cache as tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "kind", lambda device_type: DEVICE)
    measured.forget()
    yield tune
    monkeypatch.undo()
    measured.forget()


@pytest.fixture
def target():
    from fusedmlp.backends.triton import tiles

    return tiles.target(90)


def _stored(tune, target):
    return tune._stored(*SIZES, 2, target, False)


def _write(tune, text):
    measured.path().parent.mkdir(parents=True, exist_ok=True)
    measured.path().write_text(text)
    measured.forget()


def _entry(tune, tile):
    return {"versions": measured.versions("cuda"), "tiles": {tune.size_class(*SIZES): tile}}


def test_without_a_file_nothing_is_stored(tune, target):
    assert _stored(tune, target) is None


def test_a_stored_tile_serves_its_size_class(tune, target):
    from fusedmlp.backends.triton import tiles

    tile = tiles.fitting("half", 2, target)[3]._replace(splits=2)
    _write(tune, json.dumps({DEVICE: _entry(tune, list(tile))}))
    assert _stored(tune, target) == tile
    assert tune.size_class(*SIZES) == tune.size_class("linear_act", "half", 4096, 1024, 600)
    assert tune._stored("dgrad_act", *SIZES[1:], 2, target, False) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"x": 3}', '{"x": {"versions": {}, "tiles": {"y": ["a"]}}}']
)
def test_a_damaged_file_is_named_and_not_used(text, tune, target, caplog):
    _write(tune, text)
    with caplog.at_level("WARNING", "fusedmlp"):
        assert _stored(tune, target) is None
    assert str(measured.path()) in caplog.text


def test_a_tile_that_this_version_does_not_have_is_not_used(tune, target):
    _write(tune, json.dumps({DEVICE: _entry(tune, [7, 7, 7, 4, 3, 0, 1])}))
    assert _stored(tune, target) is None


def test_tuning_at_the_first_call_times_that_call_and_keeps_the_fastest(tune, target, monkeypatch):
    import triton

    from fusedmlp.backends.triton import tiles

    class OnAGpu:
        is_cuda, device = True, torch.device("cuda", 0)

        def element_size(self):
            return 2

    candidates = tiles.candidates(*SIZES, 2, target)
    times = {tile: 1.0 + i for i, tile in enumerate(reversed(candidates))}
    monkeypatch.setattr(tune, "INTERPRET", False)
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, **kwargs: call())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    timed = []

    def choose():
        run = lambda tile: (timed.append(tile), times[tile])[1]  # noqa: E731
        return tune.choose(*SIZES, OnAGpu(), target, False, run)

    assert choose() == tiles.default_tile(*SIZES, 2, target) and not timed
    monkeypatch.setenv("FUSEDMLP_AUTOTUNE", "1")
    assert choose() == candidates[-1] and timed == candidates
    measured.forget()
    assert _stored(tune, target) == choose() == candidates[-1] and timed == candidates
    monkeypatch.setenv("FUSEDMLP_AUTOTUNE", "0")
    assert choose() == tiles.default_tile(*SIZES, 2, target)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def gpu(tune, target, monkeypatch):
    """A GPU whose tiles take a time that is made up; 'none runs' for one size."""
    import triton

    from fusedmlp.backends.triton import autotune, tiles

    triton_backend = registry.Backend("triton", lambda d: None, ())
    monkeypatch.setitem(registry._BY_NAME, "triton", triton_backend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "INTERPRET", False)
    monkeypatch.setattr(tune_command, "_measure", lambda works, tick, say: 0)

    def candidates(job):
        return tiles.candidates(job.op, "half", job.m, job.n, job.k, 2, target)[:3]

    def call(job):
        def run(tile):
            if job.m == 7:
                raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
            return 1.0 + candidates(job)[::-1].index(tile)

        return run

    monkeypatch.setattr(autotune.Job, "candidates", candidates)
    monkeypatch.setattr(autotune.Job, "call", call)
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, **kwargs: call())
    return tune


def test_the_command_keeps_the_fastest_tile_of_each_size(gpu, target, capsys):
    from fusedmlp.backends.triton import tiles

    assert cli.main(["tune", "4000x1008x1008", "--net", "64-32-8", *ROWS]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:-1]] == [
        "linear_act bf16 4000 x 1008 -> 1008",
        "dgrad_act bf16 4000 x 1008 -> 1008",
        "linear_act bf16 16 x 64 -> 32",
        "dgrad_act bf16 16 x 32 -> 64",
        "linear_act bf16 16 x 32 -> 8",
        "dgrad_act bf16 16 x 8 -> 32",
    ]
    assert said[-1] == f"kept in {measured.path()}"
    measured.forget()
    assert cli.main(["tune", "4000x1008x1008", "16x8x32", "--missing", *ROWS]) == 0
    said = capsys.readouterr().out.splitlines()
    # Sizes are kept by class: 16 x 32 -> 8 above was timed on odd rows, as dgrad_act's are here.
    assert [line.split(":")[0] for line in said[:-1]] == [
        "linear_act bf16 16 x 8 -> 32",
        "dgrad_act bf16 16 x 32 -> 8",
    ]
    assert _stored(gpu, target) == tiles.candidates(*SIZES, 2, target)[2]


def test_a_size_of_which_no_tile_runs_is_named(gpu, capsys):
    assert cli.main(["tune", "7x8x9", *ROWS]) == cli.FAILED
    said = capsys.readouterr()
    assert "linear_act bf16 7 x 8 -> 9: no tile ran" in said.out
    assert "2 failed" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give layers"),
        (["12x8"], "must be sizes from 1 on"),
        (["12x8x0"], "must be sizes from 1 on"),
        (["1x2x3x4"], "must be MxKxN"),
        (["--net", "64"], "must be sizes from 1 on"),
        (["1x2x3", "--rows", "0"], "--rows must be at least 1"),
        (["1x2x3", "--dtype", "fp64"], "invalid choice"),
        (["1x2x3", "--gpu", "2"], "--gpu must be below 2"),
    ],
)
def test_wrong_arguments_of_the_command(arguments, message, gpu, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", *arguments])
    assert stop.value.code == cli.MISUSED
    assert message in capsys.readouterr().err


def test_without_a_gpu_the_command_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["tune", "256x784x256", "--device", "cuda"]) == cli.FAILED
    assert "--device cuda: no GPU is available to torch" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path, monkeypatch, capsys):
    if not torch.cuda.is_available():
        pytest.skip("no GPU is available to torch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.forget()
    try:
        assert cli.main(["tune", "256x64x32", "--dtype", "bf16"]) == 0
        assert measured.path().exists()
    finally:
        measured.forget()
    assert "linear_act bf16 256 x 64 -> 32: " in capsys.readouterr().out


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_every_size_has_a_default_that_the_device_can_hold(arch):
    from fusedmlp.backends.triton import tiles

    target = tiles.target(arch)
    for kind, itemsize in (("half", 2), ("tf32", 4), ("ieee", 4)):
        for m, n, k in ((1, 1, 1), (1, 1, 0), (64, 10, 65536), (16384, 16384, 4096), (10**9, 1, 1)):
            for op in ("linear_act", "dgrad_act"):
                tile = tiles.default_tile(op, kind, m, n, k, itemsize, target)
                assert tiles.shared_bytes(tile, itemsize) < target.shared
                assert tile.splits == 1 or op == "linear_act"


@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
def test_odd_rows_take_tiles_that_were_compiled_for_them(kind, target):
    """None with descriptors, none that spills by kernels.json, in a size class of its own."""
    from fusedmlp.backends.triton import tile_cache as tune
    from fusedmlp.backends.triton import tiles

    itemsize = 2 if kind == "half" else 4
    wide = tiles.candidates("linear_act", kind, 4096, 4096, 4096, itemsize, target)
    odd = tiles.candidates("linear_act", kind, 4096, 4096, 4091, itemsize, target, True)
    assert odd and {t._replace(splits=1) for t in odd} < {t._replace(splits=1) for t in wide}
    assert all(tiles.for_odd_rows(t, kind, target) and not t.descriptors for t in odd)
    sizes = "linear_act", kind, 64, 64, 64
    assert tune.size_class(*sizes, True) != tune.size_class(*sizes)


def test_what_odd_rows_are():
    from fusedmlp.backends.triton import gemm

    x, w = torch.zeros(8, 32), torch.zeros(4, 32)
    assert not gemm._odd(x, w) and not gemm._odd(x, w.t().contiguous().view(4, 32))
    assert gemm._odd(x[:, :20].contiguous(), w[:, :20].contiguous())
    assert gemm._odd(x[:, 1:17], w[:, :16])  # rows are 32 apart but do not start at 16 bytes
    assert gemm._odd(torch.zeros(8, 64)[:, ::2], w)
    assert not gemm._odd(torch.zeros(1, 32)[:, :32], w)
    transposed = torch.zeros(32, 16).t()
    assert not gemm._odd(x, transposed)
    assert gemm._odd(x, torch.zeros(32, 4).t())
