"""Makes the index of SQLite's log so that btrfs overwrites it in place.

What must hold: a full disk does not end the process. SQLite writes its index through a mapping. If a file system puts
each page that is written to a new place, such a write finds no room on a full disk, and the process gets SIGBUS. A file
that is overwritten in place has its blocks already. The attribute for this has to be set before the file has any block.
"""

import fcntl
import os
import stat
from contextlib import suppress

from onionskin.base.paths import FilePath

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS and FS_IOC_SETFLAGS of <linux/fs.h>
_NOCOW = 0x00800000


def make_index_in_place(catalog: FilePath) -> None:
    """Make the index of a catalog's log, if there is none, as a file that btrfs overwrites in place."""
    index = catalog.with_name(f"{catalog.name}-shm")
    with suppress(OSError):  # if this fails, SQLite makes the index
        if os.statvfs(catalog.parent).f_files or index.exists():  # btrfs counts no inodes
            return
        found = catalog.stat()
        descriptor = os.open(
            index, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, stat.S_IMODE(found.st_mode)
        )
        import struct  # this is seldom

        try:
            if os.geteuid() == 0:  # the owner of the catalog has to be able to use it; SQLite does the same
                os.fchown(descriptor, found.st_uid, found.st_gid)
            (flags,) = struct.unpack("l", fcntl.ioctl(descriptor, _GET_FLAGS, bytes(struct.calcsize("l"))))
            fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("l", flags | _NOCOW))
        finally:
            os.close(descriptor)
