"""Holds back Ctrl-C, and the signals that end a command in the same way, while a commit and its follow-up are one step.

Only the main thread is interrupted, so there is nothing to do in other threads. Other signals whose handlers raise are
not held back. Code that uses this must survive one exception at any point. Two exceptions in a row would leave a step
half done.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

DEFERRED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DeferredInterrupt:
    """A context that notes these signals, if they have a handler, and handles the first one at its end."""

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._noted: list[int] = []

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in DEFERRED:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._noted:
            self._handlers[self._noted[0]](self._noted[0], None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append(number)
