"""Builds what is released, looks into it, and installs it in fresh environments: `make release`.

    python -m build_tools.release                  # sdist, wheels and every row of matrix.py
    python -m build_tools.release --rows 3 4       # these rows again, with the wheels of before
    python -m build_tools.release --list           # the rows, and why these

Everything is made from the commit, in --work, and nothing is uploaded. A row is an environment with
one Python, one torch and the compilers that it names: the package is installed as the README says,
then `fusedmlp info`, `fusedmlp verify`, one epoch of `fusedmlp train` and a part of the tests run
there. Results go to bench/results/installs.json, from which bench.report makes the table of
docs/releases.md. An environment is deleted after its row; those that passed leave no log.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

from bench import record
from build_tools import matrix
from build_tools.matrix import Failed
from build_tools.toolchain import ROOT

COLUMNS = (
    "row", "python", "torch", "source", "compiler", "nvcc", "triton", "cpu", "cuda", "verified",
    "tests", "seconds", "result",
)  # fmt: skip
LEFT_OUT = {".gitignore", ".pre-commit-config.yaml"}  # of use only in a checkout
MADE = ("PKG-INFO", "setup.cfg", "fusedmlp.egg-info/")


def say(text):
    print(f"release: {text}", flush=True)


def source_of_commit(folder):
    """The files of HEAD in a folder of their own, so that nothing else of this tree gets in."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "status", "--porcelain"], capture_output=True).stdout:
        say("there are changes that no commit holds; the commit is built, without them")
    archive = subprocess.run([*git, "archive", "HEAD"], capture_output=True)
    if archive.returncode:
        raise Failed(f"git archive: {matrix.last_line(archive.stderr.decode())}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def build(source, dist):
    """The sdist, and the wheel that an isolated build makes of it: without torch, so no library."""
    shutil.rmtree(dist, ignore_errors=True)
    command = [sys.executable, "-m", "build", "--outdir", str(dist), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise Failed(f"python -m build: {matrix.last_line(run.stdout + run.stderr)}")
    return next(dist.glob("*.tar.gz")), next(dist.glob("*-any.whl"))


def differences(what, found, wanted):
    """Of the names in an archive and those that it must have."""
    lacks = [f"{what} lacks {name}" for name in sorted(wanted - found)]
    return lacks + [f"{what} must not have {name}" for name in sorted(found - wanted)]


def check_sdist(path, tracked):
    """What is wrong with it: it must hold the files of the commit and no other, so no data, no
    caches and nothing that was built."""
    with tarfile.open(path) as archive:
        files = (member.name for member in archive.getmembers() if member.isfile())
        names = {name.partition("/")[2] for name in files}
    return differences(path.name, {n for n in names if not n.startswith(MADE)}, tracked - LEFT_OUT)


def check_wheel(path, tracked, libraries=()):
    """What is wrong with it: it must hold the package, its licence and these libraries."""
    wanted = {name for name in tracked if name.startswith("fusedmlp/")}
    wanted |= {"fusedmlp/_build_info.json", *(f"fusedmlp/_native_{name}.so" for name in libraries)}
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    wrong = [] if any(n.endswith("/LICENSE") for n in names) else [f"{path.name} lacks LICENSE"]
    found = {n for n in names if ".dist-info/" not in n}
    return wrong + differences(path.name, found, wanted)


def find_tools(clang):
    """Name -> path of all that rows may use and that is here."""
    found = {name: shutil.which(name) for name in ("g++", "as", "ld")}
    found["clang++"] = clang or shutil.which("clang++")
    beside = Path(sys.executable).with_name("uv")
    found["uv"] = str(beside) if beside.exists() else shutil.which("uv")
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).parent.parent]
    is_toolkit = lambda home: (Path(home) / "include" / "cuda_runtime.h").exists()  # noqa: E731
    found["cuda"] = next((home for home in homes if home and is_toolkit(home)), None)
    return {name: path for name, path in found.items() if path}


def missing_for(row, tools):
    wanted = [matrix.COMPILERS[row.compiler], "as", "ld"] if row.compiler else []
    wanted += ["cuda"] if row.nvcc else []
    return [name for name in wanted if name not in tools]


class Release:
    """The archives, the folder that all is made in, and the rows so far."""

    def __init__(self, work, tools, results):
        self.work, self.tools, self.results = work, tools, results
        self.dist = work / "dist"
        self.tracked = source_of_commit(work / "source")

    def make_archives(self):
        """Builds and checks them; True where they are as they must be."""
        sdist, wheel = build(self.work / "source", self.dist)
        wrong = check_sdist(sdist, self.tracked) + check_wheel(wheel, self.tracked)
        for line in wrong:
            say(line)
        for path in (sdist, wheel):
            say(f"{path.name}, {path.stat().st_size / 1e6:.1f} MB")
        return not wrong

    def archive(self, source):
        pattern = {"sdist": "*.tar.gz", "plain wheel": "*-any.whl"}.get(source)
        found = list(self.dist.glob(pattern or f"{source.replace(' ', '-')}/*.whl"))
        if not found:
            raise Failed(f"there is no {source}: the row that builds it has not passed")
        return found[0]

    def run(self, number):
        """Adds the line of a row to the results."""
        row, start = matrix.ROWS[number - 1], time.monotonic()
        say(f"row {number} of {len(matrix.ROWS)}: Python {row.python}, torch {row.torch}")
        line = {"row": number, "python": row.python, "torch": row.torch, "source": row.source}
        line |= {"compiler": row.compiler or "none", "nvcc": row.nvcc, "triton": row.triton}
        line |= {"cpu": None, "cuda": None, "result": "passed"}
        folder = self.work / f"row-{number}"
        try:
            self.fill(line, row, number, folder)
        except Failed as reason:
            line["result"] = f"failed: {reason}"
        if line["result"] == "passed":
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder / "env", ignore_errors=True)
        line["seconds"] = round(time.monotonic() - start)
        self.results.add(line, columns=COLUMNS)

    def fill(self, line, row, number, folder):
        if missing := missing_for(row, self.tools):
            line["result"] = f"not run: no {', '.join(missing)} here"
            return
        torch = {matrix.NEWEST: record.versions()["torch"].partition("+")[0]}.get(
            row.torch, row.torch
        )
        try:
            environment = matrix.Environment(row, folder, self.tools, torch)
        except Failed as reason:
            line["result"] = f"not run: {reason}"
            return
        archive, sdist = self.archive(row.source), self.archive("sdist")
        if row.source == "sdist":
            archive = environment.wheel(archive, self.dist / f"wheel-{number}")
        environment.install(archive)
        found = environment.ask()
        parts = found["built"]
        line |= {name: found[name] for name in ("python", "torch", "triton", "archs")}
        line |= {"cpu": "cpu" in parts, "cuda": "cuda" in parts, "built": parts}
        line |= {"compiler": found["compiler"] or "none"} if row.compiler else {}
        wanted = row.wanted(found["cuda"] is not None, self.results.rows)
        if parts != wanted or found["refused"]:
            why = found["refused"] or "; ".join(found["left_out"].values())
            raise Failed(f"has {parts or 'no part'} of the extension, wanted {wanted}: {why}")
        if row.triton is (found["triton"] is None):
            raise Failed(f"triton is {found['triton']}")
        if wrong := check_wheel(archive, self.tracked, parts):
            raise Failed("; ".join(wrong))
        line |= environment.passes(sdist)


def list_rows():
    print(matrix.__doc__)
    for number, row in enumerate(matrix.ROWS, 1):
        print(number, row)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="build_tools.release", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", metavar="N", help="only these, in this order"
    )
    parser.add_argument("--list", action="store_true", help="print the rows; run nothing")
    parser.add_argument("--clang", type=Path, help="clang++, where it is not on PATH")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "release")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "installs.json")
    args = parser.parse_args(argv)
    if args.list:
        return list_rows()
    numbers = args.rows or range(1, len(matrix.ROWS) + 1)
    if not set(numbers) <= set(range(1, len(matrix.ROWS) + 1)):
        parser.error(f"--rows: there are 1 to {len(matrix.ROWS)}, got {args.rows}")
    tools = find_tools(args.clang and str(args.clang.absolute()))
    if "uv" not in tools:
        parser.error("uv makes the environments and is not installed; pip install uv")
    head = record.header("installs", "build_tools.release", argv)
    results = record.resumed(head, args.out) if args.rows else record.Results(head, args.out)
    results.rows = [line for line in results.rows if line["row"] not in numbers]
    release = Release(args.work.absolute(), tools, results)
    try:
        has_archives = args.rows and any(release.dist.glob("*.tar.gz"))
        if not has_archives and not release.make_archives():
            return 1
    except Failed as reason:
        parser.exit(1, f"release: {reason}\n")
    for number in numbers:
        release.run(number)
    results.rows.sort(key=lambda line: line["row"])
    results.write()
    failed = [line for line in results.rows if line["result"].startswith("failed")]
    not_run = [line for line in results.rows if line["result"].startswith("not run")]
    passed = len(results.rows) - len(failed) - len(not_run)
    say(f"{passed} rows passed, {len(failed)} failed, {len(not_run)} could not be run here")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
