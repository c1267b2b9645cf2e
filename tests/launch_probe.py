"""Run by test_triton_launch.py in a process of its own: Triton with a driver that only records.

Prints, as JSON, what the driver was given for each call: first through Triton's own launcher, then
directly, as `launch` does from the second call of a kind on.
"""

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

recorded = []


def _address(t):
    """Of an argument; outputs lie elsewhere each time, of them dtype and shape are shown."""
    known = t.data_ptr() in ADDRESSES
    return hex(t.data_ptr()) if known else f"{t.dtype} {tuple(t.shape)}"


class Launcher:
    def __init__(self, source, metadata):
        self._name = metadata.name

    def __call__(self, *args, **kwargs):
        shown = [_address(a) if isinstance(a, torch.Tensor) else a for a in args]
        # Triton's metadata and hooks are objects.
        plain = (int, float, str, bool, type(None))
        recorded.append(
            [self._name, *(a if isinstance(a, plain) else type(a).__name__ for a in shown)]
        )


class Utils:
    loaded = 0

    def load_binary(self, *args):
        Utils.loaded += 1
        return Utils.loaded, Utils.loaded, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Driver:
    utils, launcher_cls, binary_ext = Utils(), Launcher, "cubin"

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Driver())

from fusedmlp.backends.triton import bias_act_dropout, launch, linear_act, tiles  # noqa: E402
from fusedmlp.spec import philox  # noqa: E402


def calls():
    """Arguments that differ in what Triton compiles apart: alignment, ones, multiples of 16."""
    state = torch.zeros(2, dtype=torch.int64)
    memory = torch.zeros(16 * 32 + 8)
    for x, p, layer in (
        (memory[: 16 * 32].view(16, 32), 0.25, 0),
        (memory[1 : 1 + 16 * 32].view(16, 32), 0.25, 1),  # starts at 4 bytes past a multiple of 16
        (memory[: 15 * 32].view(15, 32), 0.5, 16),
        (memory[:32].view(1, 32), 0.5, 2**40),
        (memory[:15].view(15, 1), 0.5, 3),
    ):
        threshold, scale = philox.threshold_and_scale(p)
        n = x.shape[1]
        yield x, torch.zeros(n), torch.zeros(16, n), (state, 1, 0.0, threshold, scale, layer, 7)


CALLS = list(calls())
ADDRESSES = {t.data_ptr() for x, b, w, (state, *_) in CALLS for t in (x, b, w, state)}


def run() -> list:
    recorded.clear()
    for x, b, w, (state, *numbers) in CALLS:
        y = bias_act_dropout.bias_act_dropout_fwd(x, b, None, state, *numbers)
        bias_act_dropout.bias_act_dropout_bwd(x, y, b, None, state, *numbers, 1, True, False)
        linear_act.linear_act_infer(x, w, None, None, state, *numbers)
        if x.shape == (1, 32):
            # One row: M is a number of Python's, also in the kernel that adds up the splits.
            tile = tiles.Tile(16, 16, 16, 4, 2, splits=2)
            linear_act.run(x, w, None, None, state, *numbers, keep_preact=False, tile=tile)
    return [list(r) for r in recorded]


runs = []
for _ in range(2):
    runs.append(run())
kinds, loaded = len(launch._compiled), Utils.loaded


def load_again() -> int:
    """Kernels that are compiled anew for other layers, rows and thresholds."""
    x, b, w, (state, act, alpha, threshold, scale, *_) = CALLS[0]
    epilogue = state, act, alpha
    for layer in (0, 1, 16, 2**31, 2**40):
        for row_offset in (0, 1, 16, 2**31, 2**40):
            for bits in (threshold, 1, 16, 2**31 + 16):
                numbers = bits, scale, layer, row_offset
                y = bias_act_dropout.bias_act_dropout_fwd(x, b, None, *epilogue, *numbers)
                bias_act_dropout.bias_act_dropout_bwd(
                    x, y, b, None, *epilogue, *numbers, 1, True, False
                )
                linear_act.linear_act_infer(x, w, None, None, *epilogue, *numbers)
    return Utils.loaded - loaded


found = {"own": runs[0], "direct": runs[1], "kinds": kinds, "loaded": loaded}
launch._compiled.clear()  # so that Triton's own launcher is asked again
json.dump(found | {"again": load_again()}, sys.stdout)
