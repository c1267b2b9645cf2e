"""Whether the machine finds a line of csrc/cuda changed: -m tests.ptx.mutant FILE LINE AFTER.

Ends with SURVIVED where nothing is found, and SAME where the PTX is that of the unchanged line, as
it is for host code. The kernels are those of the mistakes.
"""

import re
import sys
from pathlib import Path

from ..backends import test_ptx_mistakes as mistakes
from . import launchers, library

SURVIVED, FOUND, NOT_COMPILED, SAME = 0, 10, 20, 30  # as build_tools/mutants.py reads them


def main(file: str, line: int, after: str) -> int:
    name = Path(file).name
    source = mistakes.HEADERS.get(
        name, name if name in mistakes.WORK else "bias_act_dropout_fwd.cu"
    )
    work, fewer = mistakes.WORK[source]
    edit = (name, rf"\A((?:[^\n]*\n){{{line - 1}}})[^\n]*", r"\1" + after.replace("\\", r"\\"))
    launchers.set_machine()
    try:
        # The changed line first: what leaves fewer kernels is found by its text.
        changed = library.mistaken(80, source, [edit], fewer)
    except LookupError:
        changed = library.mistaken(80, source, [edit])
    except RuntimeError as error:
        print(error)
        return NOT_COMPILED
    right = library.mistaken(80, source, [], fewer)
    if {k: v.body for k, v in changed.items()} == {k: v.body for k, v in right.items()}:
        return SAME
    try:
        with launchers.chosen().replaced(changed):
            work()
    except Exception as found:
        print(re.sub(r"\s+", " ", f"{work.__name__}: {type(found).__name__}: {found}")[:300])
        return FOUND
    return SURVIVED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
