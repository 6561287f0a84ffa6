"""Shows a volume as a raw binary file to code that needs one: `io.BufferedRandom`, archives, parsers of file systems.

What must hold: it behaves as `open(path, "r+b", buffering=0)` does on a file that cannot change its size, as a block
device cannot: past the end, reads find nothing and writes have no room. It has no descriptor.
"""

import io
import operator
import os
from errno import EINVAL, ENOSPC
from typing import Any, Protocol, SupportsIndex


class ByteDisk(Protocol):
    """What a `DiskFile` needs of its disk. A volume has all of it."""

    @property
    def size_bytes(self) -> int:
        """Size of the disk in bytes."""

    @property
    def writable(self) -> bool:
        """Whether it can be written."""

    @property
    def closed(self) -> bool:
        """Whether it was closed."""

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on."""

    def readinto(self, offset: int, buffer: Any) -> int:
        """Fill a writable buffer from `offset` on; returns its length in bytes."""

    def write(self, offset: int, data: Any) -> int:
        """Write a buffer at `offset`; returns its length in bytes."""

    def flush(self) -> None:
        """Make everything that was written before the call durable."""


class DiskFile(io.RawIOBase):
    """A seekable file of the volume's size, with a position of its own. Made by `Volume.open_file`.

    `flush` and `close` make a writable volume's data durable, and leave the volume open. A file that is dropped and then
    garbage-collected flushes nothing. A view of a snapshot can only be read. One thread at a time may use the file.
    """

    def __init__(self, volume: ByteDisk) -> None:
        self._volume = volume
        self._position = 0
        self._collected = False

    def __repr__(self) -> str:
        return f"<DiskFile of {self._volume!r}{', closed' if self.closed else ''}>"

    def __del__(self) -> None:
        """Do not flush: the collector may run in the middle of a snapshot, and a flush would wait for that."""

    def _dealloc_warn(self, source: object) -> None:
        """Note that the collector will close this file. The io module calls this when it collects a buffer over it."""
        self._collected = True

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def _check_writable(self) -> None:
        self._check_open()
        if not self._volume.writable:
            raise io.UnsupportedOperation("a view of a snapshot cannot be written; open the volume itself")

    def _bytes_left(self) -> int:
        return max(0, self._volume.size_bytes - self._position)

    @property
    def mode(self) -> str:
        """Return "rb+" over a head, "rb" over a view."""
        return "rb+" if self._volume.writable else "rb"

    def readable(self) -> bool:
        """Return True."""
        self._check_open()
        return True

    def writable(self) -> bool:
        """Return whether the volume is a head."""
        self._check_open()
        return self._volume.writable

    def seekable(self) -> bool:
        """Return True."""
        self._check_open()
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position, which may be behind the end, and return it. Before the start it is an OSError (EINVAL)."""
        self._check_open()
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._volume.size_bytes}
        if whence not in starts:
            raise OSError(EINVAL, f"whence is SEEK_SET, SEEK_CUR or SEEK_END, not {whence}; Volume.extents finds holes")
        position = starts[whence] + operator.index(offset)
        if position < 0:
            raise OSError(EINVAL, f"position {position} is before the start of the disk")
        self._position = position
        return position

    def read(self, size: "int | None" = -1, /) -> bytes:
        """Return at most `size` bytes from the position on. If `size` is negative or None, return all up to the end."""
        self._check_open()
        length = self._bytes_left()
        if size is not None and operator.index(size) >= 0:
            length = min(length, size)
        data = self._volume.read(self._position, length) if length else b""
        self._position += length
        return data

    def readall(self) -> bytes:
        """Return all bytes from the position to the end."""
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        """Fill a writable buffer of any format from the position on. Return the bytes read, which are fewer at the end."""
        self._check_open()
        view = memoryview(buffer)
        if view.readonly:
            raise TypeError(f"readinto needs a buffer that can be written, not {type(buffer).__name__}")
        if not 0 < view.nbytes <= self._bytes_left():
            return io.BytesIO(self.read(view.nbytes)).readinto(buffer)
        length = self._volume.readinto(self._position, buffer)
        self._position += length
        return length

    def write(self, data: Any, /) -> int:
        """Write at the position. Return the bytes written, which are fewer if the end of the disk is reached.

        Raises
        ------
        OSError
            ENOSPC: the position is at the end of the disk or behind it, or there is no room for the data.
        UnsupportedOperation
            The volume is a view of a snapshot.
        """
        self._check_writable()
        view = memoryview(data)
        left = self._bytes_left()
        if view.nbytes == 0:
            return 0
        if left == 0:
            raise OSError(ENOSPC, "the end of the disk is reached; make it larger with Volume.resize")
        length = self._volume.write(self._position, data if view.nbytes <= left else view.tobytes()[:left])
        self._position += length
        return length

    def truncate(self, size: "SupportsIndex | None" = None, /) -> int:
        """Return `size` if the disk has that size; else raise UnsupportedOperation. `Volume.resize` changes the size."""
        self._check_writable()
        wanted = self._position if size is None else operator.index(size)
        if wanted != self._volume.size_bytes:
            raise io.UnsupportedOperation(
                f"a file cannot make a disk of {self._volume.size_bytes} bytes one of {wanted}; use Volume.resize"
            )
        return wanted

    def flush(self) -> None:
        """Make what was written durable, here and through the volume."""
        self._check_open()
        if self._volume.writable and not self._volume.closed and not self._collected:
            self._volume.flush()
