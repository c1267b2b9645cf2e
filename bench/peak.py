"""The most that this processor computes in registers, without memory: multiply-adds in fp32, and
products of pairs in bf16 by VDPBF16PS, which it adds up in fp32.

Loops in C, made by the compiler that is there (CC, else cc). Steps are a share of what they reach.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# As many accumulators as hide the latency of an instruction; those of fp32 fit into 16 registers.
_SOURCE = """
#if defined(__AVX512F__)
typedef float vec __attribute__((vector_size(64)));
#elif defined(__AVX__)
typedef float vec __attribute__((vector_size(32)));
#else
typedef float vec __attribute__((vector_size(16)));
#endif
enum { sums = 12 };

double multiply_adds(long rounds) {
  volatile float factor = 0.5f, term = 1.0f;
  vec zero = {}, f = zero + factor, t = zero + term, sum[sums];
  for (int j = 0; j < sums; ++j) sum[j] = zero + term;  // read anew: equal ones would be one
  for (long i = 0; i < rounds; ++i)
    for (int j = 0; j < sums; ++j) sum[j] = sum[j] * f + t;
  for (int j = 0; j < sums; ++j) term = sum[j][0];
  return 2.0 * sums * (sizeof(vec) / sizeof(float)) * rounds;
}

#if defined(__AVX512BF16__)
#include <immintrin.h>
enum { wide = 16 };

double bf16_products(long rounds) {
  volatile float factor = 0.5f, term = 1.0f;
  __m512bh f = _mm512_cvtne2ps_pbh(_mm512_set1_ps(factor), _mm512_set1_ps(factor));
  __m512 sum[wide];
  for (int j = 0; j < wide; ++j) sum[j] = _mm512_set1_ps(term);
  for (long i = 0; i < rounds; ++i)
    for (int j = 0; j < wide; ++j) sum[j] = _mm512_dpbf16_ps(sum[j], f, f);
  for (int j = 0; j < wide; ++j) term = sum[j][0];
  return 64.0 * wide * rounds;
}
#endif
"""
_LOOPS = {"fp32": "multiply_adds", "bf16": "bf16_products"}
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-x", "c")
_ROUNDS = 1_000_000  # of the loop in a sample: about 2 ms
_SAMPLES = 300  # on a shared machine some of them find all processors free


@functools.cache
def _loop(dtype: str) -> Callable[[int], float] | None:
    """Runs the loop so many times and returns its floating-point operations; None without a
    compiler, or an instruction for it."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        command = [*shlex.split(os.environ.get("CC", "cc")), *_FLAGS, "-", "-o", str(library)]
        try:
            subprocess.run(command, input=_SOURCE, text=True, capture_output=True, check=True)
            function = getattr(ctypes.CDLL(str(library)), _LOOPS[dtype])
        except (OSError, subprocess.CalledProcessError, AttributeError):
            return None
    function.argtypes, function.restype = [ctypes.c_long], ctypes.c_double
    return function


_best: dict[tuple[int, str], float] = {}


def gflops(threads: int, dtype: str = "fp32") -> float | None:
    """The best of many short samples, all threads together, of this call and of all before it. None
    without a compiler, or an instruction for it. dtype: fp32 or bf16

    To be asked again after each timing: a host may let two processors share one core for seconds.
    """
    if (loop := _loop(dtype)) is None:
        return None
    best = _best.get((threads, dtype), 0.0)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_SAMPLES if best == 0.0 else _SAMPLES // 5):
            start = time.perf_counter()
            done = sum(pool.map(loop, [_ROUNDS] * threads))
            best = max(best, done / (time.perf_counter() - start) / 1e9)
    _best[threads, dtype] = best
    return best
