"""The fusedmlp command: what it prints, its exit codes, and one clear message for every mistake."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from fusedmlp import cli
from fusedmlp.train import RunOptions, TrainConfig
from fusedmlp.train.data import images
from fusedmlp.train.run_folder import load_checkpoint

from .. import made_data

made_data.need(*made_data.TRAIN_EXTRA, "sklearn")
from fusedmlp.train import commands  # noqa: E402

QUICK = ("--device", "cpu", "--epochs", "2")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "download", lambda *_: "no network in tests")
    monkeypatch.setenv("FUSEDMLP_DATA", str(tmp_path / "none"))
    monkeypatch.setattr(
        images,
        "IMAGE_SETS",
        {n: replace(s, system_folders=()) for n, s in images.IMAGE_SETS.items()},
    )


def run(*arguments) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # of tyro and argparse
        return stop.code


def test_digits_are_trained_tested_and_predicted(capsys, tmp_path):
    """The main job with no data set on disk and no network, in few epochs."""
    assert run("train", *QUICK) == 0
    said = capsys.readouterr().out
    assert "note: training on scikit-learn's digits instead" in said
    assert re.search(r"epoch +2/2  train loss \S+ accuracy \S+  test loss \S+ accuracy", said)
    assert "run folder: runs/0001" in said
    summary = json.loads((tmp_path / "runs" / "0001" / "summary.json").read_text())
    assert summary["dataset"] == "digits" and summary["batch_size"] == 32

    assert run("evaluate", "runs/0001") == 0
    said = capsys.readouterr().out
    assert f"accuracy {summary['test_accuracy']:.4f}" in said and "359 test rows" in said

    assert run("predict", "runs/0001", "--rows", "5") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 5 and rows[0].keys() == {"row", "predicted", "probability", "true"}

    assert run("train", *QUICK) == 0
    assert (tmp_path / "runs" / "0002" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, wanted",
    [((), 0.94), (("--hidden", "256", "256", "--dropout", "0.2", "0.5", "--lr", "0.5"), 0.95)],
    ids=["first", "dropout"],
)
@pytest.mark.parametrize("seed", [0, 3])
def test_digits_are_learned_with_the_defaults(flags, wanted, seed, tmp_path):
    assert run("train", "--dataset", "digits", "--seed", seed, *flags) == 0
    summary = json.loads((tmp_path / "runs" / "0001" / "summary.json").read_text())
    assert summary["test_accuracy"] >= wanted and summary["epochs"] == 30


def test_every_flag_is_a_field_with_help(capsys):
    assert run("train", "--help") == 0
    said = capsys.readouterr().out
    for name in TrainConfig().to_dict():
        assert f"--{name.replace('_', '-')}" in said
    for said_too in ("default: relu", "--dropout {None}|{[FLOAT", "fp32,tf32,bf16,fp16"):
        assert said_too in said


def test_flags_arrive_in_the_config():
    flags = (
        "--hidden 32 16 --dropout 0.2 0.5 --optimizer adamw --val-split 0.1 --standardize --seed -3"
    )
    made, _ = commands.parse_train(flags.split())
    assert made.hidden == (32, 16) and made.dropout == (0.2, 0.5) and made.seed == -3
    assert made.optimizer == "adamw" and made.val_split == 0.1 and made.standardize
    assert TrainConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made


# resume


def test_resume_takes_what_is_not_given_from_the_run(capsys, tmp_path):
    flags = ("--dataset", "digits", "--hidden", "32", "--dropout", "0.3", "--device", "cpu")
    assert run("train", *flags, "--epochs", "4", "--out", "whole") == 0
    assert run("train", *flags, "--epochs", "2", "--out", "part") == 0
    assert run("train", "--resume", "part", "--epochs", "4") == 0
    assert "going on from epoch 3" in capsys.readouterr().out
    whole, part = (load_checkpoint(tmp_path / name)["model"] for name in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert run("train", "--resume", "part", "--hidden", "64", "--epochs", "6") == 2
    assert "--hidden must stay [32] as in the run, got [64]" in capsys.readouterr().err


def _start(*arguments, cwd) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fusedmlp", "train", "--device", "cpu", *arguments],
        cwd=cwd,
        env=made_data.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl_c", "kill"])
def test_a_run_that_is_stopped_goes_on_to_the_same_model(tmp_path, how):
    flags = ("--dataset", "synthetic", "--hidden", "64", "--dropout", "0.3", "--epochs", "30")
    child = _start(*flags, "--out", "part", cwd=tmp_path)
    until = time.monotonic() + 60
    while not (tmp_path / "part" / "checkpoint.pt").exists() and time.monotonic() < until:
        time.sleep(0.02)
    child.send_signal(how)
    said, _ = child.communicate(timeout=60)
    if child.returncode == 0:
        pytest.skip("the run was done before the signal came")
    assert child.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), said
    if how == signal.SIGINT:
        assert "go on with: fusedmlp train --resume part" in said and "Traceback" not in said
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the child: the bits depend on it
    try:
        for arguments in (("--resume", "part"), (*flags, "--out", "whole")):
            assert run("train", "--device", "cpu", *arguments) == 0
        # A kill may leave half a file, under another name and until the run goes on.
        assert [f.name for f in (tmp_path / "part").iterdir() if f.name.startswith(".")] == []
    finally:
        torch.set_num_threads(threads)
    whole, part = (load_checkpoint(tmp_path / name)["model"] for name in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)


# pictures


def _save(image: torch.Tensor, path, mode="L") -> str:
    from PIL import Image

    Image.fromarray(image.byte().numpy()).convert(mode).save(path)
    return str(path)


@pytest.fixture
def trained_on_pictures(tmp_path):
    """A run on 8x8 pictures, each with one bright quarter."""
    from fusedmlp.train import build, fit

    made = made_data.pictures(rows=400)
    settings = TrainConfig(epochs=15, batch_size=32, hidden=(32,))
    settings = settings.replace(init="default", lr=0.5, device="cpu")
    fit(build.build_network(settings, made), made, settings, RunOptions(out=tmp_path / "run"))
    return made


def test_pictures_of_any_size_mode_and_polarity(trained_on_pictures, tmp_path, capsys):
    made = trained_on_pictures
    images = [made.x_test[i].view(8, 8) for i in range(4)]
    wanted = [made.classes[made.y_test[i]] for i in range(4)]
    large = [image.repeat_interleave(5, 0).repeat_interleave(5, 1) for image in images]
    files = [_save(images[0], tmp_path / "same.png"), _save(large[1], tmp_path / "large.png")]
    files += [_save(large[2], tmp_path / "rgb.png", "RGB"), _save(large[3], "a.png", "RGBA")]
    assert run("predict", "run", "--images", *files) == 0
    found = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(found.out)))
    assert [row["predicted"] for row in rows] == wanted and found.err == ""

    bright = [_save(255 - large[i], tmp_path / f"inverted{i}.png") for i in range(4)]
    assert run("predict", "run", "--images", *bright) == 0
    assert "light background" in (said := capsys.readouterr().err) and "--invert" in said
    assert run("predict", "run", "--images", *bright, "--invert") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["predicted"] for row in rows] == wanted


def test_what_is_no_picture_is_named(trained_on_pictures, tmp_path, capsys):
    (tmp_path / "text.png").write_text("hello")
    assert run("predict", "run", "--images", "text.png") == 1
    assert "text.png is truncated, corrupted or no image" in capsys.readouterr().err
    assert run("predict", "run", "--images", "none.png") == 1
    assert "none.png does not exist" in capsys.readouterr().err


# files


def test_csv_regression_from_flags_to_numbers(tmp_path, capsys):
    lines = [f"{i / 50},{(i * 7) % 13},{1000 + 20 * i}.0\n" for i in range(100)]
    (tmp_path / "a.csv").write_text("a,b,price\n" + "".join(lines))
    flags = ("--dataset", "a.csv", "--standardize", "--epochs", "80", "--batch-size", "8")
    assert run("train", *flags, "--init", "default", "--out", "run", "--device", "cpu") == 0
    capsys.readouterr()
    assert run("predict", "run") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 20
    for row in rows:
        assert abs(float(row["predicted"]) - float(row["true"])) < 200
    assert run("evaluate", "run") == 0
    (tmp_path / "a.csv").write_text("a,b,price\n" + "".join(lines[::-1]))
    assert run("evaluate", "run") == 1
    assert "has other training rows now" in capsys.readouterr().err


# mistakes


def _damage_config(folder):
    (folder / "config.json").write_text('{"hidden": ')


MISTAKES = {
    "no_command": (("frobnicate",), 2, "unknown command 'frobnicate'; known: train"),
    "unknown_flag": (("train", "--frobnicate", "3"), 2, "frobnicate"),
    "no_number": (("train", "--epochs", "many"), 2, "many"),
    "unknown_dataset": (("train", "--dataset", "cifar"), 2, "unknown dataset 'cifar'; known: auto"),
    "mse_of_classes": (
        ("train", "--dataset", "digits", "--loss", "mse"),
        2,
        "needs a float target",
    ),
    "contradiction": (
        ("train", "--optimizer", "adamw", "--momentum", "0.9"),
        2,
        "--momentum belongs to --optimizer sgd",
    ),
    "tf32": (("train", "--precision", "tf32", "--device", "cpu"), 2, "needs --device cuda"),
    "no_file": (("train", "--dataset", "none.csv"), 1, "none.csv does not exist"),
    "no_set": (("train", "--dataset", "mnist"), 1, "MNIST is not in .*could not be fetched"),
    "no_run": (("train", "--resume", "none"), 1, "none must be an existing run folder"),
    "no_run_to_test": (("evaluate", "none"), 1, "none must be a run folder"),
    "no_run_to_use": (("predict", "none"), 1, "none must be a run folder"),
    "out_below_a_file": (
        ("train", "--dataset", "digits", "--out", "file/run"),
        1,
        "cannot write to .*file.*--out",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_message_and_its_exit_code(case, capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    arguments, code, message = MISTAKES[case]
    assert run(*arguments) == code
    said = capsys.readouterr()
    assert re.search(message, said.err + said.out, re.S), said
    assert "Traceback" not in said.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_debug_shows_where(capsys):
    assert run("train", "--dataset", "none.csv", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_unforeseen_failure_is_one_line_too(capsys, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(commands, "train", fail)
    assert run("train") == 1
    assert capsys.readouterr().err == (
        "fusedmlp: ZeroDivisionError: division by zero (--debug shows where)\n"
    )


@pytest.mark.parametrize("command", [("compare",), ("train", "--resume")])
def test_a_name_that_is_too_long_for_the_system(command, tmp_path, capsys):
    folder = tmp_path / ("a" * 300)
    assert run(*command, str(folder)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"fusedmlp: cannot use {folder}/") and "File name too long" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_out_is_named(capsys, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o555)
    assert run("train", "--dataset", "digits", "--out", "shut/run") == 1
    assert "cannot write to" in capsys.readouterr().err


def test_a_disk_that_fills_up_leaves_no_half_run(tmp_path):
    """A limit on file sizes stands for the full disk: the checkpoint is the first that meets it."""
    code = "import sys; from fusedmlp.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--dataset", "digits", *QUICK],
        cwd=tmp_path,
        env=made_data.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 1, done.stderr
    assert "cannot write runs/0001/checkpoint.pt: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "runs").iterdir()) == []


def test_output_that_cannot_be_written_is_one_message():
    """Python buffers what is printed: that the disk is full is seen when it is written at last."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fusedmlp", "--version"],
            env=made_data.environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    said = "fusedmlp: cannot write to standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_missing_package_of_the_extra_is_named_before_any_work(capsys, monkeypatch):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda n: None if n == "tyro" else find(n))
    assert run("train") == 1
    assert capsys.readouterr().err == (
        "fusedmlp: train needs tyro, which is not installed: pip install 'fusedmlp[train]'\n"
    )
    assert run("info") == 0


def test_the_command_alone_and_its_version(capsys):
    assert run() == 2 and run("--help") == 0 and run("--version") == 0
    said = capsys.readouterr().out
    assert "usage: fusedmlp" in said and re.search(r"fusedmlp \d+\.\d+", said)


def test_info_and_the_command_line_load_no_package_of_the_extra():
    code = (
        "import sys; from fusedmlp.cli import main; main(['info']); "
        "print([n for n in ('tyro', 'rich', 'matplotlib', 'safetensors', 'sklearn') "
        "if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=made_data.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
