"""Runs the tests of the kernels that need no GPU, and counts what each kernel did in them.

    python -m bench.evidence                    what bench/results/evidence.json lacks
    python -m bench.evidence --only PTX

The Triton kernels run in Triton's interpreter, the CUDA kernels as nvcc's PTX on the machine of
tests/ptx. A row says of a kernel in how many tests and launches it was right there. The results of
`make kernels` and `make semantics` say the rest of what docs/kernels.md has under Evidence.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from . import cuda_kernels, record

RESULTS = record.ROOT / "bench" / "results" / "evidence.json"
# The tests, with pytest's own arguments.
SUITES = {
    "interpreter": ("-m", "not gpu", "tests/backends/test_triton.py"),
    "PTX": ("tests/backends/test_cuda_kernels.py", "tests/backends/test_cuda_sweep.py"),
}


def code(suite: str) -> str:
    """A hash of the kernels of a suite, as they stand in this checkout."""
    if suite == "PTX":
        return cuda_kernels.sources_hash()
    from . import triton_build

    return triton_build.kernels_hash()[:16]


def run(suite: str) -> list[dict[str, Any]]:
    """The rows of a suite; raises RuntimeError where a test failed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "bench.evidence"]
        options = dict(cwd=record.ROOT, capture_output=True, text=True)
        environ = os.environ | {"EVIDENCE_OUT": str(out)}
        done = subprocess.run([*command, *SUITES[suite]], env=environ, **options)
        if done.returncode or not out.exists():
            raise RuntimeError(f"{suite}: {done.stdout[-2000:]}{done.stderr[-1000:]}")
        found = json.loads(out.read_text())
    more = {"suite": suite, "code": code(suite), "seconds": round(time.perf_counter() - start)}
    return [row | more for row in found]


# From here to main a plugin of pytest, which counts.
_launches: Counter[tuple[str, str]] = Counter()
_tests: Counter[tuple[str, str]] = Counter()
_in_this_test: set[tuple[str, str]] = set()


def _count(where: str, kernel: str) -> None:
    _launches[where, kernel] += 1
    _in_this_test.add((where, kernel))


def pytest_configure() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    from tests.ptx import launchers, machine

    interpreted, launched = InterpretedFunction.run, machine.Machine.launch

    def run_interpreted(self, *args, **options):
        _count("interpreter", self.__name__)
        return interpreted(self, *args, **options)

    def launch(self, name, *args):
        _count(f"sm_{launchers.Chosen.arch}", cuda_kernels.named(name)[0])
        return launched(self, name, *args)

    InterpretedFunction.run, machine.Machine.launch = run_interpreted, launch


def pytest_runtest_logstart() -> None:
    _in_this_test.clear()


def pytest_runtest_logreport(report: Any) -> None:
    if report.passed and report.when == "call":
        _tests.update(_in_this_test)


def pytest_sessionfinish() -> None:
    rows = [
        {"where": where, "kernel": kernel, "tests": _tests[where, kernel], "launches": count}
        for (where, kernel), count in sorted(_launches.items())
    ]
    Path(os.environ["EVIDENCE_OUT"]).write_text(json.dumps(rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file (JSON)")
    parser.add_argument("--only", action="append", choices=SUITES, help="again, if it is there")
    args = parser.parse_args(argv)
    codes = {suite: code(suite) for suite in SUITES}
    rows = record.kept(args.out, lambda row: row["code"] == codes.get(row["suite"]))
    head = record.header("evidence", "bench.evidence", argv)
    for suite in args.only or [s for s in SUITES if s not in {row["suite"] for row in rows}]:
        try:
            made = run(suite)
        except RuntimeError as error:
            print(f"evidence: {error}", file=sys.stderr)
            return 1
        rows = sorted([r for r in rows if r["suite"] != suite] + made, key=lambda r: r["suite"])
        record.write(args.out, head | {"rows": rows})
        for row in made:
            print(record.line(row, ("where", "kernel", "tests", "launches", "seconds")))
    print(f"evidence: {len(rows)} rows in {args.out.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
