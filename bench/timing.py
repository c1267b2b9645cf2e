"""Timers for CPU and CUDA, and the protocol that every figure of this project follows.

1. Correct first. A function whose result is wrong gets no number, only the reason (check.py).
2. Inputs and incoming gradients exist before the clock starts, are random normal and never zeros:
   a GPU draws less power, and clocks higher, on zeros.
3. No gradient accumulates: torch.autograd.grad in ops; in a step, zero_grad belongs to the step.
4. All functions that are compared run in one process, in rounds: each round times every function
   once, in random order. A slow phase of the machine falls on neighbours.
5. Figures are the median, p20 and p80 over rounds. A ratio is taken within each round, and its
   median, p20 and p80 over rounds are given: on a shared machine read the ratios, not the times.
6. Rounds go on until a time budget is spent, at least `min_rounds`. One sample calls a function as
   often as fills `sample_ms`: long beside reading the clock, short beside a time slice. On a CPU a
   round during which the kernel took a processor away from this process (getrusage counts that) is
   left out whole, for all functions, if `min_rounds` remain (on a busy machine it goes on for up to
   4 times the budget to get them); both numbers are in the row. Beside `busy` programs, where that
   is what is measured, every round counts.
7. Warm: the same tensors each call, in whichever cache they fit. Cold: a buffer larger than the
   last cache is written before each call, outside the clock. Which one it was is in the row.
8. CUDA: device events around the calls, with the queue kept full: the device is first put to sleep
   until the host has enqueued everything (checked, and repeated with a longer sleep), so that host
   gaps are not measured. Host time per call is a figure of its own. A training step is also timed
   by the wall clock, as that is what its user waits for.
9. Threads are set by torch.set_num_threads and stated; the garbage collector is off meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None


_PATIENCE = 4


def spread(values: Sequence[float]) -> list[float]:
    """[median, p20, p80], linear between neighbours."""
    shares = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(shares).tolist()


@dataclass
class Timing:
    """Milliseconds per call, one entry a round; host_ms is the time until the call returned.

    left_out  rounds that were disturbed and are not in the lists
    """

    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    left_out: int = 0


def over(times: Sequence[float], base: Sequence[float]) -> list[float]:
    """[median, p20, p80] of times over those of `base`, taken round by round; where there were
    fewer rounds of one, over the first."""
    return spread([a / b for a, b in zip(times, base, strict=False)])


def ratio(above: Timing, below: Timing) -> list[float]:
    """[median, p20, p80] of the time of `above` over that of `below`, taken round by round."""
    return over(above.ms, below.ms)


class CpuTimer:
    """Wall time of `calls` calls.

    cold  evict the caches before each call
    sync  what makes asynchronous work finish; for the wall clock on a GPU
    rest  seconds before each sample: threads of another function's pool go on spinning for
          milliseconds after its work (OpenMP's do), and would be timed with this one's
    """

    max_calls = 2000
    sample_ms = 0.25

    def __init__(
        self, cold: bool = False, sync: Callable[[], None] | None = None, rest: float = 0.0
    ):
        self._sync, self._rest = sync, rest
        self._evict = torch.ones(32 << 20) if cold else None  # 128 MiB

    def sample(self, function: Callable[[], object], calls: int) -> tuple[float, float]:
        """(ms, host ms) per call."""
        if self._evict is not None:
            self._evict.add_(1)
            calls = 1
        if self._rest:  # even 0 s would cost what the processor has in its caches
            time.sleep(self._rest)
        if self._sync:
            self._sync()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        host = time.perf_counter() - start
        if self._sync:
            self._sync()
        taken = time.perf_counter() - start
        return taken / calls * 1e3, host / calls * 1e3

    @staticmethod
    def disturbances() -> int:
        """How often the kernel has taken a processor away from a thread of this process."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


class CudaTimer:
    """Device time of `calls` calls by events, the queue kept full."""

    sample_ms = 1.0
    max_calls = 20  # about a thousand launches fit in the queue; then the host would wait

    def __init__(self, cold: bool = False):
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda") if cold else None
        self._sleep = 1_000_000  # clock cycles

    def sample(self, function: Callable[[], object], calls: int) -> tuple[float, float]:
        """(ms, host ms) per call."""
        event = functools.partial(torch.cuda.Event, enable_timing=True)
        for _ in range(6):
            # One pair of events around all calls; where the cache is cold, a pair a call.
            pairs = [(event(), event()) for _ in range(1 if self._flush is None else calls)]
            torch.cuda.synchronize()
            torch.cuda._sleep(self._sleep)
            host = time.perf_counter()
            for start, end in pairs:
                if self._flush is not None:
                    self._flush.zero_()
                start.record()
                for _ in range(calls // len(pairs)):
                    function()
                end.record()
            host = time.perf_counter() - host
            host_was_ahead = not pairs[0][0].query()
            torch.cuda.synchronize()
            if host_was_ahead:
                break
            # Half a second at most: a function that itself waits for the device is never ahead.
            self._sleep = min(self._sleep * 2, 1_000_000_000)
        taken = sum(start.elapsed_time(end) for start, end in pairs)
        return taken / calls, host / calls * 1e3

    @staticmethod
    def disturbances() -> int:
        """The device does not mind what the host is doing."""
        return 0


def timer(device: str, cold: bool = False, wall: bool = False) -> CpuTimer | CudaTimer:
    """The timer for a device; `wall` times CUDA work as its user waits for it."""
    if device == "cpu":
        return CpuTimer(cold)
    return CpuTimer(cold, torch.cuda.synchronize) if wall else CudaTimer(cold)


# Says that it runs, and spins until its parent is gone.
_SPIN = """import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


@contextlib.contextmanager
def busy(programs: int) -> Iterator[None]:
    """Inside, so many processes of one thread each are never idle."""
    command = [sys.executable, "-I", "-S", "-c", _SPIN]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(programs)]
    try:
        for program in running:
            program.stdout.readline()
        yield
    finally:
        for program in running:
            program.kill()
            program.communicate()


@contextlib.contextmanager
def products(dtype: str) -> Iterator[None]:
    """Inside, fp32 products on a GPU are made in tf32 or, for any other dtype, in full."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A replay of `run` as one CUDA graph, which returns what the captured call did."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay():
        graph.replay()
        return kept

    return replay


@contextlib.contextmanager
def _no_garbage_collection():
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def measure(
    functions: dict[str, Callable[[], object]],
    timer: CpuTimer | CudaTimer,
    *,
    budget_s: float = 1.0,
    min_rounds: int = 10,
    max_rounds: int = 2000,
    every_round: bool = False,
    seed: int = 0,
) -> dict[str, Timing]:
    """Times functions in interleaved rounds; entry i of every Timing is of the same round.

    functions    name -> what to time, warmed up here
    budget_s     seconds to spend on all of them, warm-up apart
    every_round  keep disturbed ones too
    """
    order, shuffle = list(functions), random.Random(seed).shuffle
    timings = {name: Timing() for name in functions}
    clean: list[bool] = []
    with _no_garbage_collection():
        calls = {name: _calls(function, timer) for name, function in functions.items()}
        start = time.perf_counter()
        for done in range(max_rounds):
            spent = time.perf_counter() - start
            enough = sum(clean) >= min_rounds or spent >= _PATIENCE * budget_s
            if done >= min_rounds and spent >= budget_s and enough:
                break
            shuffle(order)
            disturbances = timer.disturbances()
            for name in order:
                ms, host_ms = timer.sample(functions[name], calls[name])
                timings[name].ms.append(ms)
                timings[name].host_ms.append(host_ms)
            clean.append(every_round or timer.disturbances() == disturbances)
    if sum(clean) < min_rounds:
        return timings
    return {name: _only(t, clean) for name, t in timings.items()}


def _only(t: Timing, clean: list[bool]) -> Timing:
    ms = list(itertools.compress(t.ms, clean))
    host_ms = list(itertools.compress(t.host_ms, clean))
    return Timing(ms, host_ms, clean.count(False))


def _calls(function: Callable[[], object], timer: CpuTimer | CudaTimer) -> int:
    """How many calls fill a sample; runs the function until it is warm."""
    for _ in range(3):
        function()
    fastest = min(timer.sample(function, 1)[0] for _ in range(3))
    return max(1, min(timer.max_calls, round(timer.sample_ms / max(fastest, 1e-6))))


def rounds(
    ways: dict[str, Callable[[int], float]],
    count: int,
    device: str = "cpu",
    *,
    only_first: dict[str, int] | None = None,
    until: float = math.inf,
) -> dict[str, tuple[list[float], list[float]]]:
    """For what takes seconds: runs every way once a round, in random order, with the number of the
    round as its seed, and prints each; {name: (seconds, what it returned)}.

    only_first  ways that run in so many rounds only
    until       no further round begins after this time of time.perf_counter()
    """
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for seed in range(count):
        if seed and time.perf_counter() > until:
            break
        now = [name for name in ways if seed < (only_first or {}).get(name, count)]
        random.Random(seed).shuffle(now)
        for name in now:
            wait()
            start = time.perf_counter()
            value = ways[name](seed)
            wait()
            found[name][0].append(time.perf_counter() - start)
            found[name][1].append(value)
            print(f"{name:<34} {found[name][0][-1]:8.2f} s  {value:.4f}", flush=True)
    return found
