"""What a run borrows from the process and gives back: device, precision and backend settings,
generators, signals."""

import contextlib
import signal
import threading
import time
from dataclasses import dataclass

import torch

from ..backends import registry
from .config import TrainConfig
from .errors import TrainError, UsageError


@dataclass
class StopRequest:
    """Set by Ctrl-C or SIGTERM; the loop looks at it between steps."""

    asked: bool = False
    at: float = 0.0


def pick_device(config: TrainConfig) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        if config.precision == "tf32":
            raise UsageError(
                "--precision tf32 needs a GPU, and this run is on the CPU; take fp32 or bf16"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = (
            "torch sees no GPU"
            if torch.backends.cuda.is_built()
            else "this torch is built without CUDA"
        )
        raise TrainError(f"--device cuda was asked for, but {built}; take --device cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def surroundings(config: TrainConfig, device: torch.device):
    """Yields the StopRequest; everything is put back at the end."""
    with borrowed(config, device), _stop_on_signals() as stop:
        yield stop


@contextlib.contextmanager
def borrowed(config: TrainConfig, device: torch.device):
    """Backend and precision as the config has them, and generators that may be seeded; all are
    put back at the end."""
    with contextlib.ExitStack() as stack:
        cuda = [device.index] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        if config.backend != "auto":
            stack.enter_context(registry.use_backend(config.backend))
        if device.type == "cuda":
            stack.enter_context(_fp32_matmul("tf32" if config.precision == "tf32" else "ieee"))
        yield


def seed_generators(seed: int, device: torch.device) -> None:
    """Torch's generators that `borrowed` puts back, and no others: torch.manual_seed also queues
    calls for every kind of device there could be, which takes longer than a short epoch."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def _fp32_matmul(mode: str):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = mode
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextlib.contextmanager
def _stop_on_signals():
    """The first Ctrl-C or SIGTERM asks the loop to stop; a second Ctrl-C, a second later,
    interrupts it at once."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return

    def ask(number, frame):
        # torchrun sends a signal of its own right after the terminal's.
        if stop.asked and number == signal.SIGINT and time.monotonic() - stop.at > 1.0:
            raise KeyboardInterrupt
        if not stop.asked:
            stop.asked, stop.at = True, time.monotonic()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
