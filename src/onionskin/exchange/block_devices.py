"""Block devices to which an image is written.

What must hold: a device that is in use (as a mounted file system, as swap, or below another device) is not opened; the
kernel refuses it. Data that was written is durable when `sync` has returned.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
from typing import TYPE_CHECKING, Any, Final

from onionskin.base.fsync import sync_file
from onionskin.base.paths import FilePath
from onionskin.errors import StateError
from onionskin.exchange.device_nodes import directory_of, written_with

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onionskin.exchange.device_nodes import LoopFile

_BLKROGET: Final = 0x125E
_BLKSSZGET: Final = 0x1268
_BLKZEROOUT: Final = 0x127F


class BlockDevice:
    """A block device that is open for writing. Nothing else can claim the device (O_EXCL) meanwhile.

    Parameters
    ----------
    path : path-like

    Raises
    ------
    StateError
        It is in use, or read-only.
    OSError
        It cannot be opened.
    """

    def __init__(self, path: "str | os.PathLike[str]") -> None:
        self.path = path
        try:
            # O_EXCL without O_CREAT claims a block device: see open(2).
            self._descriptor = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise _in_use(path) from None
        try:
            found = os.fstat(self._descriptor)
            if not stat.S_ISBLK(found.st_mode):
                raise StateError(f"{path} is no block device any more; look at it, and try again")
            self._number = found.st_rdev
            (is_read_only,) = struct.unpack("i", fcntl.ioctl(self._descriptor, _BLKROGET, bytes(4)))
            if is_read_only:  # it was opened nevertheless, and would refuse writes
                raise StateError(f"{path} is read-only; choose another device, or make it writable: blockdev --setrw")
            self.size_bytes = os.lseek(self._descriptor, 0, os.SEEK_END)
            (self._sector_bytes,) = struct.unpack("i", fcntl.ioctl(self._descriptor, _BLKSSZGET, bytes(4)))
        except BaseException:  # it would stay claimed
            self.close()
            raise

    def __enter__(self) -> "BlockDevice":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the device."""
        os.close(self._descriptor)

    def write(self, offset: int, data: "memoryview[int]") -> None:
        """Write all of a buffer."""
        with self._naming():
            while data:
                written = os.pwrite(self._descriptor, data, offset)
                offset, data = offset + written, data[written:]

    def zero(self, offset: int, length: int) -> None:
        """Make a range read zero. The device itself does it if it can."""
        if (offset | length) % self._sector_bytes == 0:
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._descriptor, _BLKZEROOUT, struct.pack("QQ", offset, length))
                return
        self.write(offset, memoryview(bytes(length)))

    def sync(self) -> None:
        """Make what was written durable."""
        with self._naming():
            sync_file(self._descriptor)

    @contextlib.contextmanager
    def _naming(self) -> Any:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def fileno(self) -> int:
        """Give the descriptor."""
        return self._descriptor

    @property
    def number(self) -> int:
        """The number of the device, which all its nodes have."""
        return self._number


def files_below(number: int, called: "str | os.PathLike[str]") -> "list[LoopFile]":
    """Return the backing files of all loop devices among a device and the devices below it.

    Raises
    ------
    StateError
        The system does not say what it stands on.
    """
    directory = directory_of(number)
    if not FilePath(directory).exists():
        raise StateError(
            f"what {called} stands on cannot be seen, since {directory} is not there, and it might be a file that is "
            "needed; mount /sys, and try again"
        )
    return written_with(number).files


@contextlib.contextmanager
def claimed(descriptor: int, called: str) -> "Iterator[None]":
    """Claim an open block device during the with block, so that nobody mounts it or takes it as a base meanwhile.

    One that this process may write, and not open again, is not claimed.

    Raises
    ------
    StateError
        It is mounted, or in use otherwise.
    """
    claim = -1
    try:
        claim = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _in_use(called) from None
    try:
        yield
    finally:
        if claim >= 0:
            os.close(claim)


def _in_use(called: "str | os.PathLike[str]") -> StateError:
    return StateError(f"{called} is in use: it is mounted, swapped to, or part of another device; end that first")
