"""Calls of the compiled CPU kernels as their tests make them."""

import ctypes

import pytest

from fusedmlp import ops
from fusedmlp.backends import native
from fusedmlp.spec import activations, philox

_REASON = native.unavailable("cpu")
needs_native = pytest.mark.skipif(_REASON is not None, reason=f"native on cpu: {_REASON}")
NATIVE = ops.BY_BACKEND["native"]


def library() -> ctypes.CDLL:
    """What the extension offers to ctypes."""
    opened = ctypes.CDLL(str(native.library("cpu")))
    opened.fusedmlp_cpu_isa.restype = ctypes.c_char_p
    return opened


def numbers(act="none", p=0.0, layer=0, row_offset=0, alpha=0.01):
    """act, alpha, threshold, scale, layer, row_offset."""
    threshold, scale = philox.threshold_and_scale(p)
    return activations.IDS[act], alpha, threshold, scale, layer, row_offset


def fwd(x, b=None, act="none", slope=None, state=None, **more):
    return NATIVE.bias_act_dropout_fwd(x, b, slope, state, *numbers(act, **more))


def bwd(dy, saved, b, act, slope=None, state=None, saves=None, **more):
    """dz, db where there is a bias, dslope where there is a slope."""
    n = numbers(act, **more)
    if saves is None:
        saves = activations.saves(n[0], n[1], dy.dtype, n[2] != 0)
    return NATIVE.bias_act_dropout_bwd(
        dy, saved, b, slope, state, *n, saves, b is not None, slope is not None
    )
