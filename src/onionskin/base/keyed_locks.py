"""One lock for each key, as long as somebody holds or wants it."""

import threading
from collections.abc import Hashable, Iterator

from onionskin.base.held import held


class KeyedLocks:
    """Locks that are made when they are wanted. Who holds one keeps only those waiting who want the same key."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[Hashable, threading.Lock] = {}
        self._wanted: dict[Hashable, int] = {}

    @held
    def holding(self, key: Hashable) -> Iterator[None]:
        """Hold the lock of a key for the time of the block."""
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
            self._wanted[key] = self._wanted.get(key, 0) + 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                self._wanted[key] -= 1
                if not self._wanted[key]:
                    del self._wanted[key], self._locks[key]
