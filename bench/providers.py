"""The ways to run a case. Times nothing; check.py tells whether they are right.

Providers: `eager` PyTorch; `compile` and `max-autotune` (CUDA, with CUDA graphs) of it; `graph`, a
hand-made CUDA graph of it; `addmm` = torch._addmm_activation; `auto`, this package with its own
choice of backend, and each of its backends by name; `op`, the registered op that `auto` ends in,
without the checks and the drawing of a seed; `auto graph`, a CUDA graph of `auto`; `floor`, what no
implementation can do without: copies of the tensors, or the bare GEMMs through torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedmlp
from fusedmlp import context, ops
from fusedmlp import functional as FF
from fusedmlp.backends import choice, registry
from fusedmlp.nn.sequential import activation_module
from fusedmlp.nn.steps import MlpStep
from fusedmlp.spec import activations, philox

from .cases import Case
from .saved_bytes import saved_bytes
from .timing import captured

_EPS_TF32 = 2.0**-10


class Unavailable(RuntimeError):
    """A provider that cannot run a case here; the message is the reason."""


@dataclass
class Provider:
    """One way to run a case.

    run      what is timed
    results  output and gradients by name, fresh; {} for a floor
    ours     True where the mask is this package's
    saved    bytes kept between forward and backward, beyond data and parameters; None where that
             cannot be seen
    fused    the container that automatic choice runs
    """

    name: str
    run: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]
    ours: bool = False
    saved: int | None = None
    fused: nn.Module | None = None


def default_names(case: Case) -> list[str]:
    """The providers of a case, the baseline first."""
    if case.group == "grid":
        return ["eager", "auto"]
    names, cuda, modules = ["eager"], case.device == "cuda", case.op in ("net", "layer")
    # What compiling costs: seconds a shape, and half a minute a shape for tuned GEMMs.
    if case.group != "shapes":
        names += ["compile"] + ["max-autotune"] * (cuda and not case.elementwise)
    if cuda and case.op == "net":
        names += ["graph", "auto graph"]
    if case.mode == "infer":
        names += ["addmm"] * (case.op == "linear_act") + ["op"] * (not modules)
    # The reference is there to be right; where it takes seconds a call it is left out.
    too_slow = cuda or modules or case.m * case.dims[-1] > 1 << 21
    left_out = {route(case), "reference" if too_slow else ""}
    return [*names, "auto", *(n for n in registry.list_backends() if n not in left_out), "floor"]


def route(case: Case) -> str:
    """What automatic choice runs the ops of a case on, each asked for by itself; a list with commas
    where they differ."""
    op = "bias_act_dropout" if case.elementwise else "linear_act"
    found = [
        choice.explain(
            op, rows=case.m, in_features=k, out_features=n, activation=act, p=p,
            dtype=case.torch_dtype, device=case.device,
        ).choice
        for k, n, act, p in case.layers
    ]  # fmt: skip
    return found[0] if len(set(found)) == 1 else ",".join(found)


def ran_on(fused: nn.Module) -> str:
    """What the last call of a fused container ran on."""
    names = []
    for _, step in fused._plan.last.steps:
        backend = getattr(step, "backend", None) or "eager"
        names.append(f"{backend} mlp" if type(step) is MlpStep else backend)
    return ", ".join(dict.fromkeys(names))


class Problem:
    """A case with its inputs: random normal leaves, the incoming gradient, and its providers."""

    def __init__(self, case: Case, seed: int = 1):
        self.case = case
        g = torch.Generator(case.device).manual_seed(seed)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            t = torch.randn(*shape, generator=g, device=case.device)
            return (t * scale).to(case.torch_dtype)

        first = case.layers[0]
        self.leaves = {"x": randn(case.m, first[0] or first[1])}
        for i, (k, n, _, _) in enumerate(case.layers):
            if k:
                self.leaves[f"w{i}"] = randn(n, k, scale=k**-0.5)
            if case.op != "dropout":
                self.leaves[f"b{i}"] = randn(n, scale=1.0 if case.elementwise else 0.1)
        for name, t in self.leaves.items():
            t.requires_grad_(name != "x" or case.mode != "step")
        self.wanted = [name for name, t in self.leaves.items() if t.requires_grad]
        classes = case.layers[-1][1]
        self.targets = torch.randint(classes, (case.m,), generator=g, device=case.device)
        self.dy = randn(case.m, classes)
        self._zero_near_kink()
        # check.py keeps here what it has worked out for one mask.
        self.truth: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def _zero_near_kink(self) -> None:
        """Where rounding decides the side of 0 that z is on, either derivative of relu is right."""
        if len(self.case.layers) > 1 or self.case.layers[0][2] not in ("relu", "leaky_relu"):
            return
        x, w, b = (self.leaves.get(n) for n in ("x", "w0", "b0"))
        with torch.no_grad():
            z, size = (x, x.abs()) if w is None else (x @ w.T, x.abs() @ w.abs().T)
            eps = self.eps
            self.dy[(z.float() + b.float()).abs() < 2 * eps * (size.float() + b.abs())] = 0

    @property
    def eps(self) -> float:
        """Of the arithmetic that is timed."""
        return _EPS_TF32 if self.case.dtype == "tf32" else torch.finfo(self.dy.dtype).eps

    def provider(self, name: str) -> Provider:
        """The provider of that name, not warmed up; raises Unavailable."""
        case = self.case
        if name == "floor":
            return Provider(name, self._floor(), dict)
        if name.endswith("graph"):
            inner = self.provider("auto" if name.startswith("auto") else "eager")
            return Provider(name, captured(inner.run), inner.results, inner.ours)
        if name in ("op", "addmm") and case.mode != "infer":
            raise Unavailable("it has no gradient")
        backend, ours = None, name not in ("eager", "compile", "max-autotune", "addmm")
        if ours and name not in ("auto", "op"):
            backend = name
            reasons = registry._BY_NAME[name].reasons_against(case.device, case.torch_dtype)
            if reasons:
                raise Unavailable("; ".join(reasons))
        fused = None
        if case.op in ("layer", "net"):
            forward, parameters, net = self._module(name, ours)
            fused = net if name == "auto" else None
        else:
            forward, parameters = self._functional(name, backend, ours), None
        run, results = self._timed(forward, parameters)
        if backend and parameters is not None:
            run, results = (_on_backend(backend, function) for function in (run, results))
        saved = None
        if name not in ("compile", "max-autotune") and case.mode != "infer":
            kept = [*self.leaves.values(), *(parameters or ())]
            saved = saved_bytes(lambda *_: forward(), *kept)
        return Provider(name, run, results, ours, saved, fused)

    def _functional(self, name: str, backend: str | None, ours: bool) -> Callable[[], Tensor]:
        x, w, b = (self.leaves.get(n) for n in ("x", "w0", "b0"))
        _, _, act, p = self.case.layers[0]
        if name == "addmm":
            if act not in ("relu", "gelu", "gelu_tanh"):
                raise Unavailable(f"torch._addmm_activation has no {act}")
            gelu = act != "relu"
            return lambda: F.dropout(torch._addmm_activation(b, x, w.t(), use_gelu=gelu), p)
        if name == "op":
            return self._op(x, w, b, act, p)
        if ours:
            if self.case.op == "dropout":
                return lambda: FF.dropout(x, p, backend=backend)
            if w is None:
                return lambda: FF.bias_act_dropout(x, b, act, p=p, backend=backend)
            return lambda: FF.linear_act(x, w, b, act, p=p, backend=backend)

        def eager(x, w, b):
            z = F.linear(x, w, b) if w is not None else x if b is None else x + b
            y = activations.TABLE[activations.IDS[act]].forward(z, 0.01)
            return F.dropout(y, p) if p else y

        function = _compiled(name, eager)
        return lambda: function(x, w, b)

    def _op(self, x, w, b, act: str, p: float) -> Callable[[], Tensor]:
        """The op itself, on a state drawn once: fresh, or inside the check's dropout_state."""
        op = "bias_act_dropout" if w is None else "linear_act"
        number = activations.IDS[act]
        k, n = self.case.layers[0][:2]
        m, device_type = self.case.m, x.device.type
        route = choice.select(op, device_type, x.dtype, number, p > 0, m, k, n, None)
        if route == registry.EAGER:
            raise Unavailable("automatic choice runs plain PyTorch")
        call = getattr(ops.BY_BACKEND[route], f"{op}_fwd" if w is None else f"{op}_infer")
        tensors = [t.detach() for t in (x, w, b) if t is not None]
        tensors += [None] * (b is None)
        numbers = (number, 0.01, *philox.threshold_and_scale(p), 0, 0)
        drawn = {}

        def run():
            scope = context.now().scopes
            if scope not in drawn:
                drawn[scope] = FF.draw_state(x)[0] if p else None
            return call(*tensors, None, drawn[scope], *numbers)

        return run

    def _module(self, name: str, ours: bool):
        """(forward, parameters, the module); in a step, forward is the loss."""
        modules: list[nn.Module] = []
        for i, (k, n, act, p) in enumerate(self.case.layers):
            linear = nn.Linear(k, n, device=self.case.device, dtype=self.case.torch_dtype)
            linear.weight = nn.Parameter(self.leaves[f"w{i}"].detach().clone())
            linear.bias = nn.Parameter(self.leaves[f"b{i}"].detach().clone())
            modules.append(linear)
            if act != "none":
                modules.append(activation_module(activations.IDS[act], None, None))
            if p > 0:
                modules.append(nn.Dropout(p))
        net: nn.Module = nn.Sequential(*modules)
        if ours:
            net = fusedmlp.fuse(copy.deepcopy(net))
        x, targets, parameters = self.leaves["x"], self.targets, list(net.parameters())
        if self.case.mode != "step":
            function = _compiled(name, net)
            return (lambda: function(x)), parameters, net
        loss = _compiled(name, lambda x, t: F.cross_entropy(net(x).float(), t))
        return (lambda: loss(x, targets)), parameters, net

    def _timed(self, forward, parameters):
        """(run, results) of a mode; gradients are of x, if it needs one, weights and biases."""
        mode, dy = self.case.mode, self.dy
        leaves = [self.leaves[n] for n in self.wanted]
        if parameters is not None:
            leaves = [t for t in leaves if t is self.leaves["x"]] + parameters
        if mode == "infer":
            infer = torch.no_grad()(forward)
            return infer, lambda: {"y": infer().clone()}
        if mode == "step":
            # A step so small that thousands of them leave the values as they are.
            optimizer = torch.optim.SGD(parameters, lr=1e-6)

            def step():
                optimizer.zero_grad()
                loss = forward()
                loss.backward()
                optimizer.step()
                return loss

            return step, lambda: self.named(step(), [p.grad for p in parameters])
        made = []

        def forward_backward():
            y = forward()
            return y, torch.autograd.grad(y, leaves, dy)

        def backward():
            if not made:
                made.append(forward())
            return torch.autograd.grad(made[0], leaves, dy, retain_graph=True)

        run = {"fwd": forward, "bwd": backward, "fwd+bwd": forward_backward}[mode]
        return run, lambda: self.named(*forward_backward())

    def named(self, y: Tensor, grads) -> dict[str, Tensor]:
        names = [f"d{n}" for n in self.wanted]
        grads = [g.detach().clone() for g in grads]
        return {"y": y.detach().clone()} | dict(zip(names, grads, strict=True))

    def _floor(self) -> Callable[[], object]:
        case, mode = self.case, self.case.mode
        forward, backward = mode != "bwd", mode not in ("infer", "fwd")
        calls: list[Callable[[], object]] = []
        x = self.leaves["x"].detach()
        if case.elementwise:
            saved = x.clone()
            calls += [lambda: torch.clone(x)] * forward
            calls += [lambda: torch.mul(self.dy, saved)] * backward
        else:
            for i, (k, n, _, _) in enumerate(case.layers):
                calls += self._gemms(i, k, n, forward, backward)

        def run():
            for call in calls:
                call()

        return run

    def _gemms(self, i: int, k: int, n: int, forward: bool, backward: bool):
        """The bare products of layer i: z = x w^T, dx = dz w, dw = dz^T x, into given memory."""
        like, m = self.dy, self.case.m
        x = self.leaves["x"].detach() if i == 0 else torch.randn_like(like.new_empty(m, k))
        w, dz = self.leaves[f"w{i}"].detach(), torch.randn_like(like.new_empty(m, n))
        z, dx, dw = torch.empty_like(dz), torch.empty_like(x), torch.empty_like(w)
        needs_dx = backward and (i > 0 or self.case.mode != "step")
        calls = [lambda: torch.mm(x, w.t(), out=z)] * forward
        calls += [lambda: torch.mm(dz, w, out=dx)] * needs_dx
        return calls + [lambda: torch.mm(dz.t(), x, out=dw)] * backward


def _on_backend(backend: str, function: Callable[[], object]) -> Callable[[], object]:
    def run():
        with fusedmlp.use_backend(backend):
            return function()

    return run


def _compiled(name: str, function):
    """`function` itself unless the provider's name asks for a compiled one."""
    if name == "compile":
        return torch.compile(function, dynamic=False)
    if name != "max-autotune":
        return function
    compiled = torch.compile(function, dynamic=False, mode="max-autotune")

    def run(*args):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args)

    return run
