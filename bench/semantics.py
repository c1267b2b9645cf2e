"""`make semantics`: runs on the CPU what Triton's compiler makes of the kernels for sm_90.

The package ttsem executes the compiler's intermediate code and checks each access against the
tensor it is of, programs against one another, and operations that have no defined result. Pieces
are of three kinds: GPU tests of the Triton kernels; one launch at every stage of the compiler down
to the conversion to LLVM; faults put into a copy of the kernels, which the same tests must find.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_tools import environment

from . import record

PYTHON = "3.12"
PINS = {"torch": "2.14.0", "triton": "3.8.0", "ttsem": "0.1.0"}
_TESTS_NEED = ("pytest", "hypothesis", "safetensors", "matplotlib")
RESULTS = record.ROOT / "bench" / "results" / "semantics.json"
KERNELS = "fusedmlp/backends/triton"
_CHOOSE_TILES = ("autotune.py", "tile_cache.py")  # among those that any call may take

# What the pretended device cannot do: how the test begins -> why it is left out.
LEFT_OUT = {
    "tests/autograd/test_mlp_op.py::test_schemas_and_fakes": "opcheck calls ops that are replaced",
    "tests/autograd/test_cross_entropy.py::test_schema_and_fake": (
        "opcheck calls ops that are replaced"
    ),
    "tests/autograd/test_cross_entropy.py::test_under_autocast": (
        "autocast for a GPU leaves it alone"
    ),
    "tests/train/test_graph_triton.py::test_bf16": "autocast for a GPU leaves it alone",
    "tests/train/test_graph_triton.py::test_the_launches_of": (
        "it fills new memory, which is counted"
    ),
    "tests/train/test_graph_triton.py::test_settings_take_few": (
        "it fills new memory, which is counted"
    ),
}


@dataclass(frozen=True)
class Piece:
    """One process: tests that pytest's -k chooses, or a launch at every stage of the compiler."""

    case: str
    tests: str = ""
    fault: tuple[str, ...] = ()  # file, text that it holds once, what replaces it, what is said
    files: tuple[str, ...] = ("tests/backends/test_triton.py",)

    @property
    def kind(self) -> str:
        return "planted fault" if self.fault else "tests" if self.tests else "stages"

    def code(self, sources: str) -> str:
        """A hash of what decides the machine code, and of what is done with it."""
        parts = [sources, sorted(PINS.items()), self]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


_LOSS, _SPLIT = "its_gradient and 67-10-fp32-0.0", "every_kind_of_tile and 16x16x16-split-fp32"
_UNMASKED = "cross_entropy.py", "row, loss, mask=inside_m", "row, loss", "past the end"
_RAGGED = "gemm.py", "inner < end_k - k", "inner < BLOCK_K", "past the end"
_TWICE = "linear_act.py", "(split.to(tl.int64) * M + rows)", "rows", "program instances"
_SINGLE = "(bias_act_dropout or dropout- or dropout_alone)"
PIECES = (
    Piece("linear_act", "linear_act and not dgrad"),
    Piece("tiles and corners", f"not linear_act and not dgrad and not cross and not {_SINGLE}"),
    Piece("dgrad_act", "dgrad"),
    Piece("bias_act_dropout", f"{_SINGLE} and not linear_act and not dgrad"),
    Piece("cross_entropy", "cross"),
    Piece("cross_entropy op", "triton", files=("tests/autograd/test_cross_entropy.py",)),
    Piece("mlp", "triton", files=("tests/autograd/test_mlp_op.py",)),
    Piece("whole step", "cuda", files=("tests/train/test_graph_triton.py",)),
    Piece("linear_act at every stage"),
    Piece("dgrad_act at every stage"),
    Piece("descriptors at every stage"),
    Piece("a store without its mask", _LOSS, _UNMASKED),
    Piece("no mask at the end of K", _SPLIT, _RAGGED),
    Piece("two programs write the same elements", _SPLIT, _TWICE),
)


def sources_hash(folder: Path = record.ROOT / KERNELS) -> str:
    """Of the kernels and what launches them, without comments and layout, whatever the Python."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.glob("*.py") if p.name not in _CHOOSE_TILES):
        found.update(ast.unparse(ast.parse(path.read_text())).encode())
    return found.hexdigest()


def release_of(python: str | Path) -> str:
    """As '3.12'; '' where it does not start."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def find_python() -> str:
    """A Python of the release that ttsem needs, on PATH or of pyenv."""
    folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for python in (f"python{PYTHON}", *folder.glob(f"{PYTHON}.*/bin/python")):
        if release_of(python) == PYTHON:
            return str(python)
    environment.stop(f"install Python {PYTHON} for ttsem: none is on PATH or in {folder}")


def prepare(venv: Path) -> tuple[Path, dict[str, str]]:
    """The environment's Python and its releases; makes it, and installs what is missing."""
    python = venv / "bin" / "python"
    again = "give --venv another folder, or remove this one, which is then made anew"
    if not python.exists():
        made_with = find_python()
        environment.check_space(venv.parent)
        print(f"semantics: making {venv} (about 5 GB)", flush=True)
        if subprocess.run([made_with, "-m", "venv", str(venv)]).returncode:
            environment.stop(f"the environment {venv} could not be made (see above)")
    if (release := release_of(python) or "that does not start") != PYTHON:
        environment.stop(f"{python} is Python {release}, {PYTHON} is needed; {again}")
    found = environment.packages(python)
    missing = [f"{name}=={pin}" for name, pin in PINS.items() if name not in found]
    if missing := missing + [name for name in _TESTS_NEED if name not in found]:
        environment.pip_install(python, *missing)
        found = environment.packages(python)
    for name, pin in PINS.items():
        if found[name].split("+")[0] != pin:
            environment.stop(f"{venv} has {name} {found[name]}, {pin} is needed; {again}")
    return python, {"python": PYTHON, **{name: found[name] for name in PINS}}


def plant(fault: tuple[str, ...], folder: Path) -> None:
    """Copies what the tests need into the folder and puts the fault into the copy."""
    for name in ("fusedmlp", "tests", "bench", "build_tools"):
        shutil.copytree(record.ROOT / name, folder / name, ignore=shutil.ignore_patterns("results"))
    shutil.copy(record.ROOT / "pyproject.toml", folder)
    name, text, instead, _ = fault
    path = folder / KERNELS / name
    if (count := path.read_text().count(text)) != 1:
        raise ValueError(f"a fault needs {text!r} once in {name}, which holds it {count} times")
    path.write_text(path.read_text().replace(text, instead))


def run(piece: Piece, python: Path) -> dict[str, Any]:
    """Runs a piece; its row of the results file."""
    row = {"case": piece.case, "kind": piece.kind, "code": piece.code(sources_hash())}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        out, root = Path(scratch, "out.json"), record.ROOT
        if piece.fault:
            plant(piece.fault, root := Path(scratch))
        if piece.tests:
            command = ["ttsem.sanitize", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider"]
            command += ["-p", "bench.semantics", "-m", "gpu", *piece.files, "-k", piece.tests]
            command += [f"--deselect={test}" for test in LEFT_OUT]
        else:
            program = Path(scratch, "program.py")
            program.write_text(f"import bench.semantics as s\ndef main(): s.launch({piece.case!r})")
            command = ["ttsem.validate", str(program), "--json", str(out)]
        environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environ |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "SEMANTICS_OUT": str(out)}
        environ["TRITON_CACHE_DIR"] = str(python.parents[1] / "triton-cache")
        options = dict(cwd=root, env=environ, capture_output=True, text=True, timeout=3600)
        try:
            done = subprocess.run([str(python), "-m", *command], **options)
            row |= _READ[piece.kind](json.loads(out.read_text()), piece, done.stdout)
        except subprocess.TimeoutExpired as late:
            row["wrong"] = f"not done after {late.timeout} s"
        except FileNotFoundError:  # it ended before it wrote what it found
            row["wrong"] = f"exit status {done.returncode}: {(done.stdout + done.stderr)[-500:]}"
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def _of_tests(found: dict, piece: Piece, said: str) -> dict[str, Any]:
    failed, unchecked = found["failed"], re.search(r"ttsem: (\d+) launch", said)
    wrong = f"{len(failed)} failed, first {failed[0]}" if failed else ""
    return found | {
        "failed": len(failed),
        "races_unchecked": int(unchecked[1]) if unchecked else 0,
        "wrong": wrong or ("" if found["passed"] and found["kernels"] else "no kernel was run"),
    }


def _of_stages(found: dict, piece: Piece, said: str) -> dict[str, Any]:
    (launched,) = found["launches"]
    stages = Counter(stage["verdict"] for stage in launched["passes"])
    # The last stage is in LLVM's terms, which ttsem does not execute.
    ran = stages["match"] + stages["approx"]
    right = ran > 1 and ran + 1 >= stages.total()
    wrong = "" if right else f"{dict(stages)}, differs before {launched['first_bad_pass']}"
    return {"kernels": {launched["fn_name"]: 1}, "stages": dict(stages), "wrong": wrong}


def _of_fault(found: dict, piece: Piece, said: str) -> dict[str, Any]:
    texts = [t for t in found["failed"] if "KernelFault" in t and piece.fault[3] in t]
    return {"found": "".join(texts[:1]), "wrong": "" if texts else "the fault was not found"}


_READ = {"tests": _of_tests, "stages": _of_stages, "planted fault": _of_fault}


def launch(case: str) -> None:
    """One launch on small whole numbers: no order of summation changes their products."""
    import torch

    from fusedmlp.backends.triton import linear_act, tiles
    from fusedmlp.backends.triton.dgrad_act import dgrad_act
    from fusedmlp.spec import activations, philox
    from fusedmlp.spec.layers import Epilogue

    torch.manual_seed(0)
    tile, act, p, m, n, k = tiles.Tile(64, 32, 32, 4, 3), "gelu", 0.3, 64, 64, 96
    if "descriptors" in case:
        tile, act, p, m, n, k = tiles.Tile(128, 128, 64, 8, 4, True), "relu", 0.0, 128, 128, 384
    x, w, b, saved = (torch.randint(-2, 3, s).half() for s in ((m, k), (n, k), (n,), (m, n)))
    state, drop = torch.tensor([7, 1]), (*philox.threshold_and_scale(p), 3, 11)
    e = Epilogue(b, None, state, activations.IDS[act], 0.01, *drop)
    if "dgrad_act" in case:
        dgrad_act(x, w.t(), saved, e, 2, True, False, tile=tile)
    else:
        linear_act.run(x, w, e, keep_preact=True, tile=tile)


# From here on a plugin of pytest, which counts what ran.
_seen: dict[str, Any] = {"passed": 0, "failed": [], "kernels": Counter()}


def pytest_configure() -> None:
    from torch.optim import Optimizer
    from triton.runtime.jit import JITFunction

    from fusedmlp import functional
    from fusedmlp.autograd import cross_entropy
    from fusedmlp.train.engines.graph import Graph

    executed = JITFunction.run

    def counted(self, *args, **options):
        _seen["kernels"][self.__name__] += 1
        return executed(self, *args, **options)

    JITFunction.run = counted
    # ttsem's device is a mode of torch's functions. One that hands itself to the mode, as these do
    # for tensors with a __torch_function__, would run without it, on tensors of a CPU.
    for module in functional, cross_entropy:
        module.has_torch_function_variadic = lambda *tensors: False
    # The pretended device captures no CUDA graph: the calls of a step run one by one.
    Optimizer._accelerator_graph_capture_health_check = lambda self: None
    Graph.captures = property(lambda engine: False, lambda engine, value: None)


def pytest_runtest_logreport(report: Any) -> None:
    _seen["passed"] += report.passed and getattr(report, "when", "") == "call"
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = " ".join(str(crash.message if crash else report.longrepr).split())
        _seen["failed"].append(f"{report.nodeid}: {text[:400]}")


pytest_collectreport = pytest_runtest_logreport  # a file that cannot be read is a failure too


def pytest_sessionfinish() -> None:
    Path(os.environ["SEMANTICS_OUT"]).write_text(json.dumps(_seen))


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run about the present kernels that were right."""
    sources = sources_hash()
    codes = {piece.case: piece.code(sources) for piece in PIECES}
    rows = record.kept(path, lambda r: r["code"] == codes.get(r["case"]) and not r["wrong"])
    return {row["case"]: row for row in rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.semantics", description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=record.ROOT / ".venv-semantics")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file (JSON)")
    parser.add_argument("--only", action="append", choices=[p.case for p in PIECES])
    args = parser.parse_args(argv)
    python, versions = prepare(args.venv.absolute())
    head = record.header("semantics", "bench.semantics", argv)
    head["versions"] |= versions | {"cuda": None}
    found = kept(args.out)
    for piece in PIECES:
        if piece.case in (args.only or [p.case for p in PIECES if p.case not in found]):
            found[piece.case] = run(piece, python)
            print(record.line(found[piece.case], ("case", "seconds", "wrong")), flush=True)
            rows = [found[p.case] for p in PIECES if p.case in found]
            record.write(args.out, head | {"left": len(PIECES) - len(rows), "rows": rows})
    wrong = [row["case"] for row in found.values() if row["wrong"]]
    print(f"{len(found)} of {len(PIECES)} pieces are in {args.out}, {len(wrong)} wrong")
    return 1 if wrong or len(found) < len(PIECES) else 0


if __name__ == "__main__":
    sys.exit(main())
