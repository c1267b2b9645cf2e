"""Plain PyTorch: the fallback, the tested oracle, and the only backend with fp64.

The same functions with the same names as every backend. Implements philox.py and activations.py.
"""

from .cross_entropy import cross_entropy
from .epilogue import bias_act_dropout_bwd, bias_act_dropout_fwd, linear_act_fwd, linear_act_infer
from .mlp import mlp_bwd, mlp_fwd

__all__ = [
    "bias_act_dropout_bwd",
    "bias_act_dropout_fwd",
    "cross_entropy",
    "linear_act_fwd",
    "linear_act_infer",
    "mlp_bwd",
    "mlp_fwd",
]
