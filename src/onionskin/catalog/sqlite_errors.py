"""Turns errors of SQLite into exceptions of the package, which say what happened, to which file, and what to do."""

import os
import sqlite3
import threading
from contextlib import closing, suppress
from errno import EACCES, EDQUOT, EFBIG, EIO, EISDIR, EMFILE, ENFILE, ENOSPC, EROFS, ESHUTDOWN
from typing import TYPE_CHECKING

from onionskin.base.paths import FilePath
from onionskin.errors import FormatError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LOG_BYTES = 128 << 10  # less room than this is too little for SQLite's log and its index
RESTORE = "restore it from a copy of the store"
_READ_BYTES = 1 << 20
_LOOK_AT_DISK = "look at the disk (dmesg), mend it, and try again; nothing says that the contents are wrong"


class CommitUnknownError(StateError):
    """COMMIT failed, and it is not known whether it took effect: the catalog must be read again."""


def damaged(path: FilePath, what: object) -> FormatError:
    """Make the error of a damaged catalog."""
    return FormatError(f"{path} is damaged: {what}; {RESTORE}")


def _refusal(path: FilePath, otherwise: int) -> int:
    """Find out why a file cannot be opened or written: SQLite does not report the errno.

    A disk that is full to the last block, or the last inode, has no room for SQLite's log or its index. SQLite reports
    both failures as a fault of the medium, or as a file that cannot be opened. So this function tries to make such
    files.
    """
    with suppress(OSError):
        if path.is_dir():
            return EISDIR
        found = os.statvfs(path.parent)
        if found.f_flag & os.ST_RDONLY:
            return EROFS
        if found.f_bavail * found.f_frsize < _LOG_BYTES or (found.f_files and not found.f_favail):
            return ENOSPC
    refused = _cannot_make(path, 2)
    return refused if refused in (ENOSPC, EDQUOT, EFBIG, EMFILE, ENFILE, EIO) else otherwise


def _is_shut_down(path: FilePath) -> bool:
    """Whether the file system of a file does no I/O any more: it was shut down, or its device is gone.

    What SQLite still reads then comes from memory, where parts may be missing, and looks like damage.
    """
    try:
        os.close(os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        return error.errno in (EIO, ESHUTDOWN)
    return False


def _cannot_be_read(path: FilePath, primary: int | None) -> str | None:
    """Return what to say where the disk could not read a part of a catalog or of its log; None: what is in them is wrong.

    Where a read fails with EIO, SQLite says that the file is damaged, as if other bytes had been read
    (SQLITE_IOERR_CORRUPTFS). So the files are read again. If all of them can be read by now, and SQLite finds nothing wrong,
    the read failed once.
    """
    if primary not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return None
    from onionskin.catalog.beside_sqlite import pieces  # this is seldom

    for file, read_pieces in ((path, pieces), (path.with_name(f"{path.name}-wal"), _pieces_of_log)):
        offset = _unreadable_at(file, read_pieces)
        if offset is not None:
            return f"the disk cannot read {file.name} (I/O error at byte {offset}); {_LOOK_AT_DISK}"
    if primary == sqlite3.SQLITE_CORRUPT and _is_sound(path):
        return f"a part of it could not be read for a moment (I/O error); {_LOOK_AT_DISK}"
    return None


def _unreadable_at(path: FilePath, read_pieces: "Callable[[FilePath], Iterator[bytes]]") -> int | None:
    """Return from where on a file of SQLite cannot be read; None: all of it can, or nobody can tell."""
    offset = 0
    try:
        for piece in read_pieces(path):
            offset += len(piece)
    except OSError as error:
        return offset if error.errno == EIO else None
    except sqlite3.Error as error:  # SQLite reads the beginning as it opens a file
        return 0 if primary_code(error) == sqlite3.SQLITE_IOERR else None
    return None


def _pieces_of_log(path: FilePath) -> "Iterator[bytes]":
    """Yield the bytes of SQLite's log, on which nobody has a lock that would be given up by a close."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    offset = 0
    try:
        while piece := os.pread(descriptor, _READ_BYTES, offset):
            yield piece
            offset += len(piece)
    finally:
        os.close(descriptor)


def _is_sound(path: FilePath) -> bool:
    """Whether SQLite finds nothing wrong in a catalog, which is only read: its log is not moved either."""
    from pathlib import Path  # this is seldom

    try:
        uri = f"{Path(path).absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            return bool(connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",))
    except (sqlite3.Error, UnicodeDecodeError):
        return False


def _cannot_make(path: FilePath, count: int) -> int:
    """Try to make `count` files as large as SQLite's log beside the catalog. Return 0, or the errno of the first failure.

    The files are removed again.

    Space that a file system reports as free may be reserved, under a quota, or in pieces that are too small.
    """
    if not count:
        return _cannot_open(path.parent)
    probe = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.{count}.probe")
    try:
        descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        return error.errno or 0
    try:
        os.posix_fallocate(descriptor, 0, _LOG_BYTES)
        return _cannot_make(path, count - 1)
    except OSError as error:
        return error.errno or 0
    finally:
        os.close(descriptor)
        probe.unlink()


def _cannot_open(path: FilePath) -> int:
    """Return 0, or the errno of a try to open the file: the catalog needs a descriptor besides those of its log and index."""
    try:
        os.close(os.open(path, os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        return error.errno or 0
    return 0


def primary_code(error: sqlite3.Error) -> int | None:
    """Return SQLite's code for the kind of an error, if SQLite gave one."""
    code = getattr(error, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else None


def translated(error: sqlite3.Error, path: FilePath) -> Exception:
    """Return the exception to raise for an error of SQLite on the catalog at `path`."""
    if isinstance(error, sqlite3.ProgrammingError):  # the call itself is right, so the connection is closed
        return StateError(f"the store {path.parent} is closed; open it again")
    primary = primary_code(error)
    if primary == sqlite3.SQLITE_FULL:
        return OSError(ENOSPC, "the disk is full; free some room, or discard snapshots", str(path))
    if primary == sqlite3.SQLITE_PROTOCOL:  # the head of the log's index is half written, and its writer does not go on
        return StateError(f"{path} is being changed by another process, which does not go on; try again when it does")
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StateError(f"{path} has been locked by another process for over a minute; try again when it is done")
    if primary in (
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
    ):
        number = _refusal(path, EIO if primary == sqlite3.SQLITE_IOERR else EACCES)
        # SQLite's message describes its own step. It would mislead where the reason is known.
        what = str(error) if number in (EIO, EACCES) else os.strerror(number)
        return OSError(number, f"{what}; {_LOOK_AT_DISK}" if number == EIO else what, str(path))
    if isinstance(error, sqlite3.DatabaseError):
        if _is_shut_down(path):
            return OSError(EIO, "the file system does no I/O any more; mend it, and open the store again", str(path))
        if unread := _cannot_be_read(path, primary):
            return OSError(EIO, unread, str(path))
        return damaged(path, error)
    return StateError(f"{path}: {error}")
