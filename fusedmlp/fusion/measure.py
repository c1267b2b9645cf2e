"""Time and memory of a model before and after fusing, on the user's own input."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SECONDS = 0.4  # of timing, shared by both
_LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Measured:
    """One forward and backward in training mode, plain and fused; str() of it is meant to be read.

    milliseconds  medians
    bytes         kept for backward: all storages but those of the input and the parameters
    """

    milliseconds_plain: float
    milliseconds_fused: float
    bytes_plain: int
    bytes_fused: int

    def __str__(self) -> str:
        speed = self.milliseconds_plain / self.milliseconds_fused
        return (
            "measured, one forward and backward in training mode, plain to fused: "
            f"{self.milliseconds_plain:.3g} ms to {self.milliseconds_fused:.3g} ms "
            f"({speed:.2g} times as fast), {_size(self.bytes_plain)} to "
            f"{_size(self.bytes_fused)} kept for backward"
        )


def _size(count: int) -> str:
    for unit in ("B", "kB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} MB"


def measure(plain: nn.Module, fused: nn.Module, input) -> Measured:
    """Measured for a plain and a fused module and an input: a tensor, or a tuple of arguments.

    Works on copies: gradients, buffers, modes and torch's generators stay as they are.
    """
    arguments = input if isinstance(input, tuple) else (input,)
    plain, fused = copy.deepcopy(plain).train(), copy.deepcopy(fused).train()
    devices = {t.device for t in (*fused.parameters(), *arguments) if isinstance(t, Tensor)}
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(cuda), torch.enable_grad():
        kept = [_kept(m, arguments) for m in (plain, fused)]
        times = _times((plain, fused), arguments, cuda)
    return Measured(*times, *kept)


def _loss(module: nn.Module, arguments: tuple) -> Tensor:
    outputs = module(*arguments)
    leaves, _ = torch.utils._pytree.tree_flatten(outputs)
    tensors = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    if not tensors:
        raise ValueError(
            "report: the module must give a tensor that depends on a parameter or on an input "
            "that requires gradients, got none"
        )
    return sum(t.float().sum() for t in tensors)


def _kept(module: nn.Module, arguments: tuple) -> int:
    saved: dict[int, Tensor] = {}  # the tensors stay alive, so that no storage is used twice

    def pack(t: Tensor) -> Tensor:
        saved.setdefault(t.untyped_storage()._cdata, t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _loss(module, arguments)
    given = [*module.parameters(), *(a for a in arguments if isinstance(a, Tensor))]
    own = {t.untyped_storage()._cdata for t in given}
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)


def _times(modules: tuple, arguments: tuple, cuda: list) -> list[float]:
    """Median milliseconds of each, in turn so that both meet the same noise."""
    found: list[list[float]] = [[] for _ in modules]
    for module in modules:
        _loss(module, arguments).backward()
    end = time.perf_counter() + _SECONDS
    while len(found[0]) < _LEAST_ROUNDS or time.perf_counter() < end:
        for module, times in zip(modules, found, strict=True):
            module.zero_grad(set_to_none=True)
            _wait(cuda)
            started = time.perf_counter()
            _loss(module, arguments).backward()
            _wait(cuda)
            times.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(times) for times in found]


def _wait(cuda: list) -> None:
    for device in cuda:
        torch.cuda.synchronize(device)
