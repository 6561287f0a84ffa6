"""The nodes of block devices: the one that the kernel names, devices that lie in each other, and whether one is in use.

What must hold: a device may have any number of nodes and links, and a lock lies on a node. So all who lock a device lock the
node that the kernel names, where there is one.
"""

import errno
import os
import stat
from contextlib import suppress
from typing import Final

from onionskin.base.paths import FilePath

_LOOKING: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def directory_of(number: int) -> str:
    """Return the directory in which the system describes a block device."""
    return f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"


def open_at_own_node(descriptor: int) -> int:
    """Return an open file, or, for a block device, one of the node that the kernel names; the given one is closed then.

    If that node is not there, is another device's, or may not be opened, the given one is returned.
    """
    found = os.fstat(descriptor)
    own = open_own_node(found.st_rdev) if stat.S_ISBLK(found.st_mode) else -1
    if own < 0:
        return descriptor
    os.close(descriptor)
    return own


def open_own_node(number: int, mode: int = os.O_RDONLY) -> int:
    """Open the node that the kernel names for a block device, or return -1: `open_at_own_node` says when."""
    try:
        with open(f"{directory_of(number)}/uevent") as about:
            name = next((line[8:].strip() for line in about if line.startswith("DEVNAME=")), "")
        own = os.open(f"/dev/{name}", _LOOKING | os.O_NOFOLLOW | mode)
    except OSError:
        return -1
    found = os.fstat(own)
    if stat.S_ISBLK(found.st_mode) and found.st_rdev == number:
        return own
    os.close(own)
    return -1


def is_claimed(descriptor: int) -> bool:
    """Whether a block device is mounted, swapped to, part of another device, or claimed by a program (O_EXCL).

    False too where it cannot be opened again.
    """
    try:
        os.close(os.open(f"/proc/self/fd/{descriptor}", _LOOKING | os.O_EXCL))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def mount_point_of(number: int) -> str | None:
    """Return where a block device is mounted, as far as this process sees it."""
    device = b"%d:%d" % (os.major(number), os.minor(number))
    with open("/proc/self/mountinfo", "rb") as mounts:
        found = next((fields[4] for line in mounts if (fields := line.split())[2] == device), None)
    return None if found is None else os.fsdecode(found)


def devices_written_with(number: int) -> set[int]:
    """Return the numbers of the devices whose bytes change where one is written: those it lies on, in, or has in it."""
    found: set[int] = set()
    pending = [FilePath(directory_of(number)).resolve()]
    while pending:
        disk = pending.pop()
        found.add(_number_in(disk))
        if _is_partition(disk):
            disk = disk.parent  # its other partitions are not written
            found.add(_number_in(disk))
        else:
            found |= {
                _number_in(each) for name in os.listdir(disk) if _is_partition(each := FilePath(f"{disk}/{name}"))
            }
        with suppress(FileNotFoundError):
            pending += [FilePath(f"{disk}/slaves/{name}").resolve() for name in os.listdir(f"{disk}/slaves")]
    return found


def _is_partition(directory: FilePath) -> bool:
    return FilePath(f"{directory}/partition").exists()


def _number_in(directory: FilePath) -> int:
    with open(f"{directory}/dev") as text:
        major, _, minor = text.read().partition(":")
    return os.makedev(int(major), int(minor))
