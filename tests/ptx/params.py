"""The arguments of the launchers of csrc/cuda (csrc/common/params.h) for ctypes; needs no torch."""

from ctypes import CDLL, POINTER, Structure, c_float, c_int, c_int64, c_uint64, c_void_p

DTYPE_IDS = {"fp32": 0, "fp16": 1, "bf16": 2}
TILES = {"by size": 0, "small": 1, "medium": 2, "large": 3}


class Dropout(Structure):
    _fields_ = [
        ("state", c_void_p),
        ("threshold", c_uint64),
        ("scale", c_float),
        ("stream_offset", c_int64),
        ("row_offset", c_int64),
    ]


class Epilogue(Structure):
    _fields_ = [
        ("bias", c_void_p),
        ("slope", c_void_p),
        ("bias_dtype", c_int),
        ("slope_dtype", c_int),
        ("slope_size", c_int64),
        ("act", c_int),
        ("alpha", c_float),
        ("drop", Dropout),
        ("dtype", c_int),
        ("rows", c_int64),
        ("cols", c_int64),
    ]


class Fwd(Structure):
    _fields_ = [("y", c_void_p), ("x", c_void_p), ("e", Epilogue)]


class Bwd(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("dz", "db", "dslope", "dy", "saved")),
        ("saves", c_int),
        ("e", Epilogue),
    ]


class Linear(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("y", "h", "x", "w")),
        *((name, c_int64) for name in ("x_stride", "w_stride", "k")),
        ("e", Epilogue),
    ]


class CrossEntropy(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("losses", "dx", "x", "target")),
        ("ignore_index", c_int64),
        ("smoothing", c_float),
        ("factor", c_float),
        ("dtype", c_int),
        ("rows", c_int64),
        ("cols", c_int64),
    ]


def declare(calls: CDLL) -> None:
    """The types of what exports.cpp exports."""
    for name, params in (
        ("bias_act_dropout_fwd", Fwd),
        ("bias_act_dropout_bwd", Bwd),
        ("bias_act_dropout_bwd_scratch", Bwd),
        ("linear_act", Linear),
        ("linear_act_takes", Linear),
        ("cross_entropy", CrossEntropy),
    ):
        getattr(calls, f"ptx_{name}").argtypes = [POINTER(params)]
    calls.ptx_bias_act_dropout_bwd.argtypes = [POINTER(Bwd), c_void_p]
    calls.ptx_bias_act_dropout_bwd_scratch.restype = c_int64
    calls.ptx_linear_act.argtypes = [POINTER(Linear), c_int]
