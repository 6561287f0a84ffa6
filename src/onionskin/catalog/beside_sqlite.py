"""Reads a catalog as a file, beside SQLite.

What must hold: nobody here opens a catalog by its name and closes that. The locks of SQLite are POSIX locks, and the close of
any descriptor of a file gives up all that this process has on it, also those of another thread that has just opened the
catalog. Then another process takes itself for the last one, and removes the log. SQLite keeps its own descriptors open for as
long as it has a lock. So the file is opened by SQLite, and read through a descriptor of SQLite. The log has no locks.
"""

import errno
import fcntl
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, suppress

from onionskin.base.paths import FilePath

_READ_BYTES = 1 << 20


def pieces(path: FilePath) -> Iterator[bytes]:
    """Yield the bytes of a catalog from its beginning on, in pieces. A read that fails raises its OSError."""
    from pathlib import Path  # this is seldom

    looks = path.stat()
    if not stat.S_ISREG(looks.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    uri = f"{Path(path).absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)):
        offset, descriptor = 0, -1
        while True:
            if not _is_of(descriptor, looks):
                descriptor = _descriptor_of(path, looks)
            try:
                read = os.pread(descriptor, _READ_BYTES, offset)
            except OSError:
                if _is_of(descriptor, looks):
                    raise
                continue
            if not _is_of(descriptor, looks):  # it was that of another thread, which has closed it meanwhile
                continue
            if not read:
                return
            yield read
            offset += len(read)


def _descriptor_of(path: FilePath, looks: os.stat_result) -> int:
    """Return a descriptor that this process has of a file, which can be read."""
    for entry in os.listdir("/proc/self/fd"):
        descriptor = int(entry)
        if _is_of(descriptor, looks):
            return descriptor
    raise FileNotFoundError(errno.ENOENT, "another file was put in its place meanwhile", str(path))


def _is_of(descriptor: int, looks: os.stat_result) -> bool:
    with suppress(OSError):
        found = os.fstat(descriptor) if descriptor >= 0 else None
        if found is not None and (found.st_dev, found.st_ino) == (looks.st_dev, looks.st_ino):
            return not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_PATH
    return False
