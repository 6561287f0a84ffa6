"""Threads that end as whoever waits for them believes, and whose start ends too.

An interrupt (a handler that raises) within `threading.Thread.join` makes Python take the thread for ended, before 3.13: the
next `join` returns at once, and a copy would go on over files that are closed by then. One within `start` can lose a lock of
the thread, and becomes a RuntimeError. So all threads of onionskin are of the class below.
"""

import os
import threading
import time
from _thread import allocate_lock
from typing import Any

from onionskin.base.paths import FilePath
from onionskin.base.signals import DeferredInterrupt

START_SECONDS = 10.0  # on a busy host a thread begins long before that
_LOOK_AGAIN_SECONDS = 0.5


class Thread(threading.Thread):
    """A thread that may be waited for again after an interrupt, and that interrupts leave either begun or not."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._process = os.getpid()
        self.has_ended = False  # all that it does is done, or it has failed
        self._end = allocate_lock()
        self._end.acquire()

    def start(self) -> None:
        """Begin. An interrupt comes before or behind that."""
        with DeferredInterrupt():
            super().start()

    def run(self) -> None:
        """Do what the thread is for."""
        try:
            super().run()
        finally:
            self.has_ended = True
            self._end.release()

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, or for so many seconds."""
        if self.ident is None or self._process != os.getpid():  # nobody is waited for in a child of a fork
            super().join(timeout)
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.has_ended:
            left = _LOOK_AGAIN_SECONDS if deadline is None else min(deadline - time.monotonic(), _LOOK_AGAIN_SECONDS)
            if left <= 0:
                return
            # An interrupt just behind the first of these leaves it locked: who waits too sees that when it looks again.
            if self._end.acquire(timeout=left):
                self._end.release()
            elif not self._is_there():
                break
        super().join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _is_there(self) -> bool:
        """Whether the system has it still: without memory it may end before it does anything, and nobody hears of that."""
        tasks = FilePath("/proc/self/task")
        return (tasks / str(self.native_id)).exists() or not (tasks / str(threading.get_native_id())).exists()


class SureThread(Thread):
    """A thread whose `start` raises RuntimeError where it does not begin, as it does where the system gives no thread.

    `Thread.start` waits until the new thread says that it runs. One that has no memory left to say so (RLIMIT_AS) dies, and
    is waited for without end: by the thread that accepts connections, so that its process answers nobody any more.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._started = _Bounded()


class _Bounded(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        if super().wait(START_SECONDS if timeout is None else timeout):
            return True
        raise RuntimeError("can't start new thread: it did not begin; is memory left for it?")
