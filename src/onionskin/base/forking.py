"""Open handles in the child of a fork().

The child shares every open file description with its parent, and so every OFD lock. It must neither unlock nor remove
anything, and must not touch what the parent is doing in SQLite. Its handles raise StateError from then on.

A fork waits until those who ask for it do nothing that a child must not find half done.
"""

import os
import threading
import time
import weakref
from typing import Protocol

from onionskin.errors import StateError


class Forkable(Protocol):
    """A handle that must stand aside in the child."""

    def after_fork(self) -> None:
        """Mark the handle as the parent's. Runs in the child: takes no lock, releases nothing, never raises."""


class Resting(Protocol):
    """What has to be at rest while the process is forked."""

    def rest(self, seconds: float) -> bool:
        """Wait so long until nothing is under way, and let nothing begin. False: something still is. Raises nothing."""

    def go_on(self) -> None:
        """Let what waits begin, once for each `rest` that said True. Runs in that thread of the parent, not in the child."""


_REST_SECONDS = 60  # in all; a commit may wait so long for another process
_HOLD_SECONDS = 1  # what is at rest already waits so long for what is not

_handles: "weakref.WeakSet[Forkable]" = weakref.WeakSet()
_resting: set["weakref.ref[Resting]"] = set()  # no WeakSet: another thread may add to this while it is copied


class _Forks(threading.local):
    """The forks that this thread is at: a signal handler or a finalizer may fork while its thread is about to."""

    def __init__(self) -> None:
        self.at_rest: list[list[Resting]] = []  # for each, what goes on behind it


_forks = _Forks()


def register(handle: Forkable) -> None:
    """Have `handle.after_fork()` called in every child that is forked from now on."""
    _handles.add(handle)


class ForkableLock:
    """A lock of a module. It is free in the child of a fork, where the thread that may have held it is not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        register(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def after_fork(self) -> None:
        """Be free."""
        self._lock = threading.Lock()


def forked_error(what: str) -> StateError:
    """Make the error of every handle that is used in a child."""
    return StateError(f"{what} was opened before fork() and belongs to the parent process; open it again in the child")


def register_resting(handle: Resting) -> None:
    """Have `handle.rest()` called before each fork from now on, and `handle.go_on()` behind it, in the parent."""
    _resting.add(weakref.ref(handle, _resting.discard))


def _before_fork() -> None:
    held: list[Resting] = []
    _forks.at_rest.append(held)
    deadline = time.monotonic() + _REST_SECONDS
    while (busy := _bring_to_rest(held, deadline)) is not None:
        # Who is busy may wait for one that is at rest: so that one goes on.
        _let_go_on(held)
        if not busy.rest(max(0.0, deadline - time.monotonic())):
            return
        busy.go_on()


def _bring_to_rest(held: list[Resting], deadline: float) -> Resting | None:
    """Have all rest. Returns one that is busy, if there is one: then those in `held` rest, and the others do not.

    All threads go in the same order, so two that fork do not wait for each other.
    """
    while new := _all_resting(besides=held):
        for handle in new:
            left = deadline - time.monotonic()
            if not handle.rest(max(0.0, min(left, _HOLD_SECONDS) if held else left)):
                return handle
            held.append(handle)
    return None


def _all_resting(besides: list[Resting]) -> list[Resting]:
    found = {id(handle): handle for reference in _resting.copy() if (handle := reference()) is not None}
    return [found[key] for key in sorted(found.keys() - set(map(id, besides)))]


def _let_go_on(held: list[Resting]) -> None:
    while held:
        held.pop().go_on()


def _after_fork_in_parent() -> None:
    if _forks.at_rest:  # else an interrupt ended _before_fork
        _let_go_on(_forks.at_rest.pop())


def _after_fork_in_child() -> None:
    _forks.at_rest.clear()
    for handle in list(_handles):
        handle.after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
