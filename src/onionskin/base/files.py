"""Files of the operating system: find where a file holds data, and write all of a buffer.

What must hold: if the system cannot give an answer, that is an error and never a hole. A false hole reads zero in every
copy that is made from it, and no later check can tell.
"""

import os
from collections.abc import Iterator
from errno import EINVAL, EIO, EMFILE, ENFILE, ENOMEM, ENXIO, EOPNOTSUPP

CANNOT_LOOK = frozenset({EMFILE, ENFILE, ENOMEM, EIO})  # errors that say nothing of whether something is there

# The errors by which a file system refuses SEEK_DATA as such: it knows no holes.
_UNKNOWN_TO_FILE_SYSTEM = (EINVAL, EOPNOTSUPP)


def data_ranges(descriptor: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Give the ranges [first, last) of a file between `start` and `stop` that are not holes.

    If the file system cannot tell, all of the file counts as data. Bytes beyond the end of the file count as a hole.
    The end is taken once, when the first range is asked for.

    Raises
    ------
    OSError
        The system did not answer. EIO: the file became shorter meanwhile, so its former contents are not known.
    """
    at = start
    stop = min(stop, os.lseek(descriptor, 0, os.SEEK_END))
    while at < stop:
        found = _next_range(descriptor, at, stop)
        if found is None or found[0] >= stop:
            break
        yield found[0], min(found[1], stop)
        at = found[1]
    refuse_shorter(descriptor, stop)


def _next_range(descriptor: int, at: int, stop: int) -> tuple[int, int] | None:
    """Return the first range of data from `at` on, or None if there is none up to the end of the file."""
    try:
        first = os.lseek(descriptor, at, os.SEEK_DATA)
        last = os.lseek(descriptor, first, os.SEEK_HOLE)
    except OSError as refusal:
        if refusal.errno == ENXIO:  # the file may have been cut meanwhile, too: the caller checks that
            return None
        if refusal.errno not in _UNKNOWN_TO_FILE_SYSTEM:
            raise
        return at, stop
    return first, last if last > first else stop


def refuse_shorter(descriptor: int, size_bytes: int, path: "str | os.PathLike[str] | None" = None) -> None:
    """Raise EIO if a file, or a block device, has fewer bytes than when its size was taken."""
    found = os.lseek(descriptor, 0, os.SEEK_END)
    if found < size_bytes:
        name = os.fspath(path) if path is not None else name_of(descriptor)
        raise OSError(
            EIO, f"the file was cut to {found} of {size_bytes} bytes while it was read; the copy is not complete", name
        )


def name_of(descriptor: int) -> str:
    """Name an open file for a message, as the kernel does."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
    except OSError:
        return f"descriptor {descriptor}"


def write_all(descriptor: int, data: "bytes | memoryview[int]", offset: int = 0) -> None:
    """Write from `offset` of a file on. If the system takes only a part, the write of the rest raises the reason."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def read_all(descriptor: int, length: int, offset: int = 0) -> bytes:
    """Read from `offset` of a file on. There are fewer bytes than asked for only where the file ends before."""
    found = b""
    while len(found) < length and (part := os.pread(descriptor, length - len(found), offset + len(found))):
        found += part
    return found


def is_on_tmpfs(descriptor: int) -> bool:
    """Whether an open file is in memory: a look at a hole of it takes room there."""
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", "rb") as mounts:
        fields = [line.split() for line in mounts]
    return any(one[2].decode() == number and one[one.index(b"-") + 1] == b"tmpfs" for one in fields)
