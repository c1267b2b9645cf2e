"""`fusedmlp tune`: times the tiles of the Triton kernels on this machine's GPU, ahead of use.

Takes sizes from arguments, shows progress and prints a line for each result.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator

import torch

from ..backends import registry
from ..spec import dtypes

_DTYPES = {dtypes.SHORT[d]: d for d in dtypes.KERNEL}
_EPILOG = """examples:
  fusedmlp tune 256x784x256 256x256x10
  fusedmlp tune --net 784-256-10 --rows 256 --dtype bf16 --dtype fp32

Without tuning a tile comes from a model of the device; FUSEDMLP_AUTOTUNE=0 ignores what was
tuned."""


def _sizes(text: str, between: str, least: int) -> tuple[int, ...]:
    parts = text.split(between)
    if len(parts) < least or not all(re.fullmatch(r"[1-9]\d*", part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"must be sizes from 1 on with {between!r} between them, got {text!r}"
        )
    return tuple(int(part) for part in parts)


def _layer(text: str) -> tuple[int, ...]:
    sizes = _sizes(text.lower(), "x", 3)
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"must be MxKxN, got {text!r}")
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedmlp tune",
        description="Time the tiles of the Triton kernels for layers of given sizes, and keep the "
        "fastest for all later runs on this kind of GPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "layers", nargs="*", type=_layer, metavar="MxKxN", help="rows x inputs x outputs of a layer"
    )
    parser.add_argument(
        "--net", type=lambda t: _sizes(t, "-", 2), metavar="K-N-...", help="widths of a network"
    )
    parser.add_argument("--rows", type=int, default=256, help="batch size of --net (256)")
    parser.add_argument("--dtype", action="append", choices=_DTYPES, help="may be repeated (bf16)")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (0)")
    parser.add_argument("--missing", action="store_true", help="only sizes without a kept tile")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """(after each tile, to say a line): a bar on a terminal where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield (lambda line: None), (lambda line: print(line, flush=True))
        return
    console = Console(highlight=False, soft_wrap=True)
    columns = TextColumn("tiles"), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        task = p.add_task("", total=total)
        yield (lambda line: p.advance(task)), (lambda line: p.console.print(line, markup=False))


def command(argv: list[str]) -> int:
    """`fusedmlp tune`: 0 when each size has its tile, 1 when none of one's tiles ran.

    raises   BackendError where Triton kernels cannot run; SystemExit(2) for wrong arguments
    """
    parser = _parser()
    args = parser.parse_args(argv)
    shapes = list(args.layers)
    if args.rows < 1:
        parser.error(f"--rows must be at least 1, got {args.rows}")
    if args.net:
        shapes += [(args.rows, k, n) for k, n in zip(args.net, args.net[1:], strict=False)]
    if not shapes:
        parser.error("give layers (256x784x256) or a network (--net 784-256-10)")
    wanted = [_DTYPES[name] for name in dict.fromkeys(args.dtype or ["bf16"])]
    reason = registry._BY_NAME["triton"].unavailable("cuda")
    if reason is not None:
        raise registry.BackendError(f"tune: there is nothing to tune here: {reason}")
    if not 0 <= args.device < torch.cuda.device_count():
        parser.error(f"--device must be below {torch.cuda.device_count()}, got {args.device}")
    from ..backends.triton import autotune, tile_cache

    jobs = autotune.jobs(shapes, wanted, args.device)
    if args.missing:
        jobs = [job for job in jobs if not job.is_kept()]
    failed = 0
    with _progress(sum(len(job.candidates()) for job in jobs)) as (tick, say):
        for job in jobs:
            name = f"{job.op} {dtypes.SHORT[job.dtype]} {job.m} x {job.k} -> {job.n}"
            tuned = job.tune(tick)
            if tuned is None:
                failed += 1
                say(f"{name}: no tile ran")
                continue
            best, times = tuned
            shape = "x".join(map(str, best[:3]))
            say(
                f"{name}: {shape}, {best.warps} warps, {best.stages} stages, "
                f"{1e3 * times[best]:.1f} us, of {len(times)} tiles"
            )
        say(f"kept in {tile_cache.path()}")
    if failed:
        print(f"fusedmlp: tune: {failed} of {len(jobs)} sizes have no tile", file=sys.stderr)
    return 1 if failed else 0
