"""Whether the machine finds a line of csrc/cuda changed: -m tests.ptx.mutant FILE LINE AFTER [all].

With the kernels of the mistakes, or with `all` of them and the tests of test_cuda_kernels.py. Ends
with SURVIVED where nothing is found, and SAME where the PTX is that of the unchanged line, as it is
for host code.
"""

import re
import sys
from pathlib import Path

import pytest

from ..backends import test_ptx_mistakes as mistakes
from . import launchers, library

# As build_tools/mutants.py reads them; 1 is Python's own.
SURVIVED, FOUND, NOT_COMPILED, SAME = 0, 10, 20, 30
TESTS = ["tests/backends/test_cuda_kernels.py", "-q", "-x", "-rfE", "--tb=line"]
TESTS += ["-p", "no:cacheprovider", "-k", "not op_suite and not sm_120 and not 120"]


def _bodies(kernels) -> dict:
    return {name: library.plain_name(kernel.body) for name, kernel in kernels.items()}


def main(file: str, line: int, after: str, every: bool = False) -> int:
    name = Path(file).name
    source = mistakes.HEADERS.get(
        name, name if name in mistakes.WORK else "bias_act_dropout_fwd.cu"
    )
    work, fewer = mistakes.WORK[source]
    edit = (name, rf"\A((?:[^\n]*\n){{{line - 1}}})[^\n]*", r"\1" + after.replace("\\", r"\\"))
    launchers.set_machine()
    sources = [source] if not every or name.endswith(".cu") else list(mistakes.WORK)
    changed, right = {}, {}
    for each in sources:
        try:
            keep = () if every else fewer
            right |= library.mistaken(80, each, [], keep)
            changed |= library.mistaken(80, each, [edit], keep)
        except LookupError:  # what leaves fewer kernels is found by its text
            changed |= library.mistaken(80, each, [edit])
        except RuntimeError as error:
            print(error)
            return NOT_COMPILED
    if _bodies(changed) == _bodies(right):
        return SAME
    with launchers.chosen().replaced(changed):
        if every:
            return FOUND if pytest.main(TESTS) == pytest.ExitCode.TESTS_FAILED else SURVIVED
        try:
            work()
        except Exception as found:
            said = f"{work.__name__}: {type(found).__name__}: {found}"
            print(re.sub(r"\s+", " ", said)[:300])
            return FOUND
    return SURVIVED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:] == ["all"]))
