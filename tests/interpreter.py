"""Makes Triton's interpreter compute as a GPU does, in the things that decide within the budget."""

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
    """Rounds to bf16 instead of cutting off, keeps its denormals, adds up a tile in a tree, and
    rounds a fused multiply-add once.

    The interpreter cuts off the bits that bf16 does not have, makes zeros of its denormals, adds
    the rows of a tile one by one, which doubles the rounding error of a column sum, and rounds the
    product of a multiply-add.
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

    def multiplied_and_added(self, x, y, z):
        # The product of two fp32 numbers is exact in fp64.
        data = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(data.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(interpreter.ReduceOps, "sum", summed)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", multiplied_and_added)


# Of ex2.approx.f32 and div.full.f32, as the PTX manual says: two units in the last place, of which
# one is up to 2^-23 of a result. That of sqrt.approx.f32 is half of it.
LIMIT = 2.0**-22


def approximate(monkeypatch, sign: int) -> None:
    """exp, sqrt and quotients are too large (sign 1) or too small (-1) by the limit of a GPU's."""
    from triton.runtime import interpreter

    def off(values: np.ndarray, like, limit: float = LIMIT):
        data = (values.astype(np.float64) * (1 + sign * limit)).astype(np.float32)
        return interpreter.TensorHandle(data, like.dtype.scalar)

    def exp2(self, t):
        return off(np.exp2(t.data), t)

    def exp(self, z):
        # A GPU rounds z log2(e) and has 2^t only.
        return off(np.exp2(z.data * np.float32(np.log2(np.e))), z)

    def sqrt(self, z):
        return off(np.sqrt(z.data), z, LIMIT / 2)

    def quotient(self, a, b):
        return off(a.data / b.data, a)

    for name, made in (("exp2", exp2), ("exp", exp), ("sqrt", sqrt), ("fdiv", quotient)):
        monkeypatch.setattr(interpreter.InterpreterBuilder, f"create_{name}", made)


def use_triton(monkeypatch) -> None:
    """For a test whose Triton kernels run in the interpreter, or not at all where it cannot run."""
    if reason := unusable():
        pytest.skip(reason)
    from fusedmlp.backends.triton import tiles

    # The interpreter runs one program after the other: fewer and larger ones.
    monkeypatch.setattr(tiles, "_SMALL_TILE", 4096)
    repair(monkeypatch)
