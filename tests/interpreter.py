"""Makes Triton's interpreter compute as a GPU does, in two things that decide within the budget."""

import inspect

import numpy as np
import pytest
import torch


def _to_or_from_bf16(data: np.ndarray, from_bf16: bool) -> np.ndarray:
    if from_bf16:
        wide = torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16).float()
        return wide.numpy().view(np.uint32)
    narrow = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
    return narrow.view(torch.int16).numpy().view(np.uint16)


def unusable() -> str | None:
    """Why Triton's interpreter cannot run here, or None."""
    from triton.runtime import interpreter

    source = inspect.getsource(interpreter._patch_lang_tensor)
    if "int(self.handle.data))" in source and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of this Triton needs NumPy below 2.4, this is {np.__version__}"
    return None


def repair(monkeypatch) -> None:
    """Rounds to bf16 instead of cutting off, keeps its denormals, and adds up a tile in a tree.

    The interpreter cuts off the bits that bf16 does not have, makes zeros of its denormals, and
    adds the rows of a tile one by one, which doubles the rounding error of a column sum.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(data, source, target, rounding_mode):
        if {source, target} == {tl.float32, tl.bfloat16}:
            return _to_or_from_bf16(data, source == tl.bfloat16)
        return convert(data, source, target, rounding_mode)

    def summed(self, value):
        data = value.handle.data
        # NumPy adds in a tree along the last dimension only.
        last = np.ascontiguousarray(np.moveaxis(data, self.axis, -1))
        total = np.sum(last, axis=-1)
        if self.keep_dims:
            total = np.expand_dims(total, self.axis)
        return self.to_tensor(total, value.dtype)

    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(interpreter.ReduceOps, "sum", summed)


def use_triton(monkeypatch) -> None:
    """For a test whose Triton kernels run in the interpreter, or not at all where it cannot run."""
    if reason := unusable():
        pytest.skip(reason)
    from fusedmlp.kernels.triton import configs

    # The interpreter runs one program after the other: fewer and larger ones.
    monkeypatch.setattr(configs, "_SMALL_TILE", 4096)
    repair(monkeypatch)
