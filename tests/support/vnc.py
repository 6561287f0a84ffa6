"""A VNC client that stays connected and counts the updates of the screen that it is given (RFB 3.8, raw pixels)."""

import socket
import struct
import threading
from pathlib import Path
from typing import Self

from onionskin.base.sockets import connect_unix

_RAW, _DESKTOP_SIZE = 0, -223


class VncClient:
    """Asks for update after update, in a thread of its own. A context manager."""

    def __init__(self, path: Path, *, seconds: float = 300) -> None:
        self._seconds = seconds
        self._socket = connect_unix(path, seconds=seconds)
        self._news = threading.Condition()
        self._is_open = True
        self._frames = 0
        self._pixels = 0
        self._greet()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_open:
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    @property
    def is_open(self) -> bool:
        with self._news:
            return self._is_open

    def wait_frames(self, more: int = 1) -> None:
        """Return once so many more updates have come over the one connection, each with pixels that changed."""
        with self._news:
            goal = self._frames + more
            came = self._news.wait_for(lambda: self._frames >= goal or not self._is_open, self._seconds)
            assert self._is_open, "the connection of the VNC client has ended"
            assert came, f"the VNC client was given {goal - self._frames} updates too few"

    def _exactly(self, length: int) -> bytes:
        parts = b""
        while len(parts) < length:
            part = self._socket.recv(length - len(parts))
            if not part:
                raise EOFError
            parts += part
        return parts

    def _greet(self) -> None:
        assert self._exactly(12) == b"RFB 003.008\n"
        self._socket.sendall(b"RFB 003.008\n")
        kinds = self._exactly(self._exactly(1)[0])
        assert 1 in kinds, kinds  # no password
        self._socket.sendall(b"\1")
        assert self._exactly(4) == bytes(4)
        self._socket.sendall(b"\1")  # shared
        self._width, self._height, form, length = struct.unpack(">HH16sI", self._exactly(24))
        self._pixel_bytes = form[0] // 8
        self._exactly(length)
        self._socket.sendall(struct.pack(">BxHii", 2, 2, _RAW, _DESKTOP_SIZE))

    def _ask(self, *, whole: bool) -> None:
        self._socket.sendall(struct.pack(">BBHHHH", 3, not whole, 0, 0, self._width, self._height))

    def _read(self) -> None:
        try:
            self._ask(whole=True)
            while True:
                self._take(self._exactly(1)[0])
        except (EOFError, OSError):
            with self._news:
                self._is_open = False
                self._news.notify_all()

    def _take(self, kind: int) -> None:
        if kind == 1:  # colours
            self._exactly(6 * struct.unpack(">xHH", self._exactly(5))[1])
        elif kind == 3:  # text that was cut
            self._exactly(struct.unpack(">3xI", self._exactly(7))[0])
        elif kind == 0:
            pixels = sum(self._rectangle() for _ in range(struct.unpack(">xH", self._exactly(3))[0]))
            with self._news:
                self._frames += bool(pixels)
                self._news.notify_all()
            self._ask(whole=not pixels)  # behind another size of the screen, all of it
        else:
            assert kind == 2, f"a message of kind {kind}"  # the bell

    def _rectangle(self) -> int:
        """Take one, and return how many pixels it has."""
        _, _, width, height, encoding = struct.unpack(">HHHHi", self._exactly(12))
        if encoding == _DESKTOP_SIZE:
            self._width, self._height = width, height
            return 0
        assert encoding == _RAW, encoding
        self._exactly(width * height * self._pixel_bytes)
        return width * height
