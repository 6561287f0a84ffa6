"""The preload library in the hypervisor's process: where guest RAM is mapped there, and what it does to that.

See csrc/machine/preload.h for what is said. A `Preload` is used by one thread at a time.
"""

import struct
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from socket import send_fds, socket
from typing import TYPE_CHECKING, Any, Self

from onionskin.base.sockets import connect_unix
from onionskin.errors import FormatError, StateError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC = 0x316D6172
_WHERE, _ARM, _FORGET, _FILL = 1, 2, 3, 4
_REQUEST = struct.Struct("=IIQ")
_REPLY = struct.Struct("=IiQQII")
SECONDS = 60.0  # that an answer may take on a busy host; arming 512 MiB took 0.08 s


@dataclass(frozen=True, slots=True)
class MappedRam:
    """Where guest RAM is in the hypervisor's process.

    Attributes
    ----------
    start, length : int
        Address, and length in bytes.
    is_private : bool
        Whether writes of the guest leave the RAM file as it is.
    is_armed : bool
        Whether writes are noted.
    """

    start: int
    length: int
    is_private: bool
    is_armed: bool


def library() -> Path:
    """Return the path of the library, for LD_PRELOAD.

    Raises
    ------
    StateError
        It is not installed: this onionskin was built without it.
    """
    here = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        if (found := here / f"_preload{suffix}").exists():
            return found
    raise StateError(
        f"the preload library is missing in {here}; install onionskin from a wheel, or build it with a C compiler"
    )


class RefusedError(OSError):
    """The library answered that it did not do what it was asked for, and will not."""


class Preload:
    """The connection to the library in one process. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = self._connect()
        self._can_fill = False  # that it was found out

    def _connect(self) -> socket:
        connection = connect_unix(self._path, seconds=SECONDS)
        connection.settimeout(SECONDS)
        return connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Further calls do nothing."""
        self._socket.close()

    def where(self) -> MappedRam:
        """Say where RAM is mapped."""
        return self._ask(_WHERE, "cannot say where its memory is")

    def wait_for_unanswered(self) -> None:
        """Return when nothing is under way that was asked for, and whose answer did not come in time."""
        if self._socket.fileno() < 0:
            self.where()  # it is heard behind that

    def arm(self) -> MappedRam:
        """Have all writes to RAM noted from now on, and what was noted forgotten."""
        return self._ask(_ARM, "cannot note what is written to its memory (Linux 6.7 and permission for userfaultfd)")

    def forget(self, runs: "NDArray[Any]") -> None:
        """Drop what the guest wrote to these runs: they read as the RAM file again.

        They may count as written until they are protected again (`PageTracker.written`).

        Parameters
        ----------
        runs : ndarray of dtypes.PAGE_RUN
            Byte offsets in RAM.

        Raises
        ------
        RefusedError
            The kernel does not drop them.
        OSError, StateError
            No answer came: they may still be dropped later, with what is written to them until then.
        """
        packed = runs.copy()
        packed["end"] -= packed["start"]
        self._ask(_FORGET, "cannot put its memory back", len(runs), packed.tobytes())

    def fill(self, runs: "NDArray[Any]", file: int) -> None:
        """Write to these runs what a file has at their offsets: in the process itself, where each page is copied once.

        Parameters
        ----------
        runs : ndarray of dtypes.PAGE_RUN
            Byte offsets in RAM, and in the file.
        file : int
            An open file.

        Raises
        ------
        RefusedError
            It cannot: the file is shorter, or cannot be read, or the library in the process is an older one.
        OSError, StateError
            No answer came: they may still be written later.
        """
        refused = "cannot write a file to its memory"
        if not self._can_fill:  # an older library would take runs for requests
            self._ask(_FILL, refused)
            self._can_fill = True
        packed = runs.copy()
        packed["end"] -= packed["start"]
        self._ask(_FILL, refused, len(runs), packed.tobytes(), file)

    def _ask(self, verb: int, refused: str, count: int = 0, runs: bytes = b"", file: int | None = None) -> MappedRam:
        try:
            _, status, start, length, is_private, is_armed = self._exchange(verb, count, runs, file)
        except BaseException:
            # What was asked for may still be answered, which must not be taken for the answer to what is asked next. That is
            # heard behind it, on another connection: the library has one at a time.
            self._socket.close()
            raise
        if status:
            import os

            raise RefusedError(-status, f"the hypervisor {refused}: {os.strerror(-status)}")
        return MappedRam(start, length, bool(is_private), bool(is_armed))

    def _exchange(self, verb: int, count: int, runs: bytes, file: int | None) -> tuple[int, ...]:
        if self._socket.fileno() < 0:
            self._socket = self._connect()
        request = _REQUEST.pack(_MAGIC, verb, count)
        if file is not None:
            request = request[send_fds(self._socket, [request], [file]) :]
        self._socket.sendall(request + runs)
        reply = b""
        while len(reply) < _REPLY.size:
            part = self._socket.recv(_REPLY.size - len(reply))
            if not part:
                raise StateError("the hypervisor ended, or its preload library did not understand a request")
            reply += part
        found = _REPLY.unpack(reply)
        if found[0] != _MAGIC:
            raise FormatError("the preload library of the hypervisor is another version; restart the machine")
        return found
