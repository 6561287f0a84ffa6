"""Turns: threads do their work one after the other, as long as none of them takes long.

A hundred clients that ask for a new fork at once are a hundred threads, which would hand the interpreter to each other at
every call of the kernel: that takes half as long again as the work.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

TURN_SECONDS = 0.2


class Turns:
    """Lets one thread after the other work. One that waits for a disk holds the others up for TURN_SECONDS at most."""

    def __init__(self) -> None:
        self._taken = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Run the body when it is this thread's turn, or when that has not come in time."""
        has_turn = self._taken.acquire(timeout=TURN_SECONDS)
        try:
            yield
        finally:
            if has_turn:
                self._taken.release()
