"""This module writes a disk to a raw image file.

What must hold: the image is the disk at one instant (`pinned`). Its name appears when all of it is durable. Just before
that, the file that had the name is checked by its inode, not by its path: no base and no file of the store is replaced,
and nothing at all is replaced unless the caller allows it. If the export fails, a disk of policy `zero` leaves none of
its data.
"""

import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from onionskin.base.fsync import sync_file
from onionskin.base.paths import FilePath
from onionskin.errors import ChainError, StateError
from onionskin.exchange.block_devices import files_below
from onionskin.exchange.device_nodes import (
    DEVICE,
    Identity,
    files_of,
    identity_of,
    share_bytes,
    share_devices,
)
from onionskin.kernels._wipe import wipe
from onionskin.operations import copy
from onionskin.operations.pinned import pinned
from onionskin.operations.reclaim import has_to_be_wiped
from onionskin.storage.layout import DIRECTORIES
from onionskin.storage.locks import is_in_use_below, is_locked
from onionskin.storage.open_head import OpenDisk
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.base.annotations import AnyPath
    from onionskin.base.progress import Progress
    from onionskin.storage.shared_paths import OpenChain

_NAME_BYTES_MAX = 255  # NAME_MAX of Linux
_NO_ROOM = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)  # of what is written, and never of what is read


def export(volume: OpenDisk, target: FilePath, *, replace: bool, progress: "Progress | None") -> None:
    """Write the disk of a volume or a view to a raw image file, and keep the holes. The image is durable on return.

    Parameters
    ----------
    volume : OpenDisk
        The disk. The image has what was written to it before the call.
    target : FilePath
        The path of the image. A regular file there is replaced if `replace` is true.
    replace : bool
        If false, a file at `target` is kept and FileExistsError is raised, even if the file appears meanwhile.
    progress : callable, optional
        It is called with the number of bytes copied so far and in all.
    """
    refuse_target(volume.store, target, replace=replace)  # this is checked before the disk is sealed for the export
    with pinned(volume) as opened, new_image(volume.store, target, opened, replace=replace) as descriptor:
        copy.check_room_for_copy(volume.store, opened, target.absolute().parent)
        copy.copy_disk(volume.store, opened, descriptor, progress=progress)


@contextmanager
def new_image(store: OpenStore, target: FilePath, opened: "OpenChain", *, replace: bool) -> Iterator[int]:
    """Yield a new file for an image, and give the file its name when the with block ends without an error.

    The block writes the file. At its end, the file is made durable and named. After an error, it is wiped and removed.
    """
    policies = policies_of(store, opened)  # first: when the copy fails, it may not be possible to look any more
    directory = os.open(target.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _refuse_directory(store, directory, target)
        _refuse_file(store, directory, target, replace=replace)
        staged = staged_name(target)
        with _naming(target, staged):
            descriptor = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=directory)
        try:
            try:
                with _naming(target, staged):
                    yield descriptor
                sync_file(descriptor)  # BARRIER: exported image
                _refuse_file(store, directory, target, replace=replace)
                give_name(directory, staged, target, replace=replace)
            except BaseException:
                _drop_staged(store, directory, staged, descriptor, policies)
                raise
            sync_file(directory)  # BARRIER: exported image name
        finally:
            os.close(descriptor)
    finally:
        os.close(directory)


@contextmanager
def _naming(target: FilePath, staged: str) -> Iterator[None]:
    """Name the image in errors about it: a descriptor has no name, and nobody knows that of the draft."""
    try:
        yield
    except OSError as error:
        if error.filename == staged or (error.filename is None and error.errno in _NO_ROOM):
            raise OSError(error.errno, error.strerror, str(target)) from None
        raise


def staged_name(target: FilePath) -> str:
    """Draw the name under which a file is made. It is no longer than the file's own, where that is the longest possible."""
    suffix = f".{os.getpid()}.{os.urandom(4).hex()}.part"
    # In the encoding of paths, which need not be UTF-8: what was decoded otherwise could not be encoded again.
    begin = os.fsencode(target.name)[: _NAME_BYTES_MAX - len(suffix)]
    return begin.decode(sys.getfilesystemencoding(), errors="ignore") + suffix


def give_name(directory: int, staged: str, target: FilePath, *, replace: bool) -> None:
    """Give a staged file its final name. If another file has that name, replace it, or else raise FileExistsError."""
    if not replace:
        try:
            os.link(staged, target.name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        except FileExistsError:
            raise _exists(target) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            _take_name(directory, target)  # the file system has no hard links
        else:
            os.unlink(staged, dir_fd=directory)
            return
    os.replace(staged, target.name, src_dir_fd=directory, dst_dir_fd=directory)


def _take_name(directory: int, target: FilePath) -> None:
    """Make an empty file of that name. It belongs to this export, which may therefore replace it."""
    try:
        os.close(os.open(target.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory))
    except FileExistsError:
        raise _exists(target) from None


def _exists(target: FilePath) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


def _drop_staged(store: OpenStore, directory: int, staged: str, descriptor: int, policies: Iterable[str]) -> None:
    """Remove an unfinished file, unless it has got its name just before an interrupt."""
    with suppress(OSError):
        if not os.path.samestat(os.fstat(descriptor), os.stat(staged, dir_fd=directory, follow_symlinks=False)):
            return
        if os.fstat(descriptor).st_nlink == 1:
            with suppress(OSError):
                wipe_staged(store, descriptor, policies)
        os.unlink(staged, dir_fd=directory)


@contextmanager
def passing_file(store: OpenStore, directory: "AnyPath", policies: Iterable[str]) -> Iterator[IO[bytes]]:
    """Yield a file without a name for a temporary copy of a disk. Its contents are wiped at the end.

    The file vanishes with the process, however the process ends. But a process that is killed wipes nothing.
    """
    import tempfile  # imported late: few look for what a file system can do

    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            yield file
        finally:
            wipe_staged(store, file.fileno(), policies)


def wipe_staged(store: OpenStore, descriptor: int, policies: Iterable[str]) -> None:
    """Overwrite a file that holds a copy of a disk before its blocks are freed, if a layer has policy `zero`."""
    if "zero" in policies:
        result = wipe(descriptor, [(0, os.fstat(descriptor).st_size)], zero=True, punch=False)
        store.note_unwipeable(result.bytes_unwipeable)


def policies_of(store: OpenStore, opened: "OpenChain") -> set[str]:
    """Return the wipe policies that a copy of a disk has to follow: those of its layers, and of what they took over."""
    policies = {layer.wipe for layer in opened.chain.layers}
    return policies | {"zero"} if has_to_be_wiped(store, opened.chain) else policies


# ---- files that must not be replaced ----


def refuse_target(store: OpenStore, target: FilePath, *, replace: bool) -> None:
    """Refuse a target in the store, and one that would replace a file that must not be replaced."""
    directory = os.open(target.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _refuse_directory(store, directory, target)
        _refuse_file(store, directory, target, replace=replace)
    finally:
        os.close(directory)


def _refuse_directory(store: OpenStore, directory: int, target: FilePath) -> None:
    """Refuse a directory that is in the store, whatever links or mounts its path goes through."""
    own = set()
    for path in (store.layout.root, *(store.layout.root / name for name in DIRECTORIES)):
        found = path.stat()
        own.add((found.st_dev, found.st_ino))
    at = os.dup(directory)
    try:
        while True:
            here = os.fstat(at)
            if (here.st_dev, here.st_ino) in own:
                raise ValueError(f"{target} is in the store itself; choose a path outside of it")
            try:
                above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
            except PermissionError:  # this user may not open the directory above, so the store is not there
                return
            below, at = at, above  # first: a number that is closed twice may be another thread's file by then
            os.close(below)
            if os.path.samestat(os.fstat(at), here):
                return
    finally:
        os.close(at)


def _refuse_file(store: OpenStore, directory: int, target: FilePath, *, replace: bool) -> None:
    if not target.name:  # "." and "/", and what was given no name
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    try:
        os.stat(target.name, dir_fd=directory, follow_symlinks=False)
        if not replace:
            raise _exists(target)
        found = os.stat(target.name, dir_fd=directory)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise FileExistsError(
            errno.EEXIST, "there is something that is not a regular file; choose another path", str(target)
        )
    if found.st_nlink > 1 and _is_own_file(store, identity_of(found)):
        raise ValueError(f"{target} is a file of the store itself; choose another path")
    if _is_base(store, found):
        raise StateError(f"{target} is a base that volumes stand on; choose another path")
    if _is_in_use(directory, target.name):
        raise StateError(f"{target} is in use, as a base of a volume of some store; choose another path")


def refuse_needed_device(store: OpenStore, number: int, called: "AnyPath", *, is_held: bool = False) -> None:
    """Refuse to write to a block device if that changes a base, a file of the store, or what is in use as a base.

    `is_held` says that the caller is within `locks.written_over` of this device, which has asked who uses what.
    """
    files = files_below(number, called)
    bases = _bases(store)
    if any(share_devices((DEVICE, number), base) for base in bases):
        raise StateError(
            f"{called} is a base that volumes stand on, or has bytes in common with one; choose another device"
        )
    for file in files:
        if _is_own_file(store, file.identity):
            raise ValueError(f"{called} stands on {file.path}, a file of the store itself; choose another device")
        if any(file.identity in files_of(base) for base in bases):
            raise StateError(f"{called} stands on {file.path}, a base that volumes stand on; choose another device")
    if not is_held and is_in_use_below(number):
        raise StateError(f"{called} is in use, as a base of a volume of some store; choose another device")


def refuse_open_file(store: OpenStore, descriptor: int, called: str) -> None:
    """Refuse to write to an open file, such as stdout, that is needed. What is no regular file is not looked at."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        return
    if _is_own_file(store, identity_of(found)):
        raise ValueError(f"{called} is a file of the store itself; write to another file")
    if _is_base(store, found):
        raise StateError(f"{called} is a base that volumes stand on; write to another file")
    if is_locked(descriptor, 0, 1):
        raise StateError(f"{called} is in use, as a base of a volume of some store; write to another file")


def _is_base(store: OpenStore, found: os.stat_result) -> bool:
    return any(share_bytes(base, identity_of(found)) for base in _bases(store))


def _bases(store: OpenStore) -> set[Identity]:
    """Return the bases of the store, and those that its handles have open; many volumes may stand on one."""
    return {identity_of(found) for found in _looks_at_bases(store)}


def _looks_at_bases(store: OpenStore) -> Iterator[os.stat_result]:
    """Yield what the file system says of the bases of the store, and of those that its handles have open."""
    for lock in [volume.base_lock for volume in store.open_handles()]:
        with suppress(OSError):  # the handle may have been closed meanwhile
            if lock and lock.descriptor >= 0:
                yield os.fstat(lock.descriptor)
    for base in store.catalog.bases():
        with suppress(FileNotFoundError, NotADirectoryError):  # else it may be that file
            yield FilePath(base.path).stat()


def _is_in_use(directory: int, name: str) -> bool:
    """Whether some volume of any store has the file open as its base now: such a volume holds a lock on it."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return False
    return _is_locked(descriptor)


def _is_locked(descriptor: int) -> bool:
    try:
        return is_locked(descriptor, 0, 1)
    finally:
        os.close(descriptor)


def refuse_own_files(store: OpenStore, path: FilePath) -> None:
    """Refuse a file of the store as a base, by whatever name, and a block device that stands on one."""
    if store.layout.holds(path):
        raise ChainError(f"{path} is a file of the store itself, which changes and goes: give an image outside of it")
    found = path.stat()
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:  # it has the name by which it was reached
        return
    if any(_is_own_file(store, file) for file in files_of(identity_of(found))):
        raise ChainError(
            f"{path} is, or stands on, a file of the store itself, which changes and goes: give an image outside of it"
        )


def _is_own_file(store: OpenStore, file: Identity) -> bool:
    device, inode = file
    for directory in (store.layout.root, *(store.layout.root / name for name in DIRECTORIES)):
        if directory.stat().st_dev != device:
            continue
        with os.scandir(directory) as entries:
            if any(entry.inode() == inode for entry in entries):
                return True
    return False
