"""Triton kernels: NVIDIA and AMD GPUs, and a CPU through Triton's interpreter (for tests).

The same functions with the same names as every backend. Importing this imports Triton and compiles
nothing: Triton compiles a kernel inside the first call of each kind, which then takes up to
seconds (docs/kernels.md says what a kind is).
"""

from .bias_act_dropout import bias_act_dropout_bwd, bias_act_dropout_fwd
from .cross_entropy import cross_entropy
from .dgrad_act import dgrad_act
from .linear_act import linear_act_fwd, linear_act_infer
from .mlp import mlp_bwd, mlp_fwd

__all__ = [
    "bias_act_dropout_bwd",
    "bias_act_dropout_fwd",
    "cross_entropy",
    "dgrad_act",
    "linear_act_fwd",
    "linear_act_infer",
    "mlp_bwd",
    "mlp_fwd",
]
