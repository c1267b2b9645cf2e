"""The C++ core under ThreadSanitizer, in the short form of `make sanitize`."""

import pytest

from build_tools import sanitize
from build_tools.toolchain import X86_FLAGS, CannotBuild
from fusedmlp.backends import native

from ..engines import need_native


@pytest.mark.slow
def test_no_race_is_found_but_the_planted_one():
    printed = []
    try:
        ok = sanitize.sanitize("thread", rounds=1, say=printed.append)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    text = "\n".join(printed)
    assert ok, text
    assert "thread: clean" in text and "planted race: found" in text


def test_what_is_planted_is_still_there_to_be_replaced():
    name, right, _ = sanitize.PLANTED
    assert (sanitize.ROOT / name).read_text().count(right) == 1


def test_what_this_processor_runs_is_sanitized():
    need_native()
    runs = {*native.cpu_isas(), native.bf16_isa()}
    left_out = [n for n, flags in X86_FLAGS.items() if n[1:] in runs and not sanitize.has(flags)]
    assert not left_out
