"""`fusedmlp tune`: measures on this machine which way of running a network is the fastest, and
keeps it for all later runs.

Takes sizes from arguments, shows progress and prints a line for each result.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator

import torch

from ..backends import measured, registry
from ..spec import activations, dtypes
from ..tuning import classes, measure
from ..tuning.work import Work

_DTYPES = {dtypes.SHORT[d]: d for d in dtypes.KERNEL}
_EPILOG = """examples:
  fusedmlp tune --net 784-256-10 --rows 256 --dropout
  fusedmlp tune 256x784x256 256x256x10 --dtype bf16 --dtype fp32
  fusedmlp tune                                 on a CPU: networks of all sizes, drawn at random

Each way is checked against plain PyTorch on this device before it is timed, in the whole forward
and backward with host time, and is never chosen where it is wrong. On a GPU the tiles of Triton's
kernels are timed as well. FUSEDMLP_AUTOTUNE=0 ignores what was measured here."""
_NETWORKS, _NETWORK_SECONDS = 2000, 0.06


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
        description="Measure which way of running networks of given sizes is the fastest on this "
        "device, and keep it for all later runs.",
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
    parser.add_argument("--act", choices=activations.NAMES, default="relu", help="of --net (relu)")
    parser.add_argument("--dropout", action="store_true", help="also with dropout")
    parser.add_argument("--dtype", action="append", choices=_DTYPES, help="may be repeated (fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--gpu", type=int, default=0, help="number of the GPU (0)")
    parser.add_argument("--networks", type=int, help=f"how many are drawn at random ({_NETWORKS})")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (0)")
    parser.add_argument("--missing", action="store_true", help="only sizes that are not kept yet")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """(after each part, to say a line): a bar on a terminal where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield (lambda line: None), (lambda line: print(line, flush=True))
        return
    console = Console(highlight=False, soft_wrap=True)
    columns = TextColumn("measured"), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        task = p.add_task("", total=total)
        yield (lambda line: p.advance(task)), (lambda line: p.console.print(line, markup=False))


def _works(args: argparse.Namespace, device: str) -> list[Work]:
    """The works that the arguments ask for: forward and backward, and forward alone."""
    nets = [(m, [k, n]) for m, k, n in args.layers]
    nets += [(args.rows, list(args.net))] if args.net else []
    found = []
    for rows, widths in nets:
        for dtype in dict.fromkeys(args.dtype or ["fp32"]):
            for drops, gradients in ((False, True), (False, False), (True, True)):
                if args.dropout or not drops:
                    what = {"device": device, "dtype": dtype}
                    found.append(classes.work_of(rows, widths, args.act, drops, gradients, **what))
    return list(dict.fromkeys(found))


def _jobs(works: list[Work]) -> list:
    """The tiles of Triton's kernels to be timed for works on a GPU."""
    if not works or registry._BY_NAME["triton"].unavailable("cuda") is not None:
        return []
    from ..backends.triton import autotune

    shapes: dict = {}
    for work in works:
        k = work.in_features
        for _, _, n in work.layers:
            shapes.setdefault(work.torch_dtype, {})[work.rows, k, n] = None
            k = n
    gpu = torch.cuda.current_device()
    return [job for d, sizes in shapes.items() for job in autotune.jobs(sizes, [d], gpu)]


def _tune_tiles(job, tick: Callable[[str], None], say: Callable[[str], None]) -> bool:
    name = f"{job.op} {dtypes.SHORT[job.dtype]} {job.m} x {job.k} -> {job.n}"
    tuned = job.tune(tick)
    if tuned is None:
        say(f"{name}: no tile ran")
        return False
    best, times = tuned
    shape = "x".join(map(str, best[:3]))
    say(
        f"{name}: {shape}, {best.warps} warps, {best.stages} stages, "
        f"{1e3 * times[best]:.1f} us, of {len(times)} tiles"
    )
    return True


def _measure(works: list[Work], tick, say) -> int:
    """Measure works and keep the rows; how many candidates were wrong."""
    wrong = 0
    for work, result in measure.measure(works):
        measure.keep(work, result)
        tick("")
        say(measure.summary(work, result))
        for line in measure.bugs(work, result):
            say(line)
            wrong += 1
    return wrong


def _measure_classes(count: int, seed: int) -> int:
    """Measure networks drawn at random and keep what they say of their classes; Ctrl-C keeps what
    there is. How many candidates were wrong."""
    works, found, reported = list(classes.random_works(count, seed)), [], set()
    with _progress(len(works)) as (tick, say):
        say(f"{len(works)} calls of networks drawn at random, seed {seed}; Ctrl-C ends it early")
        try:
            for work, result in measure.measure(works, _NETWORK_SECONDS):
                found.append((work, result))
                tick("")
                for name, line in zip(result["wrong"], measure.bugs(work, result), strict=True):
                    if name not in reported:
                        say(line)
                        reported.add(name)
        except KeyboardInterrupt:
            say(f"ended after {len(found)} of {len(works)} calls")
    rows = classes.rows_of(found)
    for row in rows.values():
        row["ratios"] = {n: pair for n, pair in row["ratios"].items() if n not in reported}
    measured.keep_all("cpu", "classes", rows)
    print("\n".join(classes.summary(rows)))
    return len(reported)


def command(argv: list[str]) -> int:
    """`fusedmlp tune`: 0 when all is measured, 1 when something was wrong or did not run.

    raises   BackendError where plain PyTorch cannot be measured, or nothing kept; SystemExit(2)
             for wrong arguments
    """
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("rows", "networks"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise registry.BackendError("tune: --device cuda: no GPU is available to torch")
    device = "cuda" if has_gpu and args.device != "cpu" else "cpu"
    if device == "cuda":
        if not 0 <= args.gpu < torch.cuda.device_count():
            parser.error(f"--gpu must be below {torch.cuda.device_count()}, got {args.gpu}")
        torch.cuda.set_device(args.gpu)
    works = _works(args, device)
    if args.networks and (works or device == "cuda"):
        parser.error("--networks is for a CPU, without sizes")
    if not works and device == "cuda":
        parser.error("give layers (256x784x256) or a network (--net 784-256-10)")
    torch.manual_seed(args.seed)
    try:
        if not works:
            failed = _measure_classes(args.networks or _NETWORKS, args.seed)
        else:
            failed = _measure_sizes(works, args.missing, device)
    except OSError as error:
        raise registry.BackendError(f"tune: {error}") from error
    print(f"kept in {measured.path()}")
    if failed:
        print(f"fusedmlp: tune: {failed} failed, as said above", file=sys.stderr)
    return 1 if failed else 0


def _measure_sizes(works: list[Work], missing: bool, device: str) -> int:
    """Tiles first, as Triton's candidates are timed with the best; how much went wrong."""
    jobs = _jobs(works) if device == "cuda" else []
    if missing:
        jobs = [job for job in jobs if not job.is_kept()]
        works = [work for work in works if not measure.is_kept(work)]
    total = len(works) + sum(len(job.candidates()) for job in jobs)
    with _progress(total) as (tick, say):
        failed = sum(not _tune_tiles(job, tick, say) for job in jobs)
        return failed + _measure(works, tick, say)
