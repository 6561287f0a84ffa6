"""A volume as a raw binary file, for code that wants one (`io.BufferedRandom`, parsers of file systems)."""

import io
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onionskin.volume import Volume


class DiskFile(io.RawIOBase):
    """A seekable file of the volume's size. Closing it flushes a writable volume and leaves it open."""

    def __init__(self, volume: "Volume") -> None:
        self._volume = volume
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return whether the volume is a head."""
        return self._volume.writable

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position, which may pass the end."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._volume.size_bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"position {start + offset} is before the start of the disk")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read at the position; 0 at the end of the disk."""
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._volume.size_bytes - self._position))
        if length:
            self._volume.readinto(self._position, view[:length])
            self._position += length
        return length

    def write(self, data: Any) -> int:
        """Write at the position; a disk does not grow by writing past its end: what fits is written."""
        view = memoryview(data).cast("B")
        length = max(0, min(len(view), self._volume.size_bytes - self._position))
        if len(view) and not length:
            raise OSError(28, "the end of the disk is reached: resize it to write more")
        if length:
            self._volume.write(self._position, view[:length])
            self._position += length
        return length

    def flush(self) -> None:
        """Make what was written durable."""
        if not self.closed and self._volume.writable and not self._volume.closed:
            self._volume.flush()
