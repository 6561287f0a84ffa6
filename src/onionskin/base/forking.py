"""Open handles in the child of a fork().

The child shares every open file description with its parent, and so every OFD lock. It must neither unlock nor remove
anything, and must not touch what the parent is doing in SQLite. Its handles raise StateError from then on.

A fork waits until those who ask for it do nothing that a child must not find half done.
"""

import os
import threading
import weakref
from typing import Protocol

from onionskin.errors import StateError


class Forkable(Protocol):
    """A handle that must stand aside in the child."""

    def after_fork(self) -> None:
        """Mark the handle as the parent's. Runs in the child: takes no lock, releases nothing, never raises."""


class Resting(Protocol):
    """What has to be at rest while the process is forked."""

    def rest(self) -> None:
        """Wait until nothing is under way, and let nothing begin. Runs in the thread that forks; never raises."""

    def go_on(self) -> None:
        """Let what waits begin. Runs in that thread of the parent, and not in the child."""


_handles: "weakref.WeakSet[Forkable]" = weakref.WeakSet()
_resting: "weakref.WeakSet[Resting]" = weakref.WeakSet()
_at_rest: list[Resting] = []
_forking = threading.Lock()  # two threads that fork would wait for each other


def register(handle: Forkable) -> None:
    """Have `handle.after_fork()` called in every child that is forked from now on."""
    _handles.add(handle)


def forked_error(what: str) -> StateError:
    """Make the error of every handle that is used in a child."""
    return StateError(f"{what} was opened before fork() and belongs to the parent process; open it again in the child")


def register_resting(handle: Resting) -> None:
    """Have `handle.rest()` called before each fork from now on, and `handle.go_on()` behind it, in the parent."""
    _resting.add(handle)


def _before_fork() -> None:
    _forking.acquire()
    for handle in list(_resting):
        handle.rest()
        _at_rest.append(handle)


def _after_fork_in_parent() -> None:
    while _at_rest:
        _at_rest.pop().go_on()
    _forking.release()


def _after_fork_in_child() -> None:
    global _forking
    _forking = threading.Lock()
    _at_rest.clear()
    for handle in list(_handles):
        handle.after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
