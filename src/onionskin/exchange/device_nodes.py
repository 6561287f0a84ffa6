"""The nodes of block devices: the one that the kernel names, which devices and files share bytes, and whether one is in use.

What must hold: a device may have any number of nodes and links, and a lock lies on a node. So all who lock a device lock the
node that the kernel names, where there is one. Two that share bytes are found to, also where the file of a loop device has
another name by now, or where loop devices lie on each other; two that do not may be found to where they lie in one file.
"""

import errno
import os
import stat
import struct
from contextlib import suppress
from typing import Final

from onionskin.base.named_tuples import NamedTuple
from onionskin.base.paths import FilePath

DEVICE: Final = -1
Identity = tuple[int, int]  # the device and the inode of a file; DEVICE and the number of a block device

_LOOKING: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_INFO_BYTES: Final = 232


class LoopFile(NamedTuple):
    """What a loop device reads and writes: a file, or another block device."""

    path: str  # as the kernel names it; that name may be gone
    identity: Identity


class Below(NamedTuple):
    """What is written where a block device is: devices, by their numbers, and files of loop devices."""

    devices: set[int]
    files: list[LoopFile]


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


def open_own_node(number: int) -> int:
    """Open the node that the kernel names for a block device, or return -1: `open_at_own_node` says when."""
    try:
        with open(f"{directory_of(number)}/uevent") as about:
            name = next((line[8:].strip() for line in about if line.startswith("DEVNAME=")), "")
        own = os.open(f"/dev/{name}", _LOOKING | os.O_NOFOLLOW)
    except OSError:
        return -1
    return _if_it_is(own, (DEVICE, number))


def open_loop_file(file: LoopFile) -> int:
    """Open the file of a loop device to look at it, or return -1 if it has another name by now, or may not be opened."""
    try:
        return _if_it_is(os.open(file.path, _LOOKING | os.O_NOFOLLOW), file.identity)
    except OSError:
        return -1


def _if_it_is(descriptor: int, identity: Identity) -> int:
    if identity_of(os.fstat(descriptor)) == identity:
        return descriptor
    os.close(descriptor)
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
    if found is None:
        return None
    for escaped in (
        b"\\040",
        b"\\011",
        b"\\012",
        b"\\134",
    ):  # all that the kernel escapes; the backslash itself comes last
        found = found.replace(escaped, bytes([int(escaped[1:], 8)]))
    return os.fsdecode(found)


def identity_of(found: os.stat_result) -> Identity:
    """Return by what a file, or a block device with all of its nodes, is told from others."""
    return (DEVICE, found.st_rdev) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)


def share_bytes(one: Identity, other: Identity) -> bool:
    """Whether of two files or block devices one changes where the other is written."""
    if one == other or DEVICE not in (one[0], other[0]):
        return one == other
    return share_devices(one, other) or not files_of(one).isdisjoint(files_of(other))


def share_devices(one: Identity, other: Identity) -> bool:
    """Whether one of two is a device that the other is, lies on, lies in, or has in it."""
    return any(
        x in written_with(y).devices for a, b in ((one, other), (other, one)) for x in in_turn(a) for y in in_turn(b)
    )


def in_turn(identity: Identity) -> list[int]:
    """Return a device, the one that it is a loop device over, and so on; of a file none."""
    found = []
    while identity[0] == DEVICE and identity[1] not in found:
        found.append(identity[1])
        behind = _loop_file(FilePath(directory_of(identity[1])).resolve())
        if behind is None:
            break
        identity = behind.identity
    return found


def files_of(identity: Identity) -> set[Identity]:
    """Return the files in which the bytes of a device are, as far as it lies on loop devices; of a file itself."""
    if identity[0] != DEVICE:
        return {identity}
    return {file.identity for file in written_with(identity[1]).files}


def written_with(number: int) -> Below:
    """Return what changes where a block device is written: devices that it lies on, in, or has in it, and files below.

    Where the system does not say, it is the device alone.
    """
    found, files = {number}, []
    pending = [number]
    while pending:
        disk = FilePath(directory_of(pending.pop())).resolve()
        if not disk.exists():
            continue
        below = []
        if _is_partition(disk):
            disk = disk.parent  # its other partitions are not written
            found.add(_number_in(disk))
        else:
            found |= {
                _number_in(each) for name in os.listdir(disk) if _is_partition(each := FilePath(f"{disk}/{name}"))
            }
        with suppress(FileNotFoundError):
            below += [_number_in(FilePath(f"{disk}/slaves/{name}").resolve()) for name in os.listdir(f"{disk}/slaves")]
        file = _loop_file(disk)
        if file and file.identity[0] == DEVICE:
            below.append(file.identity[1])
        elif file:
            files.append(file)
        pending += [one for one in below if one not in found]
        found.update(below)
    return Below(found, files)


def _loop_file(directory: FilePath) -> LoopFile | None:
    """Return what a loop device stands on, or None for another device, and for one that stands on nothing.

    The kernel says which inode it is. Where it may not be asked, the name that it had then has to do.
    """
    try:
        with open(f"{directory}/loop/backing_file", "rb") as text:
            path = os.fsdecode(text.read().removesuffix(b"\n"))
        number = _number_in(directory)
    except (FileNotFoundError, NotADirectoryError):
        return None
    identity = _identity_by_kernel(number)
    if identity is None:
        try:
            identity = identity_of(os.stat(path))  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):  # it was unlinked
            return None
    return LoopFile(path, identity)


def _identity_by_kernel(number: int) -> Identity | None:
    import fcntl

    descriptor = open_own_node(number)
    if descriptor < 0:
        return None
    try:
        about = fcntl.ioctl(descriptor, _LOOP_GET_STATUS64, bytes(_LOOP_INFO_BYTES))
    except OSError:  # it is detached by now
        return None
    finally:
        os.close(descriptor)
    device, inode, number_below = struct.unpack_from("QQQ", about)
    return (DEVICE, number_below) if number_below not in (0, device) else (device, inode)


def _is_partition(directory: FilePath) -> bool:
    return FilePath(f"{directory}/partition").exists()


def _number_in(directory: FilePath) -> int:
    with open(f"{directory}/dev") as text:
        major, _, minor = text.read().partition(":")
    return os.makedev(int(major), int(minor))
