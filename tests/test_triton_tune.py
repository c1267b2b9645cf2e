"""The file of tuned tiles: looked up, written, and never in the way. The timer is a fake one."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

SIZES = "linear_act", "half", 4000, 1000, 1000
DEVICE = "NVIDIA Test, triton 3"


@pytest.fixture
def tune(tmp_path, monkeypatch):
    from fusedmlp.kernels.triton import tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "_table_name", lambda device: DEVICE)
    tune.forget()
    yield tune
    monkeypatch.undo()
    tune.forget()


@pytest.fixture
def target():
    from fusedmlp.kernels.triton import configs

    return configs.target(90)


def _stored(tune, target):
    return tune._stored(*SIZES, 2, target, DEVICE)


def _write(tune, text):
    tune.path().parent.mkdir(parents=True, exist_ok=True)
    tune.path().write_text(text)
    tune.forget()


def test_without_a_file_nothing_is_stored(tune, target):
    assert _stored(tune, target) is None


def test_a_stored_tile_serves_its_size_class(tune, target):
    from fusedmlp.kernels.triton import configs

    tile = configs.fitting("half", 2, target)[3]._replace(splits=2)
    _write(tune, json.dumps({DEVICE: {tune.size_class(*SIZES): list(tile)}}))
    assert _stored(tune, target) == tile
    assert tune.size_class(*SIZES) == tune.size_class("linear_act", "half", 4096, 1024, 600)
    assert tune._stored("dgrad_act", *SIZES[1:], 2, target, DEVICE) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 3}', '{"x": {"y": [1, 2]}}'])
def test_a_damaged_file_is_named_and_not_used(text, tune, target, caplog):
    _write(tune, text)
    with caplog.at_level("WARNING", "fusedmlp"):
        assert _stored(tune, target) is None
    assert str(tune.path()) in caplog.text


def test_a_tile_that_this_version_does_not_have_is_not_used(tune, target):
    _write(tune, json.dumps({DEVICE: {tune.size_class(*SIZES): [7, 7, 7, 4, 3, False, 1]}}))
    assert _stored(tune, target) is None


def test_tuning_keeps_the_fastest_tile_and_shows_progress(tune, target, monkeypatch):
    import triton

    from fusedmlp.kernels.triton import configs, launch

    candidates = configs.candidates(*SIZES, 2, target)
    times = {tile: 1.0 + i for i, tile in enumerate(reversed(candidates))}
    monkeypatch.setattr(tune, "INTERPRET", False)
    monkeypatch.setattr(tune, "_call", lambda *args: lambda tile: times[tile])
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    monkeypatch.setattr(launch, "capability", lambda t: target)
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, **kwargs: call())
    lines = []
    best = tune.tune_one("linear_act", torch.bfloat16, *SIZES[2:], progress=lines.append)
    assert best == candidates[-1] and len(lines) == len(candidates)
    tune.forget()
    assert _stored(tune, target) == best


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_every_size_has_a_default_that_the_device_can_hold(arch):
    from fusedmlp.kernels.triton import configs

    target = configs.target(arch)
    for kind, itemsize in (("half", 2), ("tf32", 4), ("ieee", 4)):
        for m, n, k in ((1, 1, 1), (1, 1, 0), (64, 10, 65536), (16384, 16384, 4096), (10**9, 1, 1)):
            for op in ("linear_act", "dgrad_act"):
                tile = configs.default_tile(op, kind, m, n, k, itemsize, target)
                assert configs.shared_bytes(tile, itemsize) < target.shared
                assert tile.splits == 1 or op == "linear_act"
