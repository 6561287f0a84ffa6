"""What a base is known by, so that nothing goes on over another base, or over one that others wrote to meanwhile.

A file is known by its inode, its size and its time of change. A block device has no such time, so it is known by its size
and by a fingerprint of what it holds at fixed places: writes to these are noticed, and others are not.

What must hold: the fingerprint of the same bytes is the same for ever, since catalogs keep it; docs/format.md describes it.
"""

import os
import stat
from collections.abc import Iterator
from errno import EINVAL, EIO
from typing import Final

from onionskin.base.files import name_of, refuse_shorter
from onionskin.catalog import BaseRow

BaseLooks = tuple[int, int, int]

_ENDS_BYTES: Final = 1 << 20
_PLACES: Final = 64  # between the ends
_PLACE_BYTES: Final = 4096
_PARTITION_BYTES: Final = 128 << 10  # the superblocks of ext4, XFS and btrfs are in it
_PARTITIONS_MAX: Final = 16
_SECTOR_BYTES: Final = 512


def looks_of(descriptor: int) -> BaseLooks:
    """Return the inode, the size in bytes and the time in nanoseconds by which the file of a base is known.

    For a block device, 0 takes the place of the inode, and the fingerprint that of the time.

    Raises
    ------
    OSError
        The device cannot be read, or became shorter meanwhile.
    """
    found = os.fstat(descriptor)
    if not stat.S_ISBLK(found.st_mode):
        return _signed(found.st_ino), found.st_size, _signed(found.st_mtime_ns)
    size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
    return 0, size_bytes, _fingerprint(descriptor, size_bytes)


def _signed(number: int) -> int:
    """Return a number as the catalog can hold it, in 64 bits with a sign: one for each within 584 years of the others.

    Inodes of network and overlay file systems have 64 bits without a sign, and a file may be of a time behind the year 2262.
    """
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def looks_in(base: BaseRow) -> BaseLooks:
    """Return what `looks_of` should say of a base, as the catalog has it."""
    return base.inode, base.size_bytes, base.mtime_ns


def is_device(base: BaseRow) -> bool:
    """Whether a base was a block device when its looks were taken."""
    return base.inode == 0


def what_differs(base: BaseRow) -> str:
    """Say for a message what of a base is not as the catalog has it."""
    if is_device(base):
        return "its size differs, or what the device holds at the places that are looked at"
    return "inode, size or time differ"


def digest_of(descriptor: int) -> bytes:
    """Return the SHA-256 of an open file, or of a block device."""
    import hashlib  # it loads OpenSSL, which few need

    if not stat.S_ISBLK(os.fstat(descriptor).st_mode):
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:  # opened anew, so it has an offset of its own
            return hashlib.file_digest(file, "sha256").digest()
    size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
    digest = hashlib.sha256()
    with _Reader(descriptor) as reader:
        for offset in range(0, size_bytes, _ENDS_BYTES):
            digest.update(reader.read(offset, min(_ENDS_BYTES, size_bytes - offset)))
    refuse_shorter(descriptor, size_bytes)
    return digest.digest()


def _fingerprint(descriptor: int, size_bytes: int) -> int:
    """Return 62 bits of the SHA-256 of what a block device holds at the places that are looked at."""
    import hashlib

    digest = hashlib.sha256()
    with _Reader(descriptor) as reader:
        start = reader.read(0, min(size_bytes, _ENDS_BYTES))
        digest.update(start)
        places = [*_places_between(size_bytes), *_places_of_partitions(bytes(start), size_bytes)]
        for offset, length in places:
            digest.update(reader.read(offset, length))
    refuse_shorter(descriptor, size_bytes)
    return int.from_bytes(digest.digest()[:8], "big") >> 2


def _places_between(size_bytes: int) -> Iterator[tuple[int, int]]:
    """Give the offsets and lengths of the places spread over a device, and that of its end."""
    for number in range(1, _PLACES + 1):
        yield _place(size_bytes * number // (_PLACES + 1), _PLACE_BYTES, size_bytes)
    yield _place(max(0, size_bytes - _ENDS_BYTES), _ENDS_BYTES + _PLACE_BYTES, size_bytes)


def _place(offset: int, length: int, size_bytes: int) -> tuple[int, int]:
    """Return a place that begins on a page, as reads past the page cache want it, and ends on one or with the device."""
    first = offset // _PLACE_BYTES * _PLACE_BYTES
    return first, min(length, size_bytes - first)


def _places_of_partitions(start: bytes, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Give the places where partitions begin, by the tables at the beginning of a disk: a mount changes what is there."""
    found = sorted({offset for offset in (*_in_gpt(start), *_in_mbr(start)) if 0 < offset < size_bytes})
    for offset in found[:_PARTITIONS_MAX]:
        yield _place(offset, _PARTITION_BYTES, size_bytes)


def _in_mbr(start: bytes) -> Iterator[int]:
    """Give where the four partitions of a master boot record begin."""
    if start[510:512] == b"\x55\xaa":
        for entry in range(446, 510, 16):
            yield int.from_bytes(start[entry + 8 : entry + 12], "little") * _SECTOR_BYTES


def _in_gpt(start: bytes) -> Iterator[int]:
    """Give where partitions of a GUID partition table begin. Its header is in the second sector, which may have 4 KiB."""
    for sector_bytes in (_SECTOR_BYTES, 4096):
        header = start[sector_bytes : sector_bytes + 92]
        if header[:8] == b"EFI PART":
            first = int.from_bytes(header[72:80], "little") * sector_bytes
            count, each = (int.from_bytes(header[at : at + 4], "little") for at in (80, 84))
            for entry in range(min(count, 128)):
                at = first + entry * each
                if at + 40 > len(start):
                    break
                yield int.from_bytes(start[at + 32 : at + 40], "little") * sector_bytes


class _Reader:
    """Reads an open device past the page cache, where the device lets it.

    Pages that this process has mapped may be older than the device: a file system that is mounted from it writes past them.
    """

    def __init__(self, descriptor: int) -> None:
        self._through_cache = descriptor
        self._direct = -1

    def __enter__(self) -> "_Reader":
        import mmap

        self._buffer = memoryview(mmap.mmap(-1, _ENDS_BYTES + _PLACE_BYTES))  # it begins on a page
        try:
            path = f"/proc/self/fd/{self._through_cache}"
            self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # it may be read, but not opened again: the cache is read instead
            self._direct = -1
        return self

    def __exit__(self, *_: object) -> None:
        if self._direct >= 0:
            os.close(self._direct)

    def read(self, offset: int, length: int) -> memoryview:
        """Return bytes, which are good until the next call."""
        done = 0
        while done < length:
            part = self._read_part(offset + done, self._buffer[done:length])
            if not part:
                refuse_shorter(self._through_cache, offset + length)
                raise OSError(EIO, "the device ends before its end", name_of(self._through_cache))
            done += part
        return self._buffer[:length]

    def _read_part(self, offset: int, room: memoryview) -> int:
        try:
            if self._direct >= 0:
                try:
                    return os.preadv(self._direct, [room], offset)
                except OSError as error:
                    if (
                        error.errno != EINVAL
                    ):  # a part that does not begin on a sector, or a device that has no direct reads
                        raise
            return os.preadv(self._through_cache, [room], offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, name_of(self._through_cache)) from None
