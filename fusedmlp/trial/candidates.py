"""The ways that can run a work: as calls of ops on given tensors, whose results are checked, and as
the modules that a user has, which are timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF
from ..autograd.mlp import Net
from ..backends import choice, composite, registry
from ..nn.sequential import FusedSequential, activation_module
from ..spec import activations, checks, layers, philox
from ..spec.layers import Epilogue, Layer
from ..tuning.work import Work

P = 0.5


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
            threshold, scale = philox.threshold_and_scale(P) if drops else (0, 1.0)
            alpha = checks.DEFAULT_LEAKY_SLOPE
            e = Epilogue(b, slope, self.state, act, alpha, threshold, scale, i, 0)
            self.layers.append(Layer(w, e))
            k = n
        self.dy = randn(work.rows, k)
        if work.in_features:
            self.params, self.ints, self.numbers = layers.pack(self.layers)
        else:
            e = self.layers[0].epilogue
            self.params = [self.x, *(t for t in (e.bias, e.slope) if t is not None)]
        for t in self.params:
            t.requires_grad_(work.gradients)

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


@dataclass(frozen=True)
class Candidate:
    """call    of a problem: what is checked, None for what is right by itself
    module  of a work: what is timed"""

    call: Callable[[Problem], Callable[[], Tensor]] | None
    module: Callable[[Work], nn.Module]


def plain(work: Work, kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    """The modules of a work as a user writes them, with random weights."""
    torch.manual_seed(0)
    like = {"device": work.device, "dtype": work.torch_dtype}
    modules: list[nn.Module] = []
    k = work.in_features
    for act, drops, n in work.layers:
        modules += [nn.Linear(k, n, **like)] if k else []
        found = activation_module(activations.IDS[act], **like)
        modules += [] if found is None else [found]
        modules += [nn.Dropout(P)] if drops else []
        k = n
    return kind(*modules)


def fused(work: Work, way: choice.Way) -> nn.Module:
    """The same as a container that runs that way on inputs like the work's from now on."""
    net = plain(work, FusedSequential)
    x = torch.zeros(
        work.rows,
        work.in_features or work.layers[0][2],
        device=work.device,
        dtype=work.torch_dtype,
        requires_grad=work.gradients and not work.in_features,
    )
    with choice.forced(way), torch.set_grad_enabled(work.gradients):
        net.train(work.gradients)(x)
    return net


def candidates(work: Work) -> dict[str, Candidate]:
    """By name; eager comes first. Those that cannot run on this machine are not in it."""
    found = {"eager": Candidate(None, plain)}
    if work.drops and work.gradients:
        way = choice.Way("reference", "layers", "")
        found["reference"] = Candidate(None, functools.partial(fused, way=way))
    for backend in registry.list_backends():
        is_interpreted = backend == "triton" and work.device == "cpu"
        if backend == "reference" or is_interpreted:
            continue
        if not registry.is_usable(backend, work.device, work.torch_dtype, "linear_act"):
            continue
        if work.in_features and choice.has_mlp(backend, work.device, work.torch_dtype):
            way = choice.Way(backend, "mlp", "")
            module = functools.partial(fused, way=way)
            found[way.name] = Candidate(lambda p, b=backend: p.mlp(b), module)
        for route in choice.ROUTES[work.device]:
            way = choice.Way(backend, route, "")

            def call(p: Problem, way=way) -> Callable[[], Tensor]:
                return functools.partial(p.one_by_one, way.backend, way.route)

            found[way.name] = Candidate(call, functools.partial(fused, way=way))
    return found
