"""Several processes: the masks, the order and, within the budget, the parameters of one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fusedmlp.spec import philox
from fusedmlp.train.process import World

from .. import made_data

made_data.need(*made_data.TRAIN_EXTRA)
from fusedmlp.train import commands, run_folder  # noqa: E402

# 240 rows, 48 of them held out: the last of the batches of 50 has 42 rows, which 4 does not divide.
FLAGS = ("--hidden", "24", "16", "--dropout", "0.2", "0.5", "--batch-size", "50", "--lr", "0.3")
FLAGS += ("--init", "default", "--epochs", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """An npz of pictures, for all processes to read."""
    import numpy as np

    made = made_data.pictures(rows=256)
    file = tmp_path_factory.mktemp("data") / "made.npz"
    parts = ("x_train", "y_train", "x_test", "y_test")
    np.savez(file, **{name: getattr(made, name).numpy() for name in parts})
    return file


def torchrun(
    processes: int, *arguments, cwd: Path, program: tuple = ("-m", "fusedmlp"), **changes
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *program, "train", *map(str, arguments)]
    environment = made_data.environment(GLOO_SOCKET_IFNAME="lo", **changes)
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def alone(rows, tmp_path_factory) -> Path:
    """The same run in one process."""
    place = tmp_path_factory.mktemp("alone")
    done = made_data.fusedmlp("train", "--dataset", rows, *FLAGS, "--out", "run", cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "run"


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoint.pt", weights_only=True)["model"]


def _exact(rows: Path) -> dict[str, torch.Tensor]:
    """The run in fp64, as the truth for both."""
    from fusedmlp.train import build, fit
    from fusedmlp.train.data import datasets

    config, _ = commands.parse_train(["--dataset", str(rows), *FLAGS, "--backend", "reference"])
    loaded = datasets.load(config)
    net = build.build_network(config, loaded).double()
    fit(net, loaded, config)
    return net.state_dict()


@pytest.fixture(scope="module")
def together(rows, tmp_path_factory):
    """processes -> (run folder, what was said); each is run once."""
    done = {}

    def run(processes: int) -> tuple[Path, str]:
        if processes not in done:
            place = tmp_path_factory.mktemp(f"together{processes}")
            ended = torchrun(processes, "--dataset", rows, *FLAGS, "--out", "run", cwd=place)
            assert ended.returncode == 0, ended.stderr
            done[processes] = place / "run", ended.stdout
        return done[processes]

    return run


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_the_network_of_one(processes, rows, alone, together):
    run, said = together(processes)
    assert said.count("epoch   3/3") == 1  # rank 0 alone talks
    truth, one, several = _exact(rows), _weights(alone), _weights(run)
    for name, exact in truth.items():
        budget = (one[name].double() - exact).abs().max().item()
        found = (several[name].double() - exact).abs().max().item()
        scale = exact.abs().max().item()
        assert found <= 2 * budget + torch.finfo(torch.float32).eps * scale, name
    summaries = [json.loads((place / "summary.json").read_text()) for place in (alone, run)]
    assert summaries[1]["processes"] == processes
    assert summaries[0]["train_loss"] == pytest.approx(summaries[1]["train_loss"], rel=1e-5)
    assert summaries[0]["test_accuracy"] == summaries[1]["test_accuracy"]


@pytest.mark.slow
def test_several_processes_resume_what_they_began(rows, together, tmp_path):
    first = torchrun(2, "--dataset", rows, *FLAGS, "--epochs", 1, "--out", "part", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = torchrun(2, "--resume", "part", "--epochs", "3", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    whole, part = _weights(together(2)[0]), _weights(tmp_path / "part")
    assert all(torch.equal(whole[name], part[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the threads in /proc")
def test_no_thread_of_the_group_is_left(rows, tmp_path):
    """One that frees a tensor while Python ends aborts the process, now and then."""
    (tmp_path / "main.py").write_text(
        "import gc, pathlib, sys\n"
        "from fusedmlp.__main__ import main\n"
        "gc.disable()\n"
        "status = main()\n"
        "names = [n.read_text() for n in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "sys.exit(status or [n for n in names if 'gloo' in n] or 0)\n"
    )
    arguments = ("--dataset", rows, *FLAGS, "--out", "run")
    ended = torchrun(2, *arguments, cwd=tmp_path, program=("main.py",))
    assert ended.returncode == 0, ended.stdout + ended.stderr


def _long_run(rows: Path, place: Path) -> subprocess.Popen:
    """Two processes in the middle of a run."""
    flags = [*map(str, FLAGS), "--epochs", "100000", "--dataset", str(rows), "--out", "run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "fusedmlp", "train", *flags]
    child = subprocess.Popen(
        command,
        cwd=place,
        env=made_data.environment(GLOO_SOCKET_IFNAME="lo"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not (place / "run" / "checkpoint.pt").exists() and time.monotonic() < until:
        time.sleep(0.1)
    return child


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_is_told_of_by_the_other(rank, rows, tmp_path):
    """Rank 0 does the talking, but it may be the one that is gone."""
    child = _long_run(rows, tmp_path)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    is_it = f"RANK={rank}".encode()
    (victim,) = [
        n for n in children if is_it in Path(f"/proc/{n}/environ").read_bytes().split(b"\0")
    ]
    os.kill(int(victim), signal.SIGKILL)
    said, _ = child.communicate(timeout=120)
    other = f"fusedmlp: process {1 - rank} of 2: another process has ended or does not answer; its "
    assert said.count(other) == 1, said
    assert "is kept: go on with --resume run" in said
    done = run_folder.load_checkpoint(tmp_path / "run")["position"]["epoch"]
    again = torchrun(2, "--resume", "run", "--epochs", done + 1, cwd=tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_at_one_step_with_a_checkpoint(rows, tmp_path):
    child = _long_run(rows, tmp_path)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
    said, _ = child.communicate(timeout=120)
    assert "go on with: fusedmlp train --resume run" in said, said
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert content["position"]["global_step"] > 0
    assert "summary.json" not in [entry.name for entry in (tmp_path / "run").iterdir()]


@pytest.mark.parametrize("batch", [1, 5, 50, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_of_a_batch_cover_it_once_with_its_masks(batch, size):
    whole = philox.dropout_mask(3, 7, batch, 20, 0.5)
    shares = [World(rank, size).rows(batch) for rank in range(size)]
    assert shares[0][0] == 0 and shares[-1][1] == batch
    parts = [philox.dropout_mask(3, 7, b - a, 20, 0.5, row_offset=a) for a, b in shares]
    assert torch.equal(torch.cat(parts), whole)


def test_a_mistake_is_told_once_and_ends_all(rows, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    done = torchrun(2, "--dataset", rows, *FLAGS, "--out", "run", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("already holds a run") == 1
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_never_come_are_not_waited_for_without_end(rank, tmp_path):
    """Each says so: rank 0, which talks otherwise, may be the one that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    changes = place | {"MASTER_PORT": str(port), "FUSEDMLP_DDP_SECONDS": "2"}
    done = made_data.fusedmlp("train", "--dataset", "synthetic", cwd=tmp_path, **changes)
    assert done.returncode == 1
    told = f"process {rank} could not join the 2 processes at 127.0.0.1:{port} within 2 s"
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_half_an_environment_of_torchrun_is_named(tmp_path):
    changes = dict(RANK="0", WORLD_SIZE="2")
    done = made_data.fusedmlp("train", "--dataset", "synthetic", cwd=tmp_path, **changes)
    assert done.returncode == 2
    assert (
        "RANK is set but MASTER_ADDR is not; start several processes with torchrun" in done.stderr
    )


def test_weighted_rows_are_those_of_one_process(rows, tmp_path):
    flags = (*FLAGS, "--class-weight", "balanced", "--precision", "fp32")
    done = made_data.fusedmlp("train", "--dataset", rows, *flags, "--out", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = torchrun(2, "--dataset", rows, *flags, "--out", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
