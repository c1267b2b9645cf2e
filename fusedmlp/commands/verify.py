"""Checks every backend that this machine can run against fp64: the error budget, and the command.

Oracle: the reference backend in fp64 on the same inputs and masks. Yardstick: plain PyTorch in the
tested dtype, with the same masks. Outputs and all gradients must be within the error budget of
spec/budget.py, and equal to the oracle where the inputs are small integers. The cases are those of
cases.py: a spread of them here, all of them in `make numerics`. Nothing here is imported by the
core.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from ..autograd.mlp import Net
from ..backends import choice, composite, native, registry
from ..spec import activations, dtypes, layers, philox
from ..spec.budget import share
from ..trial.check import SEED, STREAM, masks_agree
from . import cases, repeats
from .cases import Case


def _finish(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients of those leaves that need one."""
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy) if wanted else ()
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}


def leaves_of(
    inputs: dict[str, Tensor], dtype: torch.dtype | None = None, needs: str | None = None
) -> dict[str, Tensor]:
    """Copies that need a gradient: those that are named in needs, or all."""
    return {
        name: t.detach().to(dtype or t.dtype).requires_grad_(needs is None or name in needs.split())
        for name, t in inputs.items()
        if name != "dy"
    }


def run(case: Case, backend: str | None, inputs: dict[str, Tensor] | None = None):
    """Output and gradients of a case on a backend, as {'y', 'dx', 'dw', 'db', 'dslope'}."""
    inputs = inputs or case.inputs()
    leaves = leaves_of(inputs, needs=case.needs)
    with torch.set_grad_enabled(bool(case.needs)):
        return _finish(call(case, leaves, backend), leaves, inputs["dy"])


def call(case: Case, leaves: dict[str, Tensor], backend: str | None) -> Tensor:
    slope = leaves.get("slope", case.alpha)
    numbers = dict(slope=slope, p=case.p, seed=SEED, stream=STREAM, backend=backend)
    if case.op == "linear_act":
        return FF.linear_act(leaves["x"], leaves["w"], leaves.get("b"), case.act, **numbers)
    if case.op == "mlp":
        return _as_network(case, leaves, backend)
    return FF.bias_act_dropout(leaves["x"], leaves.get("b"), case.act, **numbers)


def _as_network(case: Case, leaves: dict[str, Tensor], backend: str) -> Tensor:
    """linear_act as a network of one layer."""
    params = [leaves.get(name) for name in ("w", "b", "slope")]
    has = sum(bit for bit, t in zip(layers.BITS, params, strict=True) if t is not None)
    threshold, scale = philox.threshold_and_scale(case.p)
    x, alpha = leaves["x"], 0.01 if case.alpha is None else case.alpha
    net = Net(backend, [activations.IDS[case.act], threshold, 0, has], [alpha, scale], x)
    state = torch.tensor([SEED, STREAM], device=case.device)
    use = net.train if torch.is_grad_enabled() else net.infer
    return use(x, state, 0, [t for t in params if t is not None])


def oracle(case: Case, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The same in fp64 on the reference backend."""
    inputs = inputs or case.inputs()
    leaves = leaves_of(inputs, torch.float64, case.needs)
    op = "bias_act_dropout" if case.op == "bias_act_dropout" else "linear_act"
    y = call(replace(case, op=op, dtype=torch.float64), leaves, "reference")
    return _finish(y, leaves, inputs["dy"].double())


def plain(case: Case, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The same with PyTorch's own functions and autograd, in the case's dtype, with our mask."""
    inputs = inputs or case.inputs()
    if case.dtype != torch.float32:
        # On CPUs with AMX, PyTorch's bf16 product of rows with padding between them reads the
        # padding (seen with torch 2.14), and a NaN there ends up in the result.
        inputs = {k: t.contiguous() for k, t in inputs.items()}
    leaves = leaves_of(inputs, needs=case.needs)
    x, w, b = leaves["x"], leaves.get("w"), leaves.get("b")
    if w is not None:
        z = F.linear(x, w, b)
    else:
        z = x if b is None else x + b
    alpha = 0.01 if case.alpha is None else case.alpha
    y = composite._plain(activations.IDS[case.act], z, leaves.get("slope"), alpha)
    if case.p > 0:
        threshold, scale = philox.threshold_and_scale(case.p)
        state = torch.tensor([SEED, STREAM], device=case.device)
        mask = philox.keep_mask(state, 0, case.m, case.n, threshold).view(y.shape)
        # As torch's native_dropout: multiplied by the mask and by the scale.
        y = y * mask.to(y.dtype) * scale
    return _finish(y, leaves, inputs["dy"])


@dataclass(frozen=True)
class Runner:
    """A backend, and of the native one on a CPU an instruction set."""

    backend: str
    isa: str = ""

    def __str__(self) -> str:
        return f"{self.backend} {self.isa}".rstrip()

    def set(self) -> contextlib.AbstractContextManager:
        return native.instruction_set(self.isa) if self.isa else contextlib.nullcontext()


@dataclass
class Verdict:
    """What was found of a backend, op and dtype; one line of the table."""

    runner: Runner
    device: str
    op: str
    dtype: str
    masks: bool = False  # bit-equal to the specification
    cases: int = 0
    equal: int = 0  # of these, on integers
    wrong: int = 0
    worst: float = 0.0  # share of the error budget; above 1 is wrong
    error: str = ""  # the first one

    @property
    def ok(self) -> bool:
        return self.masks and not self.error

    def found(self, case: Case, error: str) -> None:
        self.wrong += 1
        self.error = self.error or f"{case}: {error}"

    def add(self, case: Case, inputs: dict, truth: dict, yardstick: dict) -> None:
        """Runs a case."""
        self.cases += 1
        self.equal += case.integers
        try:
            with self.runner.set():
                got = run(case, self.runner.backend, inputs)
        except Exception as caught:  # a backend that raises is a finding, not the end of the table
            return self.found(case, f"{type(caught).__name__}: {str(caught).splitlines()[0]}")
        for name, value in got.items():
            if value.shape != truth[name].shape or value.dtype != case.dtype:
                return self.found(case, f"{name} is {value.dtype} {tuple(value.shape)}")
            if case.integers:
                if not torch.equal(value, truth[name].to(case.dtype)):
                    return self.found(case, f"{name} is not equal to the truth")
                continue
            beside = yardstick[name], truth[name], case.dtype
            used = share(value, *beside, case.independent, case.terms[name], case.products)
            self.worst = max(self.worst, used)
            if not used <= 1:
                return self.found(case, f"{name} takes {used:.3g} times the error budget")
        return None


def verify_cases(runners: Iterable[Runner], found: Iterable[Case]) -> list[Verdict]:
    """Runs the same cases, of one op, dtype and device, on several backends."""
    verdicts: list[Verdict] = []
    for case in found:
        if not verdicts:
            for runner in runners:
                verdict = Verdict(runner, case.device, case.op, dtypes.SHORT[case.dtype])
                try:
                    with runner.set():
                        verdict.masks = masks_agree(runner.backend, case.device)
                except Exception as caught:
                    verdict.found(case, f"masks: {type(caught).__name__}: {caught}")
                verdicts.append(verdict)
        inputs = case.inputs()
        truth, yardstick = oracle(case, inputs), plain(case, inputs)
        for verdict in verdicts:
            verdict.add(case, inputs, truth, yardstick)
    return verdicts


def devices() -> list[str]:
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def runners(op: str, dtype: torch.dtype, device: str) -> list[Runner]:
    """What can run an op here: each backend, the native one with every instruction set."""
    found = []
    for backend in registry.BACKENDS:
        has_op = op != "mlp" or choice.has_mlp(backend.name, device, dtype)
        if backend.reasons_against(device, dtype) or not has_op:
            continue
        is_native = (backend.name, device) == ("native", "cpu")
        isas = native.cpu_isas() if is_native else [""]
        found += [Runner(backend.name, isa) for isa in isas]
    return found


def verify(full: bool = False) -> Iterator[Verdict]:
    """Verdicts on every backend, device, op and dtype that can run here, as they are found.

    full  the whole table, in place of a spread
    """
    for device in devices():
        for op in cases.OPS:
            for dtype in cases.DTYPES.values():
                who = runners(op, dtype, device)
                found = cases.table(op, dtype, device) if who else []
                yield from verify_cases(who, found if full else cases.spread(found))


def verify_bits() -> Iterator[tuple[str, str, int, str]]:
    """For each op of the native backend on a CPU, and each circumstance in which it promises the
    same bits: op, circumstance, number of cases, and what is wrong."""
    for op in cases.OPS:
        if any(runner.backend == "native" for runner in runners(op, torch.float32, "cpu")):
            found = cases.shared(op, torch.float32)
            circumstances = repeats.promised(op, "cpu")
            answers = repeats.changed(found, lambda case: run(case, "native"), circumstances)
            for what, wrong in answers:
                error = f"{len(wrong)} WRONG: {wrong[0]}" if wrong else ""
                yield op, what, len(found), error


def command(argv: list[str]) -> int:
    """`fusedmlp verify`: prints the table; 0 when all is right, else 1."""
    parser = argparse.ArgumentParser(
        prog="fusedmlp verify",
        description="Check every backend and instruction set of this machine against fp64: "
        "outputs, gradients, masks; and the same bits in other threads and processes.",
    )
    parser.add_argument("--full", action="store_true", help="every case of the table: minutes")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    print(
        f"{'backend':15} {'device':6} {'op':17} {'dtype':5} {'cases':>6} {'equal':>5} "
        f"{'budget':>6} masks"
    )
    wrong = count = 0
    for v in verify(args.full):
        wrong += not v.ok
        count += v.cases
        print(
            f"{v.runner!s:15} {v.device:6} {v.op:17} {v.dtype:5} {v.cases:6d} {v.equal:5d} "
            f"{v.worst:6.2f} {'equal' if v.masks else 'DIFFER':6} "
            f"{'ok' if v.ok else f'{v.wrong} WRONG: {v.error}'}",
            flush=True,
        )
    bits: dict[str, list[str]] = {}
    for op, what, ran, error in verify_bits():
        count += ran
        wrong += bool(error)
        bits.setdefault(op, []).append(f"{what}: {error}" if error else what)
    for op, told in bits.items():
        print(f"native          cpu    {op:17} the same bits {', '.join(told)}")
    for device in devices():
        for backend in registry.BACKENDS:
            reason = backend.unavailable(device)
            if reason is not None:
                print(f"{backend.name:15} {device:6} not checked: {reason}")
    print(
        f"{'all right' if not wrong else f'{wrong} WRONG'}: {count} cases in "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 1 if wrong else 0
