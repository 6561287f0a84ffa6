"""Holds back signals whose handlers may raise, while a commit and its follow-up are one step.

They are Ctrl-C, the signals that end a command in the same way, and those that programs have for limits of time (alarms,
signals from other processes). Only the main thread is interrupted, so there is nothing to do in other threads. Other signals
are not held back. Code that uses this must survive one exception at any point. Two exceptions in a row would leave a step
half done.

A generator that is a context (`contextlib.contextmanager`) is left where it is if an interrupt comes just behind its
`yield` was reached, or just before it goes on: its `finally` runs only when the exception is forgotten. So one that holds
what others wait for until then, as a transaction, holds interrupts back from before its `yield` until behind it; one whose
end is the same whatever its block raised is made by `held` instead, which needs not hold them back (`base/held.py`).
"""

import threading
from _signal import getsignal, signal  # type: ignore[import-not-found]  # those of `signal` make enums: five times as slow
from collections.abc import Callable
from signal import SIGALRM, SIGHUP, SIGINT, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

DEFERRED = (SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGALRM, SIGVTALRM, SIGPROF, SIGXCPU, SIGUSR1, SIGUSR2)


class DeferredInterrupt:
    """A context that notes these signals, if they have a handler, and handles each of them at its end, once."""

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._noted: dict[int, tuple[Handler, FrameType | None]] = {}

    def __enter__(self) -> "DeferredInterrupt":
        if threading.get_ident() != threading.main_thread().ident:
            return self
        try:
            for number in DEFERRED:
                handler = getsignal(number)
                if callable(handler) and not isinstance(getattr(handler, "__self__", None), DeferredInterrupt):
                    self._handlers[number] = handler
                    signal(number, self._note)
        except BaseException:  # one of them came before it was its turn, and nobody would put the others back
            self._put_back()
            raise
        return self

    def handle_noted(self) -> None:
        """Handle what came by now, at a point where what was begun can be undone."""
        while self._noted:
            number = next(iter(self._noted))
            handler, frame = self._noted.pop(number)
            try:
                handler(number, frame)
            except BaseException:
                self.handle_noted()  # the others came too
                raise

    def __exit__(self, *error: object) -> None:
        self._put_back()
        self.handle_noted()

    def _put_back(self) -> None:
        """Put all handlers back, also where one of them is called, and raises, as soon as it is there."""
        try:
            while self._handlers:
                number, handler = next(iter(self._handlers.items()))
                signal(number, handler)
                del self._handlers[number]
        except BaseException:
            self._put_back()
            raise

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.setdefault(number, (self._handlers[number], frame))
