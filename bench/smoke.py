"""What a device that is new to the package has to show first: one call of every op and backend.

    python -m bench.smoke --out bench/results/gpu/machine.json
    python -m bench.smoke --device cpu --backend native    # the same checks, without CUDA graphs
    python -m bench.smoke --large                          # only calls, for a profiler to look at

Values against fp64 within the error budget, masks bit for bit, the same call in a CUDA graph, and
20 steps of the graph engine against an fp64 loop. Goes on after a failure: a line for each, `ok` or
the error's first line. Last the rates of a copy and of a product, to read others against.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmlp import functional as FF
from fusedmlp.backends import registry
from fusedmlp.commands import verify
from fusedmlp.spec.budget import excess
from fusedmlp.trial import check

from . import record, timing, ways

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_STEPS = 20


def _within_budget(case: verify.Case, backend: str) -> str:
    got, inputs = verify.run(case, backend), case.inputs()
    truth, plain = verify.oracle(case, inputs), verify.plain(case, inputs)
    share = max(excess(got[n], plain[n], truth[n], case.dtype) for n in got)
    if not share <= 1:
        raise ValueError(f"takes {share:.2f} of the error budget")
    return f"{share:.2f} of the error budget"


def _masks(backend: str, device: str) -> str:
    if not check.masks_agree(backend, device):
        raise ValueError("they are not those of the specification")
    return "bit for bit"


def _loss_and_gradient(x: Tensor, function: Callable, **more) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = function(x, torch.arange(len(x), device=x.device) % x.shape[1], **more)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def _cross_entropy(backend: str, dtype: torch.dtype, device: str) -> str:
    x = torch.randn(70, 37, device=device).to(dtype)
    loss, dx = _loss_and_gradient(x, FF.cross_entropy, label_smoothing=0.1, backend=backend)
    truth, right = _loss_and_gradient(x.double(), F.cross_entropy, label_smoothing=0.1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), truth, rtol=2 * eps, atol=0)
    torch.testing.assert_close(dx.double(), right, rtol=2 * eps, atol=eps * right.abs().max())
    return ""


def _in_a_graph(case: verify.Case, backend: str) -> str:
    """Forward and backward captured and replayed: the bits of the call outside."""
    inputs = case.inputs()
    expected = verify.run(case, backend, inputs)
    got = timing.captured(lambda: verify.run(case, backend, inputs))()
    if differs := [name for name in expected if not torch.equal(got[name], expected[name])]:
        raise ValueError(f"a replay gives another {', '.join(differs)}")
    return "the same bits"


def _engine(precision: str, device: str) -> str:
    case = ways.network("64-32-10", (0.2,), batch=64, precision=precision)
    data = ways.noise(_STEPS * case.batch, 1, 64).to(device)
    order = torch.arange(_STEPS * case.batch, device=device)
    way = ways.Ours(case, data)
    if reason := ways.Checker(case, data, order).wrong(way):
        raise ValueError(reason)
    if device == "cuda" and way.engine.name != "graph":
        raise ValueError(f"it ran as the engine {way.engine.name!r}")
    return f"{_STEPS} steps"


def checks(device: str, backends: list[str]) -> dict[str, Callable[[], str]]:
    """Name -> what raises where something is wrong, else says how right it is."""
    made = {}
    for backend in backends:
        made[f"{backend} masks"] = lambda b=backend: _masks(b, device)
        for name, dtype in DTYPES.items():
            for op in ("linear_act", "bias_act_dropout", "mlp"):
                if (op, backend, name, device) == ("mlp", "native", "bf16", "cpu"):
                    continue  # there it takes fp32 only
                case = verify.Case(op, 128, 96, 80, "gelu", 0.3, dtype, device)
                made[f"{backend} {op} {name}"] = lambda c=case, b=backend: _within_budget(c, b)
                if device == "cuda":
                    graph = lambda c=case, b=backend: _in_a_graph(c, b)  # noqa: E731
                    made[f"{backend} {op} {name} in a graph"] = graph
            if not registry._BY_NAME[backend].reasons_against(device, dtype, "cross_entropy"):
                loss = lambda d=dtype, b=backend: _cross_entropy(b, d, device)  # noqa: E731
                made[f"{backend} cross_entropy {name}"] = loss
    for precision in ("bf16", "fp32"):
        made[f"graph engine {precision}"] = lambda p=precision: _engine(p, device)
    return made


def ceilings(device: str) -> dict[str, float]:
    """Bytes read and written of a copy, GB/s, and a square product of bf16, TFLOP/s."""
    size, n = (1 << 30, 8192) if device == "cuda" else (1 << 24, 256)
    source, target = torch.empty(2, size, dtype=torch.uint8, device=device)
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    taken = timing.measure(calls, timing.timer(device), budget_s=1.0)
    ms = {name: timing.spread(t.ms)[0] for name, t in taken.items()}
    return {"copy_gb_per_s": 2e-6 * size / ms["copy"], "tflop_per_s": 2e-9 * n**3 / ms["product"]}


def large(device: str, backends: list[str], scale: int) -> None:
    """Forward and backward of each op, twice: the first call of a kind may compile."""
    for backend in backends:
        for op, m, k, n in (
            ("bias_act_dropout", 16384, 0, 4096), ("linear_act", 8192, 1024, 4096),
            ("linear_act", 256, 784, 256), ("mlp", 8192, 1024, 4096),
        ):  # fmt: skip
            sizes = (max(size // scale, 8) for size in (m, k, n))
            case = verify.Case(op, *sizes, "relu", 0.1, torch.bfloat16, device)
            inputs = case.inputs()
            for _ in range(2):
                verify.run(case, backend, inputs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", action="append", choices=("native", "triton", "reference"))
    parser.add_argument("--large", action="store_true", help="only large calls, checked by nothing")
    parser.add_argument("--scale", type=int, default=1, help="divides the sizes of --large")
    parser.add_argument("--out", type=Path, help="JSON file that the rates are added to")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("smoke: torch sees no GPU; --device cpu runs the same checks", file=sys.stderr)
        return 2
    failed, usable = 0, []
    for name in args.backend or ["native", "triton"]:
        reason = registry._BY_NAME[name].unavailable(args.device)
        if reason is None:
            usable.append(name)
        else:
            failed += 1
            print(f"FAILED  {name}: {reason}", flush=True)
    if args.large:
        large(args.device, usable, args.scale)
        return 1 if failed else 0
    made = checks(args.device, usable)
    for name, one in made.items():
        start = time.perf_counter()
        try:
            said = one()
        except Exception as error:  # one that fails is a line, not the end
            failed += 1
            text = (str(error).strip().splitlines() or [""])[0]
            print(f"FAILED  {name}: {type(error).__name__}: {text}", flush=True)
        else:
            print(f"ok  {time.perf_counter() - start:6.2f} s  {name}  {said}", flush=True)
    rates = ceilings(args.device)
    print(record.line(rates))
    if args.out:
        found = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(found | {"ceilings": rates}, indent=2) + "\n")
    print(f"smoke: {len(made)} checks, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
