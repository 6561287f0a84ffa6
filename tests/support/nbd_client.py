"""The least of an NBD client: what a test needs to write, to read, and to know what was acknowledged when."""

import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Self

READ, WRITE, DISCONNECT, FLUSH, TRIM = 0, 1, 2, 3, 4
_OPTION_GO = 7
_STARTTLS = 5


class NbdClient:
    """One connection to one export; calls block until the server has answered."""

    def __init__(self, connection: socket.socket, export: str) -> None:
        self.connection = connection
        self._handle = 0
        try:
            self.greet()
            self.go(export)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def unix(cls, path: Path, export: str) -> Self:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(300)
        connection.connect(str(path))
        return cls(connection, export)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        with suppress(OSError):
            self._send(DISCONNECT, 0, 0)
        self.connection.close()

    def take(self, length: int) -> bytes:
        parts = []
        while length:
            part = self.connection.recv(length)
            if not part:
                raise ConnectionResetError("the server closed the connection")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def greet(self) -> None:
        assert self.take(16) == b"NBDMAGICIHAVEOPT"
        self.take(2)
        self.connection.sendall(struct.pack(">I", 3))

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option and return its replies, the last one included: (type, data)."""
        self.connection.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        replies = []
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self.take(20))
            assert (magic, option) == (0x3E889045565A9, number)
            replies.append((kind, self.take(length)))
            if kind == 1 or kind & 1 << 31:
                return replies

    def go(self, export: str) -> None:
        name = export.encode()
        replies = self.option(_OPTION_GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
        if replies[-1][0] != 1:
            raise ConnectionRefusedError(f"no export {export!r}: {replies[-1]}")
        for kind, data in replies:
            if kind == 3 and data[:2] == b"\0\0":
                self.size_bytes, self.flags = struct.unpack(">QH", data[2:12])

    def _send(self, verb: int, offset: int, length: int, data: bytes = b"") -> None:
        self._handle += 1
        self.connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, verb, self._handle, offset, length) + data)

    def _call(self, verb: int, offset: int, length: int, data: bytes = b"") -> bytes:
        self._send(verb, offset, length, data)
        magic, error, handle = struct.unpack(">IIQ", self.take(16))
        assert (magic, handle) == (0x67446698, self._handle)
        if error:
            raise OSError(error, f"the server answered with error {error}")
        return self.take(length) if verb == READ else b""

    def read(self, offset: int, length: int) -> bytes:
        return self._call(READ, offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self._call(WRITE, offset, len(data), data)

    def trim(self, offset: int, length: int) -> None:
        self._call(TRIM, offset, length)

    def flush(self) -> None:
        self._call(FLUSH, 0, 0)
