"""The mark of a store: how far its catalog had come when the store was last changed.

A catalog that has not come so far was put back without the files that belong to it: a copy that lacked its log, or one of
another day. What it has no row for would be taken for something that nobody needs, and the files that were made since would
be written over. One that says it is another store's was mixed with the log of that.

What must hold: the mark says nothing that was not durable in the catalog before. So whatever a crash leaves, the catalog has
come as far as the mark or farther, and the mark itself needs no sync. Where there is none, or no whole one, it says nothing.
"""

import os
import stat
from struct import Struct

from onionskin.base.files import read_all, write_all
from onionskin.base.modes import make_file
from onionskin.base.paths import FilePath
from onionskin.catalog.progress import Progress
from onionskin.storage.layout import Layout

_MARK = Struct("<8s16sQQ")
_MAGIC = b"ONIONMRK"
_INVERTED = bytes(range(256))[::-1]  # of each byte: a sum would have each verb load a module for it


def read(path: FilePath) -> Progress | None:
    """Return what a mark says, or None if there is no whole one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = read_all(descriptor, 2 * _MARK.size) if _is_own(descriptor) else b""
    except OSError:
        return None
    finally:
        os.close(descriptor)
    text = found[: _MARK.size]
    if len(text) < _MARK.size or found[_MARK.size :] != text.translate(_INVERTED):
        return None
    magic, *values = _MARK.unpack(text)
    return Progress(*values) if magic == _MAGIC else None


def write(path: FilePath, progress: Progress) -> None:
    """Write how far the catalog has come, which is durable there."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        descriptor = make_file(path)
    try:
        if _is_own(descriptor):
            text = _MARK.pack(_MAGIC, *progress)
            write_all(descriptor, text + text.translate(_INVERTED))
    finally:
        os.close(descriptor)


def why_not_of(progress: Progress, known: Progress, layout: Layout) -> str | None:
    """Return why a catalog that has come so far is not that of a store whose mark says what is known; None: it may be."""
    if known.uuid == progress.uuid and known.lock_bytes <= progress.lock_bytes and known.works <= progress.works:
        return None
    what = (
        "is older than the files beside it: it was put back from a copy, or without the log that belongs to it"
        if known.uuid == progress.uuid
        else "is that of another store than the files beside it, or was mixed with the log (-wal) of another"
    )
    return (
        f"{layout.catalog} {what}; so nothing is changed, dropped or freed in the store, and what can be read may be read. "
        f"Put the {layout.catalog.name} back that belongs to the files, with its -wal, or the whole store from one copy; if "
        f"there is none, remove {layout.mark} to go on with this one: what came after it is lost then"
    )


def _is_own(descriptor: int) -> bool:
    """Whether an open file is a regular one with one name, so nobody else's."""
    found = os.fstat(descriptor)
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1
