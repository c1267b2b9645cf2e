"""The fusedmlp command: finds the command, runs it, and turns every failure into one message and
an exit code.

Imports nothing that a command does not need: `info`, `verify` and `tune` need no extra.
"""

import importlib.util
import os
import sys
import traceback

from . import environment

USAGE = """usage: fusedmlp COMMAND [...]

  train      train an MLP: fusedmlp train --dataset fashion_mnist --hidden 256
  crossval   compare settings by cross-validation: fusedmlp crossval --hidden 64 / 128 64
  evaluate   test the network of a run folder again
  predict    name what is on pictures, or on the test rows, with the network of a run folder
  info       versions, devices, and what each backend can run here
  verify     check every backend of this machine against fp64
  tune       time the tiles of the Triton kernels on this machine's GPU, and keep the fastest

fusedmlp COMMAND --help lists the command's flags; fusedmlp --version shows the version."""

NEEDS = {  # packages of the train extra
    "train": ("tyro", "safetensors", "matplotlib"),
    "crossval": ("tyro", "rich", "safetensors", "matplotlib", "sklearn"),
    "evaluate": ("tyro", "safetensors"),
    "predict": ("tyro", "safetensors"),
}
COMMANDS = (*NEEDS, "info", "verify", "tune")

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else MISUSED
    if argv[0] == "--version":
        from ._version import __version__

        print(f"fusedmlp {__version__}")
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        return _say(f"unknown command {command!r}; known: {', '.join(COMMANDS)}", MISUSED)
    missing = [name for name in NEEDS.get(command, ()) if importlib.util.find_spec(name) is None]
    if missing:
        return _say(
            f"{command} needs {missing[0]}, which is not installed: pip install 'fusedmlp[train]'",
            FAILED,
        )
    return _guarded(command, rest)


def _guarded(command: str, argv: list[str]) -> int:
    try:
        wrong = [] if command == "info" else environment.problems()
        return _say(wrong[0], MISUSED) if wrong else _run(command, argv)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of the output has gone (head); Python would complain once more when it closes
        # stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        return _failed(error)


def _run(command: str, argv: list[str]) -> int:
    if command in ("info", "verify"):
        from . import info

        return getattr(info, f"{command}_command")(argv)
    if command == "tune":
        from . import tuning

        return tuning.command(argv)
    from .train import commands

    return getattr(commands, command)(argv)


def _failed(error: Exception) -> int:
    from .dispatch import BackendError
    from .train.errors import TrainError, UsageError

    if isinstance(error, UsageError):
        return _say(str(error), MISUSED)
    if isinstance(error, TrainError | BackendError):
        return _say(str(error), FAILED)
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return _say(f"{what} (--debug shows where)", FAILED)


def _say(text: str, code: int) -> int:
    # Of several processes started by torchrun, one does the talking.
    if os.environ.get("RANK", "0") == "0":
        print(f"fusedmlp: {text}", file=sys.stderr, flush=True)
    return code
