"""Opens a catalog that may only be read. If SQLite cannot read it in place, it reads a private copy.

What must hold: nothing is made or written beside the catalog. Data that a crash left in SQLite's log is read too. If
the log has to be applied, or the schema upgraded, this is done to the copy.
"""

import os
import sqlite3
from errno import EACCES, ENOSPC, EROFS
from typing import TYPE_CHECKING

from onionskin.base.lazy import logger
from onionskin.base.paths import FilePath
from onionskin.catalog.sqlite_errors import translated
from onionskin.errors import StateError

if TYPE_CHECKING:
    import tempfile

_log = logger(__name__)

_TRIES = 5


def can_be_written(catalog: FilePath) -> bool:
    """Whether this process may write a catalog, and make files beside it."""
    return all(os.access(path, os.W_OK, effective_ids=True) for path in (catalog, catalog.parent))


def why_not_written(catalog: FilePath) -> tuple[int, str]:
    """Return the reason why a catalog can only be read: an errno, and a text."""
    if _cannot_change(catalog):
        return EROFS, "its file system is mounted read-only"
    if can_be_written(catalog):
        return ENOSPC, "the disk was full to the last block when it was opened; free some room, and open it again"
    return EACCES, f"it belongs to user {catalog.stat().st_uid}, and user {os.geteuid()} may not write it"


def connect_to_read(path: FilePath) -> "tuple[sqlite3.Connection, tempfile.TemporaryDirectory[str] | None]":
    """Connect to a catalog that may only be read; if a copy is read, return its directory too."""
    log = _log_of(path)
    if log.exists() and (log.stat().st_size or not _cannot_change(path)):
        try:
            connection = _connect(path, "mode=ro")
        except sqlite3.Error:
            return copied(path)
        if log.stat().st_size:
            _log.warning("%s is read together with its log, which a crash or another process left there", path)
        return connection, None
    if _cannot_change(path):  # no process can write it, and it is whole
        try:
            return _connect(path, "mode=ro&immutable=1"), None
        except sqlite3.Error as error:
            raise translated(error, path) from error
    return copied(path)


def copied(path: FilePath) -> "tuple[sqlite3.Connection, tempfile.TemporaryDirectory[str]]":
    """Connect to a private copy of a catalog and its log, as they are now."""
    import shutil
    import tempfile

    from onionskin.catalog.beside_sqlite import pieces

    directory = tempfile.TemporaryDirectory(prefix="onionskin-")
    try:
        copy = FilePath(directory.name) / path.name
        for _ in range(_TRIES):
            before = _looks(path)
            with open(copy, "wb") as target:
                target.writelines(pieces(path))
            _log_of(copy).unlink(missing_ok=True)
            if _log_of(path).exists():
                shutil.copyfile(_log_of(path), _log_of(copy), follow_symlinks=False)
            if _looks(path) == before:
                break
        else:
            raise StateError(f"{path} was changed by another process each time that it was copied; try again")
        held = _log_of(copy).stat().st_size if _log_of(copy).exists() else 0
        say = _log.warning if held else _log.info
        say(
            "%s can only be read, so a private copy of it and of the %s bytes of its log is shown, as they are now",
            path,
            held,
        )
        return _connect(copy, "mode=rw"), directory
    except sqlite3.Error as error:
        directory.cleanup()
        raise translated(error, path) from error
    except BaseException:
        directory.cleanup()
        raise


def _connect(path: FilePath, how: str) -> sqlite3.Connection:
    from pathlib import Path  # few stores are read alone

    connection = sqlite3.connect(
        f"{Path(path).absolute().as_uri()}?{how}", uri=True, isolation_level=None, check_same_thread=False, timeout=60
    )
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _cannot_change(path: FilePath) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _log_of(path: FilePath) -> FilePath:
    return path.with_name(f"{path.name}-wal")


def _looks(path: FilePath) -> list[tuple[int, int, int] | None]:
    found: list[tuple[int, int, int] | None] = []
    for one in (path, _log_of(path)):
        try:
            info = one.lstat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((info.st_ino, info.st_size, info.st_mtime_ns))
    return found
