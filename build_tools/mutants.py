"""Breaks one line at a time, chosen at random, and runs the tests that should see it:
python -m build_tools.mutants [--seed N] [--kind NAME] [--count N] [--again] [--list].

A mutant is a copy of this tree with one line changed. It is killed by a test that fails, crashes or
does not end; one that does not compile does not count; one that survives is a test that is missing,
or changes nothing that can be seen: build_tools/equivalents.py says why. `--again` runs those again
that survived, now that there is a test. At the end every test that has killed must pass on the tree
as it is.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench import record

from . import mutations, sanitize
from .equivalents import EQUIVALENT
from .kinds import KINDS, Kind
from .toolchain import ROOT, X86_FLAGS, find_ninja

RESULTS = ROOT / "bench" / "results" / "mutants.json"
LIMIT_S, WAIT_S = 300, 1800  # of a mutant that is busy, and of one that waits
COLUMNS = ("outcome", "kind", "file", "line", "operator", "by", "seconds")
OUTCOMES = ("killed", "survived", "equivalent", "does not compile")
PYTEST = "-q -rfE --tb=line -p no:cacheprovider -p no:xdist"
# How tests/ptx/mutant.py ends, whose import here would be that of the whole package.
SURVIVED, FOUND, NOT_COMPILED, SAME = 0, 10, 20, 30
SPENT = 40  # pytest's time
# torch is imported once for all mutants; nothing of this package may be.
PRELOADED = "torch numpy pandas pytest hypothesis scipy sklearn rich tyro safetensors".split()


@dataclass(frozen=True)
class Mutant:
    kind: str
    file: str  # from the root of the tree
    mutation: mutations.Mutation

    @property
    def row(self) -> dict:
        m = self.mutation
        words = {"before": m.before.strip(), "after": m.after.strip()}
        place = {"kind": self.kind, "file": self.file, "line": m.line, "operator": m.operator}
        return place | words

    @property
    def key(self) -> tuple:
        return _key(self.row)

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in ("file", "before", "after"))


def _of_row(row: dict) -> Mutant | None:
    """The mutant of a row in this tree, where its line may be another one, or be gone."""
    lines = (ROOT / row["file"]).read_text().split("\n")
    found = [n for n, line in enumerate(lines, 1) if line.strip() == row["before"]]
    if not found:
        return None
    number = min(found, key=lambda n: abs(n - row["line"]))
    before = lines[number - 1]
    after = before.replace(row["before"], row["after"])
    change = mutations.Mutation(number, before, after, row["operator"])
    return Mutant(row["kind"], row["file"], change)


def chosen(kind: Kind, seed: int, count: int | None = None) -> list[Mutant]:
    """Each file once before one comes twice; each line at most once."""
    pick = random.Random(f"{seed} {kind.name}")
    files = {path: mutations.of(ROOT / path) for path in kind.paths(ROOT)}
    found: list[Mutant] = []
    while len(found) < (count or kind.count):
        order = [path for path, possible in files.items() if possible]
        if not order:
            break
        pick.shuffle(order)
        for path in order:
            line = pick.choice(sorted({m.line for m in files[path]}))
            change = pick.choice([m for m in files[path] if m.line == line])
            found.append(Mutant(kind.name, path, change))
            files[path] = [m for m in files[path] if m.line != line]
    return found[: count or kind.count]


# --- a copy of the tree ---------------------------------------------------------------------------


class Budget:
    """A plugin of pytest: no new test begins once this much processor time is spent."""

    def __init__(self, seconds: float):
        self.seconds, self.is_spent = seconds, False

    def pytest_runtest_teardown(self, item):
        used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        if sum(u.ru_utime + u.ru_stime for u in used) > self.seconds:
            self.is_spent = True
            item.session.shouldstop = "the time is spent"


def _in_copy(copy: str, environ: dict, out: str, call: tuple) -> None:
    """In a process of its own: pytest, or the main of a module."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 5))
    for stream in (1, 2):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(copy)
    os.environ.update(environ)
    sys.path[:] = [copy, *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    for name in [n for n in sys.modules if n.split(".")[0] in ("bench", "build_tools")]:
        del sys.modules[name]
    if call[0] == "pytest":
        import pytest

        budget = Budget(call[1])
        code = pytest.main([*PYTEST.split(), *call[2:]], plugins=[budget])
        code = SPENT if budget.is_spent and code != 1 else code
    else:
        code = importlib.import_module(call[0]).main(*call[1:])
    sys.stdout.flush()
    os._exit(int(code))


class Tree:
    """A copy of the files that git knows, with the extension and its objects."""

    def __init__(self, folder: Path):
        self.root = folder
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        built = [*ROOT.glob("fusedmlp/_native_*"), ROOT / "fusedmlp" / "_build_info.json"]
        for path in [*(ROOT / name for name in names.splitlines()), *built]:
            if path.is_file():
                target = self.root / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
        for objects in ROOT.glob("build/native/*/cpu"):
            shutil.copytree(objects, self.root / objects.relative_to(ROOT))
        (self.root / "build").mkdir(exist_ok=True)
        # Kernels for the PTX machine are found by a hash of their text: one place for all trees.
        (ROOT / "build" / "ptx").mkdir(parents=True, exist_ok=True)
        (self.root / "build" / "ptx").symlink_to(ROOT / "build" / "ptx")
        subprocess.run([sys.executable, "-m", "compileall", "-q", self.root / "fusedmlp"])
        self.fork = multiprocessing.get_context("forkserver")
        self.fork.set_forkserver_preload(PRELOADED)

    def call(self, *call, environ=None, limit=WAIT_S) -> tuple[int | None, str]:
        """(exit status, None where it did not end; what was printed)"""
        environ = {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"} | (environ or {})
        out = self.root / "printed.txt"
        out.write_text("")
        process = self.fork.Process(target=_in_copy, args=(str(self.root), environ, str(out), call))
        process.start()
        process.join(limit)
        ended = process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return ended, out.read_text(errors="replace")

    @contextlib.contextmanager
    def changed(self, mutant: Mutant):
        path = self.root / mutant.file
        path.write_text(mutant.mutation.apply(path.read_text()))
        try:
            yield
        finally:
            shutil.copy2(ROOT / mutant.file, path)

    # The extension, with only those objects compiled anew that a changed file is part of, and of
    # those that are compiled for an instruction set only one.

    def prepare_extension(self) -> None:
        command = [sys.executable, "setup.py", "-q", "build_native", "--editable-mode"]
        environ = os.environ | {"FUSEDMLP_BUILD": "cpu"}
        subprocess.run(command, cwd=self.root, env=environ, check=True, capture_output=True)
        (self.ninja_file,) = self.root.glob("build/native/*/cpu/build.ninja")
        self.extension = self.root / "fusedmlp" / "_native_cpu.so"
        shutil.copy2(self.extension, self.root / "right.so")

    def _ninja(self, *words: str) -> list[str]:
        command = [find_ninja(), "-f", str(self.ninja_file), "-t", *words]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    def build(self, file: str) -> tuple[str | None, str]:
        """(what the compiler said, None where it compiles; the instruction set that is new)"""
        objects, name = [], ""
        for line in self._ninja("deps"):
            if not line.startswith(" "):
                name = line.partition(":")[0]
            elif line.strip() == file:
                objects.append(name)
        sets = {o: o.rpartition("isa_")[2].partition(".")[0] for o in objects if "isa_" in o}
        # One that runs here, and that a test can ask for by name before those that come with it.
        runs = [o for o in sets if sanitize.has(X86_FLAGS.get(f"_{sets[o]}", []))]
        preferred = sorted(runs or sets, key=lambda o: {"avx2": 0, "avx512": 1}.get(sets[o], 2))
        anew = [o for o in objects if o not in sets] + preferred[:1]
        library = self.ninja_file.relative_to(self.root).parent / "_native_cpu.so"
        link = self._ninja("commands", str(library))[-1]
        (self.root / "mutant").mkdir(exist_ok=True)
        for name in anew:
            new = f"mutant/{Path(name).name}"
            (command,) = (c for c in self._ninja("commands", name) if f"-o {name}" in c)
            link = link.replace(name, new)
            command = command.replace(f"-o {name}", f"-o {new}").replace("-O3", "-O1")
            done = subprocess.run(shlex.split(command), cwd=self.root, capture_output=True)
            if done.returncode:
                return done.stderr.decode(), ""
        link = re.sub(r"-o \S+", "-o mutant/new.so", link)
        subprocess.run(shlex.split(link), cwd=self.root, check=True, capture_output=True)
        self._put(self.root / "mutant" / "new.so")
        return None, sets[preferred[0]] if preferred else ""

    def restore_extension(self) -> None:
        self._put(self.root / "right.so")

    def _put(self, library: Path) -> None:
        """As the extension that was built: the package refuses one of another checksum."""
        info = self.root / "fusedmlp" / "_build_info.json"
        built = json.loads(info.read_text())
        built["crc32"]["cpu"] = zlib.crc32(library.read_bytes())
        info.write_text(json.dumps(built))
        os.replace(shutil.copy2(library, f"{self.extension}.new"), self.extension)


# --- a mutant -------------------------------------------------------------------------------------


def judged(status: int | None, printed: str) -> dict:
    """What the end of pytest says of a mutant."""
    if status == 5 or (status in (0, SPENT) and not re.search(r"\b\d+ passed", printed)):
        raise RuntimeError(f"mutants: no test was run: {printed[-500:]}")
    if status in (0, SPENT):
        return {"outcome": "survived"} | ({"not all tests": True} if status else {})
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", printed, re.M)
    if failed:
        by = failed[1]
    elif status in (None, -signal.SIGXCPU, -signal.SIGKILL):
        by = f"no end within {LIMIT_S} s of processor time"
    else:
        by = f"crash, status {status}" if status < 0 else "pytest does not start"
    return {"outcome": "killed", "by": by}


def run(tree: Tree, mutant: Mutant, tests: list[str], budget: float = 40) -> dict:
    """Its row with the outcome."""
    start = time.monotonic()
    found = None
    if mutant.file.startswith("csrc/cuda/"):
        found = _cuda(tree, mutant)
    if found is None:
        found = _with_tests(tree, mutant, tests, budget)
    if found["outcome"] == "survived" and mutant.key in EQUIVALENT:
        found |= _equivalent(mutant)
    return mutant.row | found | {"seconds": round(time.monotonic() - start)}


def _equivalent(mutant: Mutant) -> dict:
    return {"outcome": "equivalent", "why": EQUIVALENT[mutant.key]}


def _with_tests(tree: Tree, mutant: Mutant, tests: list[str], budget: float) -> dict:
    environ = {}
    with tree.changed(mutant):
        if mutant.compiled:
            try:
                error, isa = tree.build(mutant.file)
                if error is not None:
                    return {"outcome": "does not compile"}
                if isa in ("baseline", "avx2", "avx512"):
                    environ["FUSEDMLP_CPU_ISA"] = isa
                return judged(*tree.call("pytest", budget, "-x", *tests, environ=environ))
            finally:
                tree.restore_extension()
        return judged(*tree.call("pytest", budget, "-x", *tests))


def _cuda(tree: Tree, mutant: Mutant) -> dict | None:
    """None where the kernels are as they were: what is changed is host code."""
    m, found = mutant.mutation, None
    for every in (False, True):
        words = (mutant.file, m.line, m.after, every)
        status, printed = tree.call("tests.ptx.mutant", *words)
        if status == NOT_COMPILED:
            return {"outcome": "does not compile"}
        if status == FOUND and every:
            return judged(1, printed)
        if status == FOUND:
            return {"outcome": "killed", "by": f"test_ptx_mistakes.py, {printed.strip()[-160:]}"}
        if status not in (SURVIVED, SAME):
            if status is not None and status >= 0:
                raise RuntimeError(f"mutants: tests.ptx.mutant: {status}: {printed[-500:]}")
            return judged(status, "")
        # Kernels that the first call leaves out may be others.
        found = None if status == SAME else {"outcome": "survived"}
    return found


def failing_when_right(tree: Tree, rows: list[dict]) -> list[str]:
    """Tests that have killed a mutant and do not pass on the tree as it is: they show nothing."""
    killers = sorted({row["by"] for row in rows if row.get("by", "").startswith("tests/")})
    # In parts: together they may take longer than one mutant may.
    parts = [killers[i : i + 10] for i in range(0, len(killers), 10)]
    ends = [tree.call("pytest", LIMIT_S, *part) for part in parts]
    printed = "".join(told if status else "" for status, told in ends)
    return re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", printed, re.M)


def tally(rows: list[dict]) -> str:
    counts = Counter(row["outcome"] for row in rows)
    return ", ".join(f"{counts[name]} {name}" for name in OUTCOMES)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build_tools.mutants", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="0: from the clock; it is printed")
    parser.add_argument("--kind", action="append", choices=[kind.name for kind in KINDS])
    parser.add_argument("--count", type=int, help="mutants of each kind")
    parser.add_argument("--budget", type=float, default=40, help="seconds; then no test begins")
    parser.add_argument("--again", action="store_true", help="run again those that survived")
    parser.add_argument("--file", action="append", help="only mutants of this file")
    parser.add_argument("--tests", help="arguments of pytest in place of those of kinds.py")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file (JSON)")
    args = parser.parse_args(argv)
    rows = record.kept(args.out)
    seed = args.seed or (record.read(args.out)["seed"] if rows else secrets.randbelow(2**31))
    print(f"mutants: seed {seed}", flush=True)
    kinds = {kind.name: kind for kind in KINDS if not args.kind or kind.name in args.kind}
    each = [chosen(kind, seed, args.count) for kind in kinds.values()]
    # Kinds take turns, so that a run that is stopped has some of each.
    order = sorted((i, n) for n, mutants in enumerate(each) for i in range(len(mutants)))
    wanted = [each[n][i] for i, n in order]
    known = {_key(row): row for row in rows}
    if args.again:
        survived = [(r, _of_row(r)) for r in rows if r["outcome"] == "survived"]
        rows = [r for r in rows if (r, None) not in survived]  # without those whose line is gone
        wanted = [m for _, m in survived if m is not None and m.kind in kinds]
    else:
        wanted = [m for m in wanted if m.key not in known]
    wanted = [m for m in wanted if not args.file or m.file in args.file]
    if args.list:
        for m in wanted:
            print(record.line(m.row))
        return 0
    with tempfile.TemporaryDirectory(prefix="fusedmlp-mutants-") as folder:
        tree = Tree(Path(folder))
        if any(m.compiled for m in wanted):
            tree.prepare_extension()
        head = record.header("mutants", "build_tools.mutants", argv) | {"seed": seed}
        results = record.Results(head, args.out, rows)
        for mutant in wanted:
            tests = shlex.split(args.tests or "") or kinds[mutant.kind].tests_of(mutant.file)
            if args.again and mutant.key in EQUIVALENT:
                row = known[mutant.key] | _equivalent(mutant)
            else:
                row = run(tree, mutant, tests, args.budget)
            is_new = not known.get(mutant.key, {}).get("not all tests")
            if args.again and row["outcome"] == "killed" and is_new:
                row["by a new test"] = True
            results.rows[:] = [r for r in results.rows if _key(r) != mutant.key]
            results.add(row, columns=COLUMNS)
        # With tests of the caller's some rows are looked at, not all of them.
        fails = [] if args.tests else failing_when_right(tree, results.rows)
    for row in results.rows:
        if row.get("by") in fails:
            print(f"mutants: {row['by']} fails on the tree as it is: what it killed shows nothing")
            row |= {"outcome": "survived", "not all tests": True, "by": ""}
    results.write()
    print(f"mutants: seed {seed}: {tally(results.rows)}")
    return 1 if fails or any(r["outcome"] == "survived" for r in results.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
