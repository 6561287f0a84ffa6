"""Finds the first difference of two disks. A disk here is anything that has a size, can be read, and knows its data
ranges.

What must hold: bytes outside a disk's data ranges read zero, so only the ranges of the two disks are compared. If the
sizes differ, the shorter disk reads zero past its end.
"""

import os
from collections.abc import Iterable, Iterator
from errno import EIO
from typing import TYPE_CHECKING, Any, Protocol

from onionskin.base.files import data_ranges, refuse_shorter
from onionskin.base.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    from onionskin.base.lazy import numpy as np

_CHUNK_BYTES = 4 << 20


class Disk(Protocol):
    """A disk that can be compared."""

    @property
    def size_bytes(self) -> int:
        """The size of the disk."""

    def readinto(self, offset: int, buffer: Any) -> int:
        """Fill a buffer from `offset` on. The whole range lies in the disk."""

    def ranges(self) -> Iterable[tuple[int, int]]:
        """Return the ranges [first, last) that may be other than zero, in order."""


class RawFile:
    """An open raw image file or block device."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size_bytes = os.lseek(descriptor, 0, os.SEEK_END)

    def readinto(self, offset: int, buffer: Any) -> int:
        """Fill a buffer. OSError is raised if the file became shorter."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            length = os.preadv(self.descriptor, [view[done:]], offset + done)
            if length == 0:
                refuse_shorter(self.descriptor, self.size_bytes)
                raise OSError(EIO, f"the image cannot be read from byte {offset + done} on")
            done += length
        return done

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Return the ranges that are not holes."""
        return data_ranges(self.descriptor, 0, self.size_bytes)


def first_difference(a: Disk, b: Disk, progress: Progress | None = None) -> int | None:
    """Return the offset of the first byte that differs, or None if all bytes are the same.

    Parameters
    ----------
    a, b : Disk
        Nobody writes to them meanwhile.
    progress : callable, optional
        Called with the offset so far and the size.

    Raises
    ------
    OSError
        One of the disks cannot be read.
    """
    total = max(a.size_bytes, b.size_bytes)
    buffers = np.empty((2, _CHUNK_BYTES), dtype=np.uint8)
    for start, stop in _union([*a.ranges()], [*b.ranges()]):
        for at in range(start, stop, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, stop - at)
            ours, theirs = (_fill(disk, at, row[:length]) for disk, row in zip((a, b), buffers, strict=True))
            if not np.array_equal(ours, theirs):
                return at + int(np.flatnonzero(ours != theirs)[0])
            if progress is not None:
                progress(at + length, total)
    return None


def _fill(disk: Disk, at: int, row: "npt.NDArray[np.uint8]") -> "npt.NDArray[np.uint8]":
    inside = max(0, min(len(row), disk.size_bytes - at))
    if inside:
        disk.readinto(at, row[:inside])
    row[inside:] = 0
    return row


def _union(*lists: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the union of the ranges of all lists, in order and without overlap."""
    ranges = sorted(one for listed in lists for one in listed)
    if not ranges:
        return
    start, stop = ranges[0]
    for first, last in ranges[1:]:
        if first > stop:
            yield start, stop
            start, stop = first, last
        stop = max(stop, last)
    yield start, stop
