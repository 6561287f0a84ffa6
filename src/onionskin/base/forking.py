"""Open handles in the child of a fork().

The child shares every open file description with its parent, and so every OFD lock. It must neither unlock nor remove
anything, and must not touch the SQLite connection. Its handles raise StateError from then on.
"""

import os
import weakref
from typing import Protocol

from onionskin.errors import StateError


class Forkable(Protocol):
    """A handle that must stand aside in the child."""

    def after_fork(self) -> None:
        """Mark the handle as the parent's. Runs in the child: takes no lock, releases nothing, never raises."""


_handles: "weakref.WeakSet[Forkable]" = weakref.WeakSet()


def register(handle: Forkable) -> None:
    """Have `handle.after_fork()` called in every child that is forked from now on."""
    _handles.add(handle)


def forked_error(what: str) -> StateError:
    """Make the error of every handle that is used in a child."""
    return StateError(f"{what} was opened before fork() and belongs to the parent process; open it again in the child")


def _after_fork_in_child() -> None:
    for handle in list(_handles):
        handle.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
