"""Turns: threads do their work one after the other, as long as none of them takes long.

A hundred clients that ask for a new fork at once are a hundred threads, which would hand the interpreter to each other at
every call of the kernel: that takes half as long again as the work. And one thread that knows what the others wait for
can do their work with its own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

TURN_SECONDS = 0.2


class Turn:
    """What one thread wants to be done.

    Attributes
    ----------
    wanted : str
    is_done : bool
        Whether another thread has done it in its own turn.
    others : list of Turn
        What the threads want whose turn is still to come, if it is this one's turn.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self.is_done = False
        self.others: list[Turn] = []


class Turns:
    """Lets one thread after the other work. One that waits for a disk holds the others up for TURN_SECONDS at most."""

    def __init__(self) -> None:
        self._taken = threading.Lock()
        self._guard = threading.Lock()
        self._waiting: list[Turn] = []  # under the guard

    @contextmanager
    def take(self, wanted: str) -> Iterator[Turn]:
        """Run the body when it is this thread's turn, or when that has not come in time."""
        turn, has_turn = Turn(wanted), False
        with self._guard:
            self._waiting.append(turn)
        try:
            try:
                has_turn = self._taken.acquire(timeout=TURN_SECONDS)
            finally:
                with self._guard:
                    self._waiting.remove(turn)
                    turn.others = list(self._waiting) if has_turn else []
            yield turn
        finally:
            if has_turn:
                self._taken.release()
