"""Builds the C++ core of csrc/cpu with the programs of csrc/sanitize under the sanitizers, and runs
it: python -m build_tools.sanitize [--only thread|address] [--seed N] [--rounds N].

ThreadSanitizer must also find a race that is planted: evaluation whose layers take turns in memory
with other distances between rows, so that a block of rows writes into another. Needs no torch.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from build_tools.toolchain import ROOT, CannotBuild, Compiler, Ninja, first_error, x86_flags

SANITIZERS = {
    "thread": "-fsanitize=thread".split(),
    # Checks are calls and scopes are not tracked: else a file of kernels takes minutes to compile.
    # A null pointer that is read is seen without a check of its own.
    "address": (
        "-fsanitize=address,undefined -fno-sanitize=null,object-size "
        "-fno-sanitize-address-use-after-scope --param asan-instrumentation-with-call-threshold=0"
    ).split(),
}
# Lines are enough of debug information for a report, and -O1 for the vector types.
FLAGS = "-std=c++20 -O1 -g1 -fno-omit-frame-pointer -fno-math-errno -fno-trapping-math -Wall -Icsrc"
NAMES = {  # of Linux, where they are not the compiler's
    "-mprfchw": "3dnowprefetch",
    "-mavx512bf16": "avx512_bf16",
    "-mamx-tile": "amx_tile",
    "-mamx-bf16": "amx_bf16",
}
PLANTED = ("csrc/cpu/step_buffers.cpp", "b.at[i].room = widest;", "b.at[i].room = b.at[i].ld;")
OPTIONS = {
    "TSAN_OPTIONS": "second_deadlock_stack=1",
    "ASAN_OPTIONS": "detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
FOUND = re.compile(r"^.*(?:WARNING: ThreadSanitizer|ERROR: \w+Sanitizer|runtime error).*$", re.M)


def has(flags):
    """Whether this processor has the instruction sets; what cannot run here need not be slow to
    compile."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True
    return all(NAMES.get(flag, flag.removeprefix("-m")) in words for flag in flags)


class Build:
    """The core under one of SANITIZERS."""

    def __init__(self, name):
        self.compiler = Compiler()
        self.flags = [*FLAGS.split(), *SANITIZERS[name]]
        if self.compiler.x86:
            self.flags.append("-DFUSEDMLP_X86")
        self.folder = ROOT / "build" / "sanitize" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.probe(SANITIZERS[name])
        self.ninja = Ninja(self.folder)

    def cxx(self, *words):
        command = [*self.compiler.command, *self.flags, *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise CannotBuild(first_error(done.stderr))

    def probe(self, words):
        source, program = self.folder / "probe.cpp", self.folder / "probe"
        source.write_text("int main() {}\n")
        try:
            self.cxx(source, "-o", program, "-pthread")
            subprocess.run([program], check=True, capture_output=True)
        except (CannotBuild, OSError, subprocess.CalledProcessError) as error:
            raise CannotBuild(
                f"programs of {self.compiler.name} do not run with {words[0]}: {error}"
            ) from None

    def core(self):
        command = " ".join([*self.compiler.command, *self.flags])
        self.ninja.rule("cxx", f"{command} $flags -MD -MF $out.d -c $in -o $out")
        self.ninja.rule("link", f"{command} $in -o $out -pthread")
        for source in sorted((ROOT / "csrc").glob("cpu/*.cpp")) + sorted(
            (ROOT / "csrc").glob("sanitize/*.cpp")
        ):
            flags = x86_flags(source)
            if not has(flags):
                flags = [*flags, "-O0", "-fno-sanitize=all"]
            if source.parent.name == "sanitize":
                flags = ["-O2", "-fno-sanitize=all"]  # filling and comparing memory takes its time
            if source.stem != "exports" and (self.compiler.x86 or not x86_flags(source)):
                self.ninja.compile("cxx", source, flags)
        return self.ninja.run("core")

    def planted(self):
        """The core with the fault, after core()."""
        name, right, fault = PLANTED
        text = (ROOT / name).read_text()
        if text.count(right) != 1:
            raise SystemExit(f"sanitize: {name} must have one {right!r}, got {text.count(right)}")
        source, program = self.folder / "planted.cpp", self.folder / "planted"
        source.write_text(text.replace(right, fault))
        replaced = "_".join(Path(name).parts[1:]) + ".o"
        rest = [path for path in self.ninja.objects if not path.endswith(replaced)]
        self.cxx(source, *rest, "-o", program, "-pthread")
        return program


def run(program, *words, **options):
    """(whether nothing was found, what was printed, seconds)"""
    start = time.monotonic()
    done = subprocess.run(
        [program, *map(str, words)],
        env=os.environ | OPTIONS | options,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    clean = done.returncode == 0 and not FOUND.search(done.stdout)
    return clean, done.stdout, time.monotonic() - start


def sanitize(name, seed=0, rounds=2, say=print):
    """Whether the core is clean under one of SANITIZERS, and the planted race is found;
    CannotBuild where the compiler has no runtime for it."""
    build = Build(name)
    clean, printed, seconds = run(build.core(), seed, rounds)
    say(printed)
    say(f"sanitize: {name}: {'clean' if clean else 'NOT CLEAN'} ({seconds:.0f} s)\n")
    if name != "thread":
        return clean
    none_found, printed, seconds = run(
        build.planted(), seed, 1, TSAN_OPTIONS="halt_on_error=1 exitcode=66"
    )
    found = (
        not none_found
        and "data race" in printed
        and "network.cpp" in printed
        or "step.cpp" in printed
    )
    say(printed[:6000])
    say(f"sanitize: planted race: {'found' if found else 'NOT FOUND'} ({seconds:.0f} s)\n")
    return clean and found


def main():
    parser = argparse.ArgumentParser(prog="python -m build_tools.sanitize", description=__doc__)
    parser.add_argument("--only", choices=SANITIZERS)
    parser.add_argument("--seed", type=int, default=0, help="0: from the clock; it is printed")
    parser.add_argument("--rounds", type=int, default=5, help="runs of a call on several threads")
    words = parser.parse_args()
    ok = True
    for name in [words.only] if words.only else SANITIZERS:
        try:
            ok &= sanitize(name, words.seed, words.rounds)
        except CannotBuild as reason:
            print(f"sanitize: {name}: skipped: {reason}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
