"""Weights as scikit-learn keeps them, NumPy arrays, and the network made of them.

A fitted estimator holds arrays only, so it is pickled, copied and moved like any other.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from .. import functional
from ..nn import FusedMLP

ROWS = 4096  # rows of one forward pass in prediction


@dataclass
class Weights:
    """coefs (fan_in, fan_out), intercepts (fan_out,), of each layer; slopes (1,) of each hidden
    layer of a PReLU network; all of one dtype, fp32 or fp64."""

    coefs: list[np.ndarray]
    intercepts: list[np.ndarray]
    slopes: list[np.ndarray] = field(default_factory=list)

    def copy(self) -> "Weights":
        # order "K": coefs are transposed views of (fan_out, fan_in), and stay ready for a GEMM.
        return Weights(
            *([a.copy(order="K") for a in part] for part in (self.coefs, self.intercepts)),
            [a.copy() for a in self.slopes],
        )

    def astype(self, dtype) -> "Weights":
        parts = self.coefs, self.intercepts, self.slopes
        return Weights(*([a.astype(dtype, copy=False) for a in part] for part in parts))

    def are_finite(self) -> bool:
        return all(np.isfinite(a).all() for a in (*self.coefs, *self.intercepts, *self.slopes))


def glorot(layer_sizes: list[int], activation: str, random_state) -> Weights:
    """First weights, drawn as scikit-learn's MLP draws them, in the same order: uniform within
    sqrt(6 / (fan_in + fan_out)), 2 instead of 6 for the logistic function (Glorot and Bengio,
    2010)."""
    factor = 2.0 if activation == "sigmoid" else 6.0
    coefs, intercepts = [], []
    for fan_in, fan_out in zip(layer_sizes, layer_sizes[1:], strict=False):
        bound = np.sqrt(factor / (fan_in + fan_out))
        drawn = random_state.uniform(-bound, bound, (fan_in, fan_out))
        coefs.append(np.ascontiguousarray(drawn.T).T)
        intercepts.append(random_state.uniform(-bound, bound, fan_out))
    slopes = [np.full(1, 0.25) for _ in layer_sizes[1:-1]] if activation == "prelu" else []
    return Weights(coefs, intercepts, slopes)


def tensor(array: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The array on the device; not a copy where it need not be one."""
    # Arrays that came out of a memory map (joblib hands large ones on so) are read-only.
    array = array if array.flags.writeable else array.copy()
    return torch.from_numpy(array).to(device, dtype)


def network(
    weights: Weights,
    activation: str,
    dropout: list[float],
    device: torch.device,
    dtype: torch.dtype,
) -> FusedMLP:
    """A network on the device with copies of the weights in dtype."""
    sizes = [len(weights.coefs[0]), *(len(b) for b in weights.intercepts)]
    net = FusedMLP(
        sizes[0], sizes[1:-1], sizes[-1], activation=activation, dropout=dropout, device="meta"
    )
    linears = [m for m in net if isinstance(m, nn.Linear)]
    for layer, coef, intercept in zip(linears, weights.coefs, weights.intercepts, strict=True):
        w, b = tensor(coef.T, device, dtype), tensor(intercept, device, dtype)
        layer.weight = nn.Parameter(w.clone(memory_format=torch.contiguous_format))
        layer.bias = nn.Parameter(b.clone())
    slopes = [m for m in net if isinstance(m, nn.PReLU)]
    for layer, slope in zip(slopes, weights.slopes, strict=True):
        layer.weight = nn.Parameter(tensor(slope, device, dtype).clone())
    return net


def trained(net: FusedMLP) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights of the Linears, all other trained parameters)."""
    linears = [m for m in net if isinstance(m, nn.Linear)]
    w, b = [m.weight for m in linears], [m.bias for m in linears]
    return w, b + [m.weight for m in net if isinstance(m, nn.PReLU)]


def read(net: FusedMLP) -> Weights:
    """Copies of a network's weights as arrays."""
    w, rest = trained(net)
    w, rest = ([p.detach().cpu().numpy().copy() for p in part] for part in (w, rest))
    return Weights([a.T for a in w], rest[: len(w)], rest[len(w) :])


def rows_of(x, rows, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rows, a slice or indices, of an array or a csr matrix as a contiguous tensor."""
    part = x[rows]
    part = part.toarray() if hasattr(part, "toarray") else part
    return tensor(np.ascontiguousarray(part), device, dtype)


def outputs(
    weights: Weights, activation: str, x, device: torch.device, backend: str | None
) -> np.ndarray:
    """(n, outputs) in the weights' dtype before the output activation, of rows x (n, fan_in)."""
    dtype = torch.from_numpy(weights.coefs[0]).dtype
    layers = [
        (tensor(coef.T, device, dtype), tensor(intercept, device, dtype))
        for coef, intercept in zip(weights.coefs, weights.intercepts, strict=True)
    ]
    slopes = [tensor(slope, device, dtype) for slope in weights.slopes]
    found = []
    with torch.inference_mode():
        for start in range(0, x.shape[0], ROWS):
            rows = rows_of(x, slice(start, start + ROWS), device, dtype)
            for number, (w, b) in enumerate(layers):
                act = activation if number < len(layers) - 1 else "none"
                slope = slopes[number] if act == "prelu" else None
                rows = functional.linear_act(rows, w, b, act, slope=slope, backend=backend)
            found.append(rows.cpu())
    return torch.cat(found).numpy()
