"""Threads whose start ends, also where there is no memory for them.

`Thread.start` waits until the new thread says that it runs. One that has no memory left to say so (RLIMIT_AS) dies, and is
waited for without end: by the thread that accepts connections, so that its process answers nobody any more.
"""

import threading
from typing import Any

START_SECONDS = 10.0  # on a busy host a thread begins long before that


class SureThread(threading.Thread):
    """A thread whose `start` raises RuntimeError where it does not begin, as it does where the system gives no thread."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._started = _Bounded()


class _Bounded(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        if super().wait(START_SECONDS if timeout is None else timeout):
            return True
        raise RuntimeError("can't start new thread: it did not begin; is memory left for it?")
