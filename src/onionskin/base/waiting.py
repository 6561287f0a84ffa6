"""Waiting for a lock that another process has, for a time: that process may have been stopped, or be in a debugger."""

import time
from collections.abc import Callable

_AGAIN_SECONDS = 0.01


def within(seconds: float, take: Callable[[], bool]) -> bool:
    """Try to take a lock until it is taken, and return whether it was.

    A lock of a file has no way to be waited for with a limit, and nothing tells when it is given up.
    """
    deadline = time.monotonic() + seconds
    while not take():
        if time.monotonic() > deadline:
            return False
        time.sleep(_AGAIN_SECONDS)
    return True
