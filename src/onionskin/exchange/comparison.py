"""Finds the first difference of two disks. A disk here is anything that has a size, can be read, and knows its data
ranges.

What must hold: bytes outside a disk's data ranges read zero, so only the ranges of the two disks are compared. If the
sizes differ, the shorter disk reads zero past its end.
"""

import os
from collections.abc import Iterable, Iterator
from errno import EIO
from itertools import compress, count
from operator import ne
from typing import Any, Protocol

from onionskin.base.files import data_ranges, refuse_shorter
from onionskin.base.progress import Progress
from onionskin.kernels._copy import split_same
from onionskin.kernels._extents import Extents

_CHUNK_BYTES = 4 << 20
_BLOCK_BYTES = 4096  # where one of them differs, its bytes are looked at one by one


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
    ranges = Extents(a.ranges()).over(Extents(b.ranges())).ranges()
    buffers = [memoryview(bytearray(min(_CHUNK_BYTES, ranges.total_bytes))) for _ in (a, b)]
    for start, length, *_ in ranges:
        for at in range(start, start + length, _CHUNK_BYTES):
            wanted = min(_CHUNK_BYTES, start + length - at)
            ours, theirs = (_fill(disk, at, buffer[:wanted]) for disk, buffer in zip((a, b), buffers, strict=True))
            different = [one for one, _, is_same in split_same(ours, theirs, _BLOCK_BYTES) if not is_same]
            if different:
                return at + next(compress(count(different[0]), map(ne, ours[different[0] :], theirs[different[0] :])))
            if progress is not None:
                progress(at + wanted, total)
    return None


def _fill(disk: Disk, at: int, room: memoryview) -> memoryview:
    inside = max(0, min(len(room), disk.size_bytes - at))
    if inside:
        disk.readinto(at, room[:inside])
    room[inside:] = bytes(len(room) - inside)
    return room
