"""The fusedmlp command: finds the command, runs it, and turns every failure into one message and
an exit code.

Imports nothing that a command does not need: `info`, `verify` and `tune` need no extra.
"""

import contextlib
import importlib.util
import os
import signal
import sys
import threading
import traceback

from . import environment

USAGE = """usage: fusedmlp COMMAND [...]

  train      train an MLP: fusedmlp train --dataset fashion_mnist --hidden 256
  crossval   compare settings by cross-validation: fusedmlp crossval --hidden 64 / 128 64
  compare    run folders beside each other: settings that differ, scores, seconds
  evaluate   test the network of a run folder again, or on a table of yours
  predict    predict the rows of a table, name what is on pictures or on the test rows
  info       versions, devices, and what each backend can run here
  verify     check every backend of this machine against fp64
  tune       measure which way of running a network is the fastest here, and keep it

fusedmlp COMMAND --help lists the command's flags; fusedmlp --version shows the version."""

NEEDS = {  # packages of the train extra
    "train": ("tyro", "safetensors"),
    "crossval": ("tyro", "rich", "safetensors", "sklearn"),
    "compare": ("tyro", "rich"),
    "evaluate": ("tyro", "safetensors"),
    "predict": ("tyro", "safetensors"),
}
COMMANDS = (*NEEDS, "info", "verify", "tune")

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _open_streams()
    code = None
    try:
        with _sigterm_as_ctrl_c():
            code = _guarded(list(sys.argv[1:] if argv is None else argv))
    finally:  # of SystemExit as well: what a parser said is still to be written
        code = _flushed(code)
    return code


@contextlib.contextmanager
def _sigterm_as_ctrl_c():
    """Else it ends the process without a word; training, which saves itself, has handlers of its
    own."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def end(number, frame):
        raise KeyboardInterrupt(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open_streams() -> None:
    """Characters that a terminal lacks become escapes, and what is closed takes everything."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flushed(code: int | None) -> int | None:
    """The exit code, once all output is out: of what cannot go out Python would complain when it
    ends."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard_output()
        if code == 0 and not isinstance(error, BrokenPipeError):
            return _say(f"cannot write to standard output: {error.strerror}", FAILED)
    return code


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _guarded(argv: list[str]) -> int:
    try:
        return _run(argv)
    except KeyboardInterrupt as error:
        return _say("interrupted", error.args[0] if error.args else INTERRUPTED)
    except BrokenPipeError:
        _discard_output()  # its reader has gone (head)
        return FAILED
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        return _failed(error)


def _run(argv: list[str]) -> int:
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
    wrong = [] if command == "info" else environment.problems()
    if wrong:
        return _say(wrong[0], MISUSED)
    if command in ("info", "verify"):
        from .commands import info

        return getattr(info, f"{command}_command")(rest)
    if command == "tune":
        from .commands import tune

        return tune.command(rest)
    from .train import commands

    return getattr(commands, command)(rest)


def _failed(error: Exception) -> int:
    from .backends.registry import BackendError
    from .train.errors import LostProcessError, TrainError, UsageError

    if isinstance(error, UsageError):
        return _say(str(error), MISUSED)
    if isinstance(error, LostProcessError):
        return _say(str(error), FAILED, everyone=True)
    if isinstance(error, TrainError | BackendError):
        return _say(str(error), FAILED)
    if isinstance(error, OSError) and error.filename is not None:
        return _say(f"cannot use {error.filename}: {error.strerror} (--debug shows where)", FAILED)
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return _say(f"{what} (--debug shows where)", FAILED)


def _say(text: str, code: int, everyone: bool = False) -> int:
    # Of several processes started by torchrun, one does the talking, unless that may be gone.
    if everyone or os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(f"fusedmlp: {text}", file=sys.stderr, flush=True)
    return code
