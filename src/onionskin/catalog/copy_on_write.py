"""Makes the index of SQLite's log so that btrfs overwrites it in place, and sees to it that its quotas have room for that.

What must hold: a full disk does not end the process. SQLite writes its index through a mapping. If a file system puts
each page that is written to a new place, such a write finds no room on a full disk, and the process gets SIGBUS. A file
that is overwritten in place has its blocks already. The attribute for this has to be set before the file has any block.

The quotas of btrfs count what may be needed of metadata for such a write, hundreds of KiB for a page, also where the page is
overwritten in place. So where there are quotas, nothing is changed unless there is room for more than a commit writes.
"""

import fcntl
import os
import stat
import time
from contextlib import suppress
from errno import EDQUOT, ENOSPC

from onionskin.base.paths import FilePath

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS and FS_IOC_SETFLAGS of <linux/fs.h>
_NOCOW = 0x00800000
_FS_INFO = 0x8400941F  # BTRFS_IOC_FS_INFO of <linux/btrfs.h>; the file system's UUID stands at byte 16
_FS_INFO_BYTES = 1024
QUOTA_ROOM_BYTES = 4 << 20


def has_quotas(directory: FilePath) -> bool:
    """Whether a directory lies on a btrfs that has quotas."""
    with suppress(OSError):
        if os.statvfs(directory).f_files:  # btrfs counts no inodes
            return False
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = fcntl.ioctl(descriptor, _FS_INFO, bytes(_FS_INFO_BYTES))
        finally:
            os.close(descriptor)
        text = found[16:32].hex()
        uuid = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
        return FilePath(f"/sys/fs/btrfs/{uuid}/qgroups").exists()
    return False


def refuse_without_room(catalog: FilePath, size_bytes: int = QUOTA_ROOM_BYTES) -> None:
    """Raise OSError (ENOSPC or EDQUOT) where there is no room for so much beside a catalog."""
    try:
        descriptor = os.open(catalog.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            raise OSError(error.errno, os.strerror(error.errno), str(catalog)) from None


def make_index_in_place(catalog: FilePath) -> None:
    """Make the index of a catalog's log, if there is none, as a file that btrfs overwrites in place.

    It gets its name when it is closed here: SQLite has POSIX locks on it, and another thread may open it as soon as it is
    there; the close of any descriptor would give up the locks of that thread.
    """
    index = catalog.with_name(f"{catalog.name}-shm")
    with suppress(OSError):  # if this fails, SQLite makes the index
        if os.statvfs(catalog.parent).f_files or index.exists():  # btrfs counts no inodes
            return
        staged = catalog.with_name(f"{index.name}.{os.getpid()}.{time.monotonic_ns()}.new")
        try:
            _make_in_place(staged, catalog.stat())
            os.link(staged, index)
        finally:
            staged.unlink(missing_ok=True)


def _make_in_place(path: FilePath, like: os.stat_result) -> None:
    descriptor = os.open(
        path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, stat.S_IMODE(like.st_mode)
    )
    import struct  # this is seldom

    try:
        if os.geteuid() == 0:  # the owner of the catalog has to be able to use it; SQLite does the same
            os.fchown(descriptor, like.st_uid, like.st_gid)
        (flags,) = struct.unpack("l", fcntl.ioctl(descriptor, _GET_FLAGS, bytes(struct.calcsize("l"))))
        fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("l", flags | _NOCOW))
    finally:
        os.close(descriptor)
