"""Reads what a guest says on its serial console, and types there.

What must hold: all that is said is read at once, whoever waits for it: a guest stands still whose console is connected, and
not read.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Self, TypeVar

from onionskin.base.threads import Thread
from onionskin.errors import StateError

_T = TypeVar("_T")
_PART_BYTES = 1 << 16
_SHOWN = 300  # of what was said at last, in an error


class Console:
    """A connection to the console of a guest. A context manager. Any thread may call it.

    Parameters
    ----------
    connection : socket.socket
        A connected one, which is closed at the end.
    who : str
        What the guest is called in errors.
    """

    def __init__(self, connection: socket.socket, who: str) -> None:
        self._connection = connection
        self._who = who
        self._text = ""
        self._is_open = True
        self._lock = (
            threading.RLock()
        )  # entered itself, as in `base/background.py`: an interrupt leaves it held by nobody
        self._news = threading.Condition(self._lock)
        self._thread = Thread(target=self._read, name="onionskin console", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Further calls do nothing."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()

    @property
    def text(self) -> str:
        """All that was said, or what `forget_before` left of it."""
        with self._lock:
            return self._text

    def type(self, line: str) -> None:
        """Type a line."""
        self._connection.sendall(line.encode() + b"\n")

    def forget_before(self, last: str) -> None:
        """Forget all before the last place at which something was said."""
        with self._lock:
            self._text = self._text[self._text.rindex(last) :]

    def wait(self, found: Callable[[str], "_T | None"], seconds: float, what: str) -> _T:
        """Wait until something is found in `text`, and return that.

        Raises
        ------
        StateError
            It was not found in time, or the guest has ended. `what` says what was waited for.
        """
        deadline = time.monotonic() + seconds
        with self._lock:
            while (answer := found(self._text)) is None:
                left = deadline - time.monotonic()
                if not self._is_open or left <= 0:
                    why = f"did not say {what} within {seconds:g} s" if self._is_open else "has ended"
                    raise StateError(f"{self._who} {why}; at last its console had {self._text[-_SHOWN:]!r}")
                self._news.wait(left)
        return answer

    def _read(self) -> None:
        while True:
            try:
                part = self._connection.recv(_PART_BYTES)
            except OSError:
                part = b""
            with self._lock:
                self._text += part.decode(errors="replace")
                self._is_open = bool(part)
                self._news.notify_all()
            if not part:
                return
