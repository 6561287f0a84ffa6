"""Holding Ctrl-C back while a commit and what follows from it are one step.

Only the main thread is interrupted, so only there is anything to do. Other signals whose handlers raise are not held back:
whoever uses this must stand an exception at any point, but two in a row would leave a step half done.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


class HeldBack:
    """A context in which SIGINT is noted, and handled at its end."""

    def __init__(self) -> None:
        self._handler: Handler | None = None
        self._noted = False

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *error: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._noted:
                self._handler(signal.SIGINT, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
