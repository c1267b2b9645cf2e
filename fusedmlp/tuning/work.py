"""What is measured: one network on so many rows, and the ways that can run it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from ..autograd.mlp import Net
from ..backends import choice, composite, measured, registry
from ..spec import activations, checks, dtypes, layers, philox
from ..spec.layers import Epilogue, Layer

_P = 0.5
_DTYPES = {dtypes.SHORT[d]: d for d in dtypes.KERNEL}


@dataclass(frozen=True)
class Work:
    """A call of a network; in_features 0 is an activation alone.

    layers     (activation, whether it drops, out_features) of each
    gradients  forward and backward, else forward alone
    """

    device: str
    dtype: str
    rows: int
    in_features: int
    layers: tuple[tuple[str, bool, int], ...]
    gradients: bool

    @classmethod
    def from_dict(cls, plain: dict) -> Work:
        return cls(**plain | {"layers": tuple(map(tuple, plain["layers"]))})

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def kinds(self) -> list[tuple[int, bool, int]]:
        """The layers as choice.py takes them."""
        return [(activations.IDS[act], drops, n) for act, drops, n in self.layers]

    @property
    def drops(self) -> bool:
        return any(drops for _, drops, _ in self.layers)

    @property
    def key(self) -> str:
        return measured.call_key(
            self.torch_dtype, self.rows, self.in_features, self.kinds, self.gradients
        )

    @property
    def class_key(self) -> str:
        return measured.class_key(
            self.torch_dtype, self.rows, self.in_features, self.kinds, self.gradients
        )

    def __str__(self) -> str:
        net = "-".join(str(n) for n in (self.in_features, *(n for _, _, n in self.layers)))
        acts = "/".join(dict.fromkeys(act for act, _, _ in self.layers if act != "none")) or "none"
        drops = ", dropout" * self.drops
        mode = "forward and backward" if self.gradients else "forward"
        return f"{self.rows} x {net}, {acts}{drops}, {self.dtype}, {self.device}, {mode}"


class Problem:
    """The tensors of a work, and its calls. Numbers are the same for the same work."""

    def __init__(self, work: Work, dtype: torch.dtype | None = None):
        """dtype: another one than the work's, of the same numbers."""
        self.work = work
        dtype = dtype or work.torch_dtype
        g = torch.Generator().manual_seed(1)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            t = (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(work.torch_dtype)
            return t.to(work.device, dtype)

        self.x = randn(work.rows, work.in_features)
        self.state = torch.tensor([7, 11], device=work.device)
        self.layers, k = [], work.in_features
        if not k:
            self.x = randn(work.rows, work.layers[0][2])
        for i, (act, drops, n) in enumerate(work.kinds):
            w, b = randn(n, k, scale=max(k, 1) ** -0.5) if k else None, randn(n)
            slope = randn(1).abs() if act == activations.PRELU else None
            threshold, scale = philox.threshold_and_scale(_P) if drops else (0, 1.0)
            alpha = checks.DEFAULT_LEAKY_SLOPE
            e = Epilogue(b, slope, self.state, act, alpha, threshold, scale, i, 0)
            self.layers.append(Layer(w, e))
            k = n
        self.dy = randn(work.rows, k)
        if work.in_features:
            self.params, self.ints, self.numbers = layers.pack(self.layers)
        else:
            self.params = [self.x, *filter(None.__ne__, self.layers[0].epilogue[:2])]
        for t in self.params:
            t.requires_grad_(work.gradients)

    def eager(self) -> Tensor:
        """Plain PyTorch, with its own masks."""
        y = self.x
        for w, e in self.layers:
            y = _plain(y, w, e._replace(threshold=0))
            if e.threshold:
                y = F.dropout(y, _P)
        return y

    def reference(self) -> Tensor:
        """Plain PyTorch with this package's masks."""
        y = self.x
        for w, e in self.layers:
            y = _plain(y, w, e)
        return y

    def mlp(self, backend: str) -> Callable[[], Tensor]:
        """The op of a whole network."""
        net = Net(backend, self.ints, self.numbers, self.x)
        call = net.train if self.work.gradients else net.infer
        return lambda: call(self.x, self.state, 0, self.params)

    def one_by_one(self, backend: str, route: str) -> Tensor:
        """An op a layer."""
        y = self.x
        for w, e in self.layers:
            y = _op(backend, route, y, w, e)
        return y

    def gradients(self, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y, self.params, self.dy))


def _plain(x: Tensor, w: Tensor | None, e: Epilogue) -> Tensor:
    if w is None:
        return composite.bias_act_dropout(x, e)
    return composite.linear_act(x, w, e)


def _op(backend: str, route: str, x: Tensor, w: Tensor | None, e: Epilogue) -> Tensor:
    if w is None:
        return FF.bias_act_dropout_on(backend, x, e)
    if e.act == activations.NONE and not e.threshold:
        return F.linear(x, w, e.bias)
    return FF.linear_act_on(backend, x, w, e, route)


def candidates(work: Work) -> dict[str, Callable[[Problem], Callable[[], Tensor]]]:
    """Name -> what makes its call of a problem; eager comes first. Those that cannot run on this
    machine are not in it."""
    found: dict = {"eager": lambda p: p.eager}
    if work.drops and work.gradients:
        found["reference"] = lambda p: p.reference
    for backend in registry.list_backends():
        if backend == "reference" or not registry.is_usable(
            backend, work.device, work.torch_dtype, "linear_act"
        ):
            continue
        if work.in_features and choice.has_mlp(backend, work.device, work.torch_dtype):
            found[f"{backend} mlp"] = lambda p, b=backend: p.mlp(b)
        for route in choice.ROUTES[work.device]:
            found[f"{backend} {route}"] = lambda p, b=backend, r=route: functools.partial(
                p.one_by_one, b, r
            )
    return found
