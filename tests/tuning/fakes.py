"""Candidates that are right, wrong, slow, do not compile, hang, or end their process."""

from __future__ import annotations

import os
import time

from torch import nn

from fusedmlp.trial.candidates import Candidate, plain


class _Slow(nn.Module):
    def __init__(self, work):
        super().__init__()
        self.net = plain(work)

    def forward(self, x):
        time.sleep(0.003)
        return self.net(x)


def _slow(problem):
    return problem.reference


def _off(problem):
    return lambda: problem.reference() * 1.01


def _bad_gradient(problem):
    """The right output, and a gradient that is 1 % off."""

    def call():
        y = problem.reference()
        return y.detach() + 1.01 * (y - y.detach())

    return call


def _does_not_compile(problem):
    def call():
        raise RuntimeError("ptxas: no such instruction\nand more")

    return call


def _hangs(problem):
    return lambda: time.sleep(3600)


def _dies(problem):
    return lambda: os._exit(11)


def candidates(work) -> dict:
    calls = {
        "right": lambda problem: problem.reference,
        "slow": _slow,
        "off": _off,
        "bad gradient": _bad_gradient,
        "does not compile": _does_not_compile,
        "hangs": _hangs,
        "dies": _dies,
    }
    found = {name: Candidate(call, plain) for name, call in calls.items()}
    return {"eager": Candidate(None, plain)} | found | {"slow": Candidate(_slow, _Slow)}
