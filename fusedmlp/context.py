"""The settings of `use_backend` and `dropout_state`, which belong to the context; and torch's
threads in a forked child.

Every thread and every asyncio task has its own: a new thread starts without any, a task starts
with those of the code that made it. Threads of autograd, in which backward runs on a GPU, have
those of the thread that called backward, so that a forward which is repeated there (activation
checkpointing) is the same forward. Does not know what the settings mean.
"""

from __future__ import annotations

import functools
import os
import threading
from contextvars import ContextVar

import torch

from . import compat

_VAR: ContextVar[Settings] = ContextVar("fusedmlp")
_KEY = "fusedmlp"  # among the thread-local objects that autograd hands to its own threads


class Settings:
    """What is set in a context. Never changed: a with-block puts another one in its place.

    backend  a name, or None for automatic choice
    scopes   what `dropout_state` draws from, the innermost last
    """

    __slots__ = ("backend", "scopes")

    # The Settings of the present context, or the object itself where there are none. A property of
    # a function in C is what Dynamo can guard: it knows ContextVar.get only since torch 2.14.
    present = property(_VAR.get)

    def __init__(self, backend: str | None, scopes: tuple):
        self.backend, self.scopes = backend, scopes


_NONE = Settings(None, ())
# `stack`: of the with-blocks in what Dynamo is tracing, which cannot trace ContextVar.set, and in
# what it has traced up to a graph break. Otherwise empty.
_traced = threading.local()
_traced.stack = ()


def now() -> Settings:
    """The settings of the present context."""
    stack = getattr(_traced, "stack", None)
    if stack:
        return stack[-1]
    found = _NONE.present
    if found is _NONE and not torch.compiler.is_compiling():
        return _of_autograd()
    return found


def _of_autograd() -> Settings:
    """In a thread of autograd what the thread has that called backward."""
    _traced.stack = ()  # Looking for what is not there takes 3 us.
    return compat.stashed_by_backward(_KEY) or _NONE


def put(settings: Settings) -> None:
    """Makes them the settings of the present context."""
    _VAR.set(settings)
    compat.stash(_KEY, settings)


def enter(settings: Settings) -> None:
    """`put` at the start of a with-block."""
    if torch.compiler.is_dynamo_compiling():
        _traced.stack = (*(getattr(_traced, "stack", None) or ()), settings)
    else:
        put(settings)


def leave(settings: Settings) -> None:
    """`put` at the end of a with-block: the settings that it began with."""
    if torch.compiler.is_dynamo_compiling():
        _traced.stack = _traced.stack[:-1]
    else:
        put(settings)


# Of the main thread, which so need not look for a backward pass that it runs in.
_VAR.set(Settings(None, ()))


def _one_thread() -> None:
    """Torch's threads do not survive a fork: a child that asks for them waits for ever."""
    torch.set_num_threads(1)


@functools.cache
def watch_forks() -> None:
    """Called where this package is first used, whatever runs the call."""
    os.register_at_fork(after_in_child=_one_thread)
