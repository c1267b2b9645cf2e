"""Feeds damaged and made-up files to every reader, and words to the command line, guided by the
lines that they reach: python -m build_tools.fuzz [--seconds N] [--seed N] [--only READER].

An input that reaches a new pair of lines is kept, and the next ones are changed from it. Findings:
an exception that is not one of the package's own, a message that does not name the file, more than
5 s of processor time, more than 2 GB of memory, a crash. A finding's input is kept under
build/fuzz/.
"""

import argparse
import json
import random
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .fuzz_changes import changed
from .fuzz_readers import READERS
from .toolchain import ROOT

RESULTS = ROOT / "bench" / "results" / "fuzz.json"
FOUND = ROOT / "build" / "fuzz"
LIMIT_S, MORE_BYTES = 5, 2 << 30
PACKAGE = str(ROOT / "fusedmlp")


class Hang(BaseException):
    """No `except Exception` of a reader takes it for a damaged file."""


def _hang(*_):
    raise Hang(f"more than {LIMIT_S} s of processor time")


class Reached:
    """Pairs of lines of the package that ran one after the other."""

    def __init__(self):
        self.pairs: set[tuple] = set()
        self.new = False

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        last = [0]
        code = frame.f_code

        def line(frame, event, _):
            pair = (code, last[0], frame.f_lineno)
            last[0] = frame.f_lineno
            if pair not in self.pairs:
                self.pairs.add(pair)
                self.new = True
            return line

        return line


@dataclass
class Tally:
    reader: str
    examples: int = 0
    accepted: int = 0  # read without an error
    kept: int = 0  # inputs that reached something new
    pairs: int = 0
    findings: dict[str, str] = field(default_factory=dict)  # what: file of its input


def _where(error: BaseException) -> str:
    """The last line of the package that an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if f.filename.startswith(PACKAGE)] or frames[-1:]
    return f"{Path(inside[-1].filename).relative_to(ROOT.anchor).name}:{inside[-1].lineno}"


def tried(reader, folder: Path, content: bytes) -> tuple[bool, str | None]:
    """(whether it was read, what is wrong with how it was taken)"""
    from fusedmlp.backends.registry import BackendError
    from fusedmlp.train.errors import TrainError, UsageError

    path = reader.write(folder, content)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = reader.read(path)
    except (TrainError, UsageError, BackendError) as error:
        names = {str(path), path.name, path.parent.name}
        if reader.names_file and not any(name in str(error) for name in names):
            return False, f"{_where(error)}: the message names no file: {error}"
        if not str(error).isprintable():
            return False, f"{_where(error)}: a message that does not print in one line: {error}"
        return False, None
    except (Exception, Hang) as error:
        return False, f"{_where(error)}: {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return said is None, said


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> Tally:
    """One reader, in this process."""
    reader, pick, reached = READERS[name], random.Random(f"{seed} {name}"), Reached()
    signal.signal(signal.SIGPROF, _hang)
    pool = reader.seeds(folder)
    waiting = list(pool)
    # What a first call imports is neither measured nor limited.
    tried(reader, folder, pool[0])
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE_BYTES, resource.RLIM_INFINITY))
    tally, end = Tally(name), time.monotonic() + seconds
    while time.monotonic() < end:
        content = waiting.pop() if waiting else changed(pick, pick.choice(pool), pool, reader)
        reached.new = False
        sys.settrace(reached)
        try:
            was_read, wrong = tried(reader, folder, content)
        finally:
            sys.settrace(None)
        tally.examples += 1
        tally.accepted += was_read
        if reached.new and len(content) < 1 << 16:
            pool.append(content)
            tally.kept += 1
        if wrong:
            what = f"{name}: {wrong.splitlines()[0][:300]}"
            key = what.partition(": ")[2].partition(":")[0] + what.split(": ")[2][:40]
            if key not in {k[: len(key)] for k in tally.findings}:
                FOUND.mkdir(parents=True, exist_ok=True)
                kept = FOUND / f"{name.replace(' ', '_')}-{seed}-{len(tally.findings)}"
                kept.write_bytes(content)
                tally.findings[f"{key} {what}"] = str(kept.relative_to(ROOT))
    tally.pairs = len(reached.pairs)
    return tally


def in_processes(names: list[str], seconds: float, seed: int) -> Iterator[Tally]:
    """The readers in a process of their own; where that ends before it has told of all of
    them, the one it was at has a finding and another process takes the rest."""
    left = list(names)
    while left:
        with tempfile.TemporaryDirectory(prefix="fusedmlp-fuzz-") as folder:
            command = [sys.executable, "-m", "build_tools.fuzz", "--seconds", str(seconds)]
            command += ["--seed", str(seed), "--inside", folder]
            command += [word for name in left for word in ("--only", name)]
            options = dict(cwd=ROOT, capture_output=True, text=True)
            try:
                done = subprocess.run(command, timeout=900 + 3 * seconds, **options)
                end = f"ended with {done.returncode}: {done.stderr[-500:]}"
            except subprocess.TimeoutExpired:
                end = "did not end"
            told = Path(folder, "tallies.json")
            for tally in json.loads(told.read_text()) if told.exists() else []:
                left.remove(tally["reader"])
                yield Tally(**tally)
            if left:
                name = left.pop(0)
                kept = FOUND / f"{name.replace(' ', '_')}-{seed}-crash"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(folder, kept)
                where = str(kept.relative_to(ROOT))
                yield Tally(name, findings={f"{name}: the process {end}": where})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build_tools.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for all readers")
    parser.add_argument("--seed", type=int, default=0, help="0: from the clock; it is printed")
    parser.add_argument("--only", action="append", choices=READERS)
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = args.only or list(READERS)
    if args.inside:
        tallies = []
        for name in names:
            seconds = args.seconds / len(READERS)
            folder = args.inside / name.replace(" ", "-")
            folder.mkdir()
            tallies.append(vars(fuzz(name, seconds, args.seed, folder)))
            (args.inside / "tallies.json").write_text(json.dumps(tallies))
        return 0
    seed = args.seed or secrets.randbelow(2**31)
    print(f"fuzz: seed {seed}", flush=True)
    rows = []
    for tally in in_processes(names, args.seconds, seed):
        print(
            f"{tally.reader}: {tally.examples} examples, {tally.accepted} read, {tally.kept} kept "
            f"for new lines, {len(tally.findings)} findings",
            flush=True,
        )
        for what, file in tally.findings.items():
            print(f"  {what}\n    {file}")
        more = {
            "findings": list(tally.findings),
            "seed": seed,
            "seconds": args.seconds / len(names),
        }
        rows.append(vars(tally) | more)
    found = sum(len(row["findings"]) for row in rows)
    print(f"fuzz: seed {seed}: {sum(r['examples'] for r in rows)} examples, {found} findings")
    if args.out:
        from bench import record

        head = record.header("fuzz", "build_tools.fuzz", argv)
        record.write(args.out, head | {"rows": rows})
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
