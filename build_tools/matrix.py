"""The matrix of installs: which rows there are and why, and what is done in the environment of one.

Not the full product. Every value of every column occurs, and with it the pairs that fail first: the
oldest and the newest torch with the oldest and the newest Python; a library built under one torch
and Python and used under others, in both directions; a compiler, and none, with the source and with
the wheels; nvcc with a torch for CUDA and with one for CPUs.
"""

import json
import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

from build_tools.toolchain import ROOT

OLDEST, NEWEST, CPU = "2.11.0", "newest", "2.13.0"  # versions of torch; newest: of this environment
COMPILERS = {"gcc": "g++", "clang": "clang++"}
# The part of the suite that runs in each row: it needs nothing of the tree but itself.
TESTS = (
    "tests/spec/test_rng.py",
    "tests/backends/test_reference.py",
    "tests/nn/test_nn.py",
    "tests/train/test_native_step.py",
)
# What the installed package says of itself.
ASK = """
import json, platform, torch
from fusedmlp.backends import native
from fusedmlp import __version__
info = native.build_info() or {}
try:
    import triton
    triton = triton.__version__
except ImportError:
    triton = None
print(json.dumps({
    "version": __version__, "python": platform.python_version(), "torch": torch.__version__,
    "cuda": torch.version.cuda, "triton": triton, "compiler": info.get("compiler"),
    "built": info.get("built", []), "left_out": info.get("left_out", {}),
    "archs": info.get("archs"),
    "refused": native.unavailable("cpu") if "cpu" in info.get("built", []) else None,
}))
"""


@dataclass(frozen=True)
class Row:
    python: str
    torch: str
    source: str  # sdist; plain wheel, without libraries; wheel N, with those that row N has built
    compiler: str | None = None  # one of COMPILERS
    nvcc: bool = False
    triton: bool = True

    @property
    def builder(self):
        """The number of the row whose wheel this row takes, or None."""
        return int(self.source.split()[1]) if self.source.startswith("wheel ") else None

    def wanted(self, has_cuda, lines):
        """The parts of the extension that this row must have, given the results of others."""
        if self.builder:
            return next(line["built"] for line in lines if line["row"] == self.builder)
        if self.source != "sdist" or self.compiler is None:
            return []
        return ["cpu", "cuda"] if self.nvcc and has_cuda else ["cpu"]


ROWS = (
    Row("3.11", OLDEST, "sdist", "gcc"),
    Row("3.11", NEWEST, "sdist", "gcc", nvcc=True),
    Row("3.13", NEWEST, "sdist", "gcc"),
    Row("3.12", NEWEST, "sdist", "clang"),
    Row("3.11", CPU, "sdist", "clang", nvcc=True, triton=False),
    Row("3.11", CPU, "sdist"),
    Row("3.12", NEWEST, "wheel 1"),
    Row("3.13", OLDEST, "wheel 2", triton=False),
    Row("3.11", OLDEST, "wheel 2", "gcc"),
    Row("3.13", NEWEST, "plain wheel"),
    Row("3.11", CPU, "plain wheel", triton=False),
)


class Failed(Exception):
    """A step of a row that did not do what it must, in one line."""


def requirements(has_triton):
    """What a row is given before the package: all that an index has and that needs no building."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    needed = [name for name in needed if not name.startswith(("torch>", "triton"))]
    tools = ["pip", "setuptools", "ninja", "pytest", "hypothesis", "pyarrow"]
    return [*needed, *tools, *(["triton"] if has_triton else [])]


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [
        line for line in lines if re.match(r"(fusedmlp: |\w*error|\w+Error|FAILED)", line, re.I)
    ]
    return (wrong or lines or ["nothing was said"])[-1][:300]


def verified(text):
    """How many cases `fusedmlp verify` counts in its last line."""
    found = re.search(r"^all right: (\d+) cases in ", text, re.M)
    if not found:
        raise Failed(f"fusedmlp verify: {last_line(text)}")
    return int(found[1])


class Environment:
    """A fresh environment in `folder`, in which only the compilers of the row are found."""

    def __init__(self, row, folder, tools, torch):
        """tools  name -> path of what may be linked in: uv, the compilers, as, ld, nvcc's folder"""
        self.row, self.folder, self.tools = row, folder, tools
        self.python = folder / "env" / "bin" / "python"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "bin").mkdir(parents=True)
        self.variables = {k: v for k, v in os.environ.items() if not self.is_of_the_caller(k)}
        # Threads that wait for each other take many times as long beside busy processes.
        self.variables.setdefault("OMP_NUM_THREADS", "1")
        self.variables["PATH"] = f"{self.python.parent}:{folder / 'bin'}"
        if row.compiler:
            for name in (COMPILERS[row.compiler], "as", "ld"):
                (folder / "bin" / name).symlink_to(tools[name])
        if row.nvcc:
            self.variables["CUDA_HOME"] = str(tools["cuda"])
        self.uv("venv", "--no-project", "--python", row.python, folder / "env")
        self.uv(
            "pip", "install", "--python", self.python, f"torch=={torch}", *requirements(row.triton)
        )
        if not row.triton:
            self.uv("pip", "uninstall", "--python", self.python, "triton")

    @staticmethod
    def is_of_the_caller(name):
        others = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "PATH", "VIRTUAL_ENV")
        return name.startswith(("FUSEDMLP_", "PYTHON", "TRITON_")) or name in others

    def run(self, *command, environ=None, limit=3600):
        """What the command printed; Failed with its last line where it fails."""
        words = [str(word) for word in command]
        try:
            run = subprocess.run(
                words,
                cwd=self.folder,
                env=environ or self.variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failed(f"{Path(words[0]).name} {words[1]}: {error}") from None
        with (self.folder / "log.txt").open("a") as log:
            log.write(f"$ {' '.join(words)}\n{run.stdout}\n")
        if run.returncode:
            raise Failed(f"{Path(words[0]).name} {' '.join(words[1:4])}: {last_line(run.stdout)}")
        return run.stdout

    def uv(self, *command):
        return self.run(self.tools["uv"], *command, environ=os.environ)

    def pip(self, *command):
        quiet = ("--disable-pip-version-check", "--progress-bar", "off")
        return self.run(self.python, "-m", "pip", *command, *quiet)

    def install(self, file):
        """The package with its extra, as the README says; where triton must not be there, nothing
        that it depends on is looked at."""
        no_deps = [] if self.row.triton else ["--no-deps"]
        self.pip("install", "--no-build-isolation", *no_deps, f"{file}[train]")

    def wheel(self, sdist, folder):
        """Builds the wheel of this environment."""
        self.pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, sdist)
        return next(folder.glob("*.whl"))

    def ask(self):
        return json.loads(self.run(self.python, "-c", ASK).splitlines()[-1])

    def passes(self, sdist):
        """What was run and what it said; Failed at the first that does not do what it must."""
        command = self.python.with_name("fusedmlp")
        if "fusedmlp" not in self.run(command, "info"):
            raise Failed("fusedmlp info printed no report")
        cases = verified(self.run(command, "verify"))
        self.run(command, "train", "--dataset", "digits", "--epochs", "1", "--out", "run")
        summary = json.loads((self.folder / "run" / "summary.json").read_text())
        shutil.unpack_archive(sdist, self.folder / "tree", filter="data")
        tree = next((self.folder / "tree").iterdir())
        for name in ("tests", "pyproject.toml"):
            shutil.move(tree / name, self.folder / name)
        said = self.run(self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS)
        closing = said.splitlines()[-1]
        tests = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|skipped)", closing)}
        return {"verified": cases, "engine": summary["engine"], "tests": tests}
