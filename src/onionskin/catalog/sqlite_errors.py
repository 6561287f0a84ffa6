"""What SQLite reports, as the exceptions of the package: what happened, to which file, and what to do."""

import os
import sqlite3
from contextlib import suppress
from errno import EACCES, EIO, ENOSPC, EROFS
from pathlib import Path

from onionskin.errors import FormatError, StateError

RESTORE = "restore it from a copy of the store"


class CommitUnknownError(StateError):
    """COMMIT failed in a way that does not tell whether it took effect: the catalog must be read again."""


def damaged(path: Path, what: object) -> FormatError:
    """Make the error of a catalog that cannot be believed."""
    return FormatError(f"{path} is damaged: {what}; {RESTORE}")


def _refusal(path: Path) -> int:
    """Say why a file cannot be opened or written: SQLite keeps the errno to itself."""
    with suppress(OSError):
        if os.statvfs(path.parent).f_flag & os.ST_RDONLY:
            return EROFS
    return EACCES


def translated(error: sqlite3.Error, path: Path) -> Exception:
    """Return the exception to raise for what SQLite raised on the catalog at `path`."""
    if isinstance(error, sqlite3.ProgrammingError):  # what this code asks is right, so the connection is closed
        return StateError(f"the store {path.parent} is closed; open it again")
    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if isinstance(code, int) else None
    if primary == sqlite3.SQLITE_FULL:
        return OSError(ENOSPC, "the disk is full; free some room, or discard snapshots", str(path))
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StateError(f"{path} is locked by another process for over a minute; try again when it is done")
    if primary in (
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
    ):
        return OSError(EIO if primary == sqlite3.SQLITE_IOERR else _refusal(path), str(error), str(path))
    if isinstance(error, sqlite3.DatabaseError):
        return damaged(path, error)
    return StateError(f"{path}: {error}")
