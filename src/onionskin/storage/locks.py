"""Locks that decide who may free a file and who may write a volume. They are OFD locks on bytes of files.

`ByteLocks` is one descriptor of the store's `lock` file. Each open volume or view has its own, so two handles in one
process exclude each other as two processes do. A handle holds the bytes of its files shared. An operation that frees a
file takes the file's byte exclusively, without waiting. A handle may raise its lock of a byte from shared to exclusive
and back. Other handles see this change; `_exclusive` keeps the handle's own threads apart.

A handle that reads a head which nobody writes holds a `ReadersLock`. The one writer of a volume holds its `VolumeLock`.
The file of this lock names the writer, but this counts only while the lock is held. The file may be removed or replaced
before it is locked, so the writer looks at it again once it is locked. A file that is removed later keeps nobody out.
Therefore the writer also holds a byte of the store's `lock` file. The number of this byte comes from the volume's id,
and it lies far behind the bytes that stand for files.

Locks belong to the open file description, which a forked child shares. So the process that took the locks gives them up
explicitly when it closes the descriptor, and a child only closes its descriptor.
"""

import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import EACCES, EBADF, EDQUOT, ELOOP, ENOSPC, EROFS
from functools import lru_cache
from typing import NoReturn

from onionskin.base import forking
from onionskin.base.files import CANNOT_LOOK
from onionskin.base.held import held
from onionskin.base.modes import share_file
from onionskin.base.named_tuples import NamedTuple
from onionskin.base.paths import FilePath, is_same
from onionskin.base.signals import DeferredInterrupt
from onionskin.base.waiting import within
from onionskin.errors import FormatError, StateError
from onionskin.exchange.device_nodes import (
    LoopFile,
    identity_of,
    in_turn,
    open_at_own_node,
    open_loop_file,
    open_own_node,
    written_with,
)
from onionskin.storage.base_looks import BaseLooks
from onionskin.storage.layout import Layout

STORE_BYTE = 0
DIRECTORY_SECONDS = (
    10.0  # for which a directory is waited for that another process has alone, for milliseconds as a rule
)
STORE_SECONDS = 60.0  # for which a store is waited for whose files another process removes
_WRITER_BYTES = 1 << 62  # the first byte that may stand for the writer of a volume
_FLOCK = struct.Struct("hhqqi4x")
_VOLUME_FILE_LOCK = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)  # the one byte that the lock of a volume's file is


@contextmanager
def _named(descriptor: int) -> Iterator[None]:
    """Add the name of the file to an error of a call on a descriptor. The call itself does not know the name."""
    try:
        yield
    except OSError as error:
        _name(error, descriptor)
        raise


def _name(error: OSError, descriptor: int) -> None:
    if error.filename is None:
        with suppress(OSError):
            error.filename = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115


def _set_lock(descriptor: int, kind: int, start: int, count: int) -> bool:
    """Set or change a lock without waiting. Returns False if the lock of another descriptor is in the way."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, count, 0))
    except BlockingIOError:
        return False
    except PermissionError:  # POSIX allows a system to report the same case as EACCES
        return False
    except OSError as error:
        if error.errno == EBADF and kind == fcntl.F_WRLCK and descriptor >= 0:  # it is open to be read alone
            error = OSError(EROFS, os.strerror(EROFS))
        _name(error, descriptor)
        raise error from None
    return True


def is_locked(descriptor: int, start: int, count: int) -> bool:
    """Whether another open file description holds any lock on the bytes."""
    return _kind_in_the_way(descriptor, fcntl.F_WRLCK, start, count) != fcntl.F_UNLCK


def _kind_in_the_way(descriptor: int, kind: int, start: int, count: int) -> int:
    """Return the kind of the lock that keeps this descriptor from a lock of `kind`, or F_UNLCK if there is none."""
    with _named(descriptor):
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(kind, os.SEEK_SET, start, count, 0))
    found: int = _FLOCK.unpack(answer)[0]
    return found


def joined(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the stretches of consecutive numbers as (first, count), sorted, so that a deep chain costs few calls."""
    stretches: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if stretches and stretches[-1][0] + stretches[-1][1] == number:
            stretches[-1] = (stretches[-1][0], stretches[-1][1] + 1)
        else:
            stretches.append((number, 1))
    return stretches


class ByteLocks:
    """One handle's locks on bytes of a lock file. Any thread may call the methods."""

    def __init__(self, path: FilePath) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._shared: set[int] = set()
        self._exclusive: set[int] = set()
        self._descriptor = _open_to_share(path)
        forking.register(self)

    def take_shared(self, numbers: Iterable[int]) -> bool:
        """Lock all bytes for reading. If another handle holds one of them alone, lock none of them and return False."""
        wanted = set(numbers)
        with self._guard:
            wanted -= self._shared
            taken: list[tuple[int, int]] = []
            for start, count in joined(wanted):
                if not _set_lock(self._open_descriptor(), fcntl.F_RDLCK, start, count):
                    for undo_start, undo_count in taken:
                        _set_lock(self._descriptor, fcntl.F_UNLCK, undo_start, undo_count)
                    return False
                taken.append((start, count))
            self._shared |= wanted
            return True

    def must_share(self, numbers: Iterable[int]) -> None:
        """Lock all bytes for reading.

        Raises
        ------
        StateError
            Another handle holds one of the bytes alone, to free or wipe the file.
        """
        if not self.take_shared(numbers):
            raise StateError(f"files of {self.path.parent} are being freed or wiped just now; try again")

    def share_store(self) -> None:
        """Lock the byte of the store for reading, and wait for who has it alone.

        Raises
        ------
        StateError
            Somebody has it alone for longer than any `check --repair` takes.
        """
        if not within(STORE_SECONDS, lambda: self.take_shared([STORE_BYTE])):
            raise StateError(
                f"another process has had {self.path.parent} alone for a minute, to remove files that nothing names "
                "(onionskin check --repair), or was stopped in it; try again when it has ended"
            )

    def drop_shared(self, numbers: Iterable[int]) -> None:
        """Give up the shared locks on these bytes. Bytes that are not held are ignored."""
        with self._guard:
            unwanted = set(numbers) & self._shared
            self._shared -= unwanted
            for start, count in joined(unwanted - self._exclusive):
                _set_lock(self._open_descriptor(), fcntl.F_UNLCK, start, count)

    def keep_shared(self, numbers: Iterable[int]) -> None:
        """Give up all shared locks except those on these bytes."""
        self.drop_shared(self.shared - set(numbers))

    @property
    def shared(self) -> frozenset[int]:
        """The bytes that are locked for reading."""
        with self._guard:
            return frozenset(self._shared)

    def share_exclusive(self, number: int) -> None:
        """Let others lock a byte for reading that is held alone. Nobody can take it alone before it is given up."""
        with self._guard:
            if number in self._exclusive:
                _set_lock(self._open_descriptor(), fcntl.F_RDLCK, number, 1)

    def take_exclusive(self, numbers: Iterable[int]) -> int | None:
        """Hold bytes alone until `close`, without waiting; returns the first of them that somebody else has, or None."""
        with self._guard:
            for number in sorted(set(numbers)):
                if not _set_lock(self._open_descriptor(), fcntl.F_WRLCK, number, 1):
                    return number
                self._exclusive.add(number)
        return None

    @held
    def exclusive(self, number: int) -> Iterator[bool]:
        """Hold a byte alone during the with block, if that is possible without waiting. Yields whether it is held.

        At the end, a shared lock that the handle had before is restored. If another thread has closed the locks
        meanwhile, nothing is held.
        """
        is_taken = False
        try:
            with self._guard:
                is_free = self._descriptor >= 0 and number not in self._exclusive
                is_taken = is_free  # before it is: an interrupt may come when it was just locked
                is_held = is_free and _set_lock(self._descriptor, fcntl.F_WRLCK, number, 1)
                is_taken = is_held
                if is_held:
                    self._exclusive.add(number)
            yield is_held
        finally:
            if is_taken:
                try:
                    self._end_exclusive(number)
                except BaseException:  # an interrupt
                    self._end_exclusive(number)
                    raise

    def _end_exclusive(self, number: int) -> None:
        """Hold a byte as before `exclusive` again. It may be done twice."""
        with self._guard:
            self._exclusive.discard(number)
            if self._descriptor >= 0:
                kind = fcntl.F_RDLCK if number in self._shared else fcntl.F_UNLCK
                _set_lock(self._descriptor, kind, number, 1)

    def close(self) -> None:
        """Give all locks up. Further calls do nothing."""
        with self._guard:
            # The number is forgotten before the descriptor is closed: after an interrupt between the two, a second call
            # must not close another file that has got the same number.
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                try:
                    self._shared.clear()
                    _set_lock(descriptor, fcntl.F_UNLCK, 0, 0)
                finally:  # also where a signal's handler raises: nobody else knows the descriptor any more
                    os.close(descriptor)

    def after_fork(self) -> None:
        """Close the descriptor in a forked child, but unlock nothing, because the locks are the parent's."""
        self._guard = threading.Lock()  # another thread of the parent may have held the old one
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def _open_descriptor(self) -> int:
        if self._descriptor < 0:
            raise StateError(f"the locks of {self.path} are closed; open the volume again")
        return self._descriptor


@held
def locked_directory(path: FilePath, *, alone: bool) -> Iterator[bool]:
    """Lock a directory during the with block, and yield whether it is locked.

    A shared lock is waited for, for `DIRECTORY_SECONDS`. A lock `alone` is taken only if that is possible without
    waiting. The lock needs no block on a full disk. Each caller has a descriptor of its own, so threads exclude each other
    too. If there is no directory, or its file system cannot lock directories, it counts as locked.

    Raises
    ------
    OSError
        It cannot be looked at now, so somebody may have it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in CANNOT_LOOK:
            raise
        yield True
        return
    try:
        if alone:
            yield _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            yield within(DIRECTORY_SECONDS, lambda: _flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB))
    finally:
        try:
            fcntl.flock(
                descriptor, fcntl.LOCK_UN
            )  # a child that was forked meanwhile has the descriptor too, and the lock
        except OSError:  # a file system that cannot lock directories
            pass
        finally:
            os.close(descriptor)


def _flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in CANNOT_LOOK:
            raise
    return True


class Holder(NamedTuple):
    """A process that holds a volume."""

    pid: int
    start_ticks: int

    def __str__(self) -> str:
        return f"process {self.pid}" if self.pid else "another process"


class WritersOpening:
    """An opening of the store's lock file by which the writers of several volumes hold their bytes.

    It is closed with the last of them, so that a descriptor and two system calls do for many volumes. Who makes it is one of
    them, until `leave` is called without a byte. Any thread may call the methods.
    """

    def __init__(self, path: FilePath) -> None:
        self._guard = threading.RLock()  # a finalizer may close one volume in the thread that is just locking another
        self._users: dict[int | None, int] = {None: 0}  # the writer of each byte
        self.descriptor: int = open_lock_file(path)
        forking.register(self)

    def join(self, byte: int, writer: int) -> int:
        """Keep it open for the writer with this byte. Returns the descriptor, or -1 where another writer has the byte by it.

        The system would let both have the byte. `writer` is a number that no other writer has, and the caller is one of those
        who have the opening.
        """
        with self._guard:
            return self.descriptor if self._users.setdefault(byte, writer) == writer else -1

    def leave(self, byte: int | None = None, writer: int = 0) -> None:
        """Note that a writer has given its byte up, or did not get it. Further calls do nothing."""
        with self._guard:
            if self._users.get(byte) == writer:
                del self._users[byte]
            if self._users:
                return
            descriptor, self.descriptor = self.descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)

    def after_fork(self) -> None:
        """Close the descriptor in a forked child, but unlock nothing."""
        self._guard = threading.RLock()
        self._users = {}
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class VolumeLock:
    """The lock of the one writer of a volume. It is a byte of the store's lock file, and a file of the volume's own.

    The handle that gets the byte is the writer. Only the writer makes the file, and only while the volume has a row
    (`make_file`). So a crash leaves no such file without a row.

    Raises
    ------
    StateError
        Another handle, of this process or of another one, holds the volume.
    """

    def __init__(
        self, layout: Layout, volume_id: bytes, volume_name: str, *, opening: WritersOpening | None = None
    ) -> None:
        """Lock the byte, by an opening of the lock file that locks of other volumes may have too, where one is given."""
        self._path, self._volume_name = layout.volume_lock(volume_id), volume_name
        self._left_socket = layout.volume_control_path(volume_id)
        self._byte = _writer_byte(volume_id)
        self._descriptor = self._byte_descriptor = -1
        self._opening = opening  # of the byte, where it is no opening of the volume's own
        self._shared: SharedFile | None = None  # the file, where it is no file of the volume's own
        try:
            self._byte_descriptor = (
                open_lock_file(layout.lock) if opening is None else opening.join(self._byte, id(self))
            )
            if self._byte_descriptor < 0:
                _refuse_held(self._path, volume_name)
            if not _set_lock(self._byte_descriptor, fcntl.F_WRLCK, self._byte, 1):
                _refuse_taken(self._byte_descriptor, self._path, volume_id, volume_name)
        except BaseException:
            try:
                if opening is not None and self._byte_descriptor >= 0:  # it stays open, and the lock with it
                    _set_lock(self._byte_descriptor, fcntl.F_UNLCK, self._byte, 1)
            finally:
                descriptor, self._byte_descriptor = self._byte_descriptor, -1
                self._leave_opening(descriptor)
            raise
        try:
            forking.register(self)
        except BaseException:  # an interrupt, with which this object lives on, and the lock with it
            self.close()
            raise

    def make_file(self, shared: "SharedFile | None" = None) -> None:
        """Lock the volume's own file too, and write into it which process holds the volume. The volume has a row.

        With `shared`, the file may be one more name of the one that this process has locked for other volumes.
        """
        with suppress(OSError):  # of a server that was killed: as long as it is there, the holder is taken for a server
            os.unlink(self._left_socket)  # noqa: PTH108 - a few microseconds
        if self._descriptor < 0 and shared is not None:
            self._shared = shared  # first: whatever comes between, `close` removes the name
            if shared.add(self._path):
                return
            self._shared = None
        if self._descriptor < 0:  # otherwise an earlier call has locked the file, but could not write to a full disk
            self._descriptor = _lock_at_its_path(self._path)
        if self._descriptor < 0:
            _refuse_held(self._path, self._volume_name)
        _write_holder(self._descriptor)

    @staticmethod
    def make_files_together(locks: "Sequence[VolumeLock]", shared: "SharedFile") -> "list[VolumeLock]":
        """Do what `make_file` does for volumes that were just locked, by one call for all of them.

        The caller listens at their control sockets next, in place of what a server that was killed has left there.
        Returns those for which it could not be done so: `make_file` does it, or says what is in the way.
        """
        for lock in locks:
            lock._shared = shared  # first, as in `make_file`
        added = shared.add_all([lock._path for lock in locks])
        left = [lock for lock in locks if lock._path not in added]
        for lock in left:
            lock._shared = None
        return left

    def close(self) -> None:
        """Give the volume up. Further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        byte_descriptor, self._byte_descriptor = self._byte_descriptor, -1
        shared, self._shared = self._shared, None
        # A signal's handler may raise behind any call. Nobody else knows the descriptors any more, so each is closed all the
        # same: a lock that stayed would keep this process, too, from the volume.
        try:
            if shared is not None:
                try:
                    shared.remove(self._path)  # while the byte keeps others from making a file there
                except BaseException:
                    shared.remove(self._path)
                    raise
            if descriptor >= 0:
                with _named(descriptor):
                    os.ftruncate(descriptor, 0)
        finally:
            try:
                if descriptor >= 0:
                    _set_lock(descriptor, fcntl.F_UNLCK, 0, 0)
            finally:
                try:
                    if descriptor >= 0:
                        os.close(descriptor)
                finally:
                    try:
                        if byte_descriptor >= 0:
                            # Others may hold their bytes by the same opening, so to close it may not unlock this one.
                            try:
                                _set_lock(byte_descriptor, fcntl.F_UNLCK, self._byte, 1)
                            except BaseException:
                                _set_lock(byte_descriptor, fcntl.F_UNLCK, self._byte, 1)
                                raise
                    finally:
                        self._leave_opening(byte_descriptor)

    def _leave_opening(self, byte_descriptor: int) -> None:
        """Close the opening of the byte, which is unlocked, or leave it to the others who have it."""
        opening, self._opening = self._opening, None
        if opening is None:
            if byte_descriptor >= 0:
                os.close(byte_descriptor)
            return
        try:
            opening.leave(self._byte, id(self))
        except BaseException:
            opening.leave(self._byte, id(self))
            raise

    def after_fork(self) -> None:
        """Close the descriptors in a forked child, but unlock nothing."""
        own = self._descriptor, self._byte_descriptor if self._opening is None else -1  # the opening closes its own
        for descriptor in own:
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._byte_descriptor = -1
        self._opening = self._shared = None

    def __del__(self) -> None:
        if getattr(self, "_byte_descriptor", -1) >= 0:
            self.close()


class SharedFile:
    """One file, locked by this process, that has a name for each of several volumes: it stands for the lock file of each.

    It says what a file of the volume's own would say: that this process holds the volume. To make a file takes as long as
    to open a fork, and half a millisecond more on an ext4 without a journal, so a server that opens a hundred makes one.

    What must hold: each name is added and removed by the holder of the volume's byte. What has several names is never
    written to again. Where its process has died, it is unlocked, and the next holder of a volume removes the name of that.
    """

    def __init__(self) -> None:
        # A finalizer may close another volume in the thread that is just adding one.
        self._guard = threading.RLock()
        self._paths: set[FilePath] = set()
        self._descriptor = -1
        self._is_one_file = False  # whether a second name was seen to lead to it
        forking.register(self)

    def add(self, path: FilePath) -> bool:
        """Let the file stand for the lock file of one more volume. False: the volume needs a file of its own.

        Whatever is raised, `remove` takes back what was done.
        """
        with self._guard:
            self._paths.add(path)  # first, so that nobody unlocks the file meanwhile, and no name is left behind
            try:
                is_added = self._link(path) if self._descriptor >= 0 else self._begin(path)
            except (OSError, StateError, FormatError):
                # The volume has a file, or the file system knows no second names, or there are too many. What else is
                # wrong there, the opening of a file of its own says.
                is_added = False
            if not is_added:
                self.remove(path)
            return is_added

    def add_all(self, paths: "Sequence[FilePath]") -> set[FilePath]:
        """Let the file stand for the lock files of several more volumes. Returns those for which it does, as `add` would."""
        from onionskin.base._names import link_all

        with self._guard:
            if self._descriptor < 0:  # the first one makes the file
                return set(filter(self.add, paths))
            self._paths.update(paths)  # first, as in `add`
            refused = [path for path, error in zip(paths, link_all(self._descriptor, paths), strict=True) if error]
            for path in refused:
                self.remove(path)
            return {*paths}.difference(refused)

    def _link(self, path: FilePath) -> bool:
        """Give the file one more name. False: who looks there does not find the locked file."""
        from onionskin.base._names import leads_to

        try:
            # Without a directory, Python makes the call that does not follow the link.
            os.link(f"/proc/self/fd/{self._descriptor}", path, src_dir_fd=self._descriptor, follow_symlinks=True)
        except FileExistsError:  # it may be a name that could not be removed, or a file of the volume's own
            return is_file_at(self._descriptor, path)
        if not self._is_one_file:  # some file systems in user space have an inode for each name
            self._is_one_file = leads_to(self._descriptor, path)
        return self._is_one_file

    def _begin(self, path: FilePath) -> bool:
        """Make the file, as that of its first volume."""
        descriptor = _lock_at_its_path(path)
        if descriptor < 0:
            return False
        try:
            _write_holder(descriptor)
            is_written = _names_a_holder(descriptor)  # on a full disk it is not
        except BaseException:
            _unlock_and_close(descriptor)
            raise
        if is_written:
            self._descriptor = descriptor
        else:
            _unlock_and_close(descriptor)
        return is_written

    def remove(self, path: FilePath) -> None:
        """Let the file stand for a volume no more. With the last one, it is unlocked. Further calls do nothing."""
        with self._guard:
            if path not in self._paths:
                return
            with suppress(OSError):
                if self._descriptor >= 0 and is_file_at(self._descriptor, path):
                    os.unlink(path)  # noqa: PTH108 - a few microseconds
            self._paths.discard(path)
            if not self._paths and self._descriptor >= 0:
                descriptor, self._descriptor = self._descriptor, -1
                try:
                    _set_lock(descriptor, fcntl.F_UNLCK, 0, 0)
                finally:
                    os.close(descriptor)

    def after_fork(self) -> None:
        """Close the descriptor in a forked child, but unlock nothing, and leave the names to the parent."""
        self._guard = threading.RLock()
        self._paths = set()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _unlock_and_close(descriptor: int) -> None:
    """Unlock a file for all who have this descriptor, among them a child that was forked meanwhile, and close it."""
    try:
        _set_lock(descriptor, fcntl.F_UNLCK, 0, 0)
    finally:
        os.close(descriptor)


class ReadersLock:
    """The lock of a handle that reads a head, which keeps writers from the volume.

    Any number of handles may have it. It writes nothing to a file.

    Raises
    ------
    StateError
        A handle, of this process or of another one, holds the volume for writing.
    """

    def __init__(self, layout: Layout, volume_id: bytes, volume_name: str) -> None:
        self._bytes = ByteLocks(layout.lock)
        if not self._bytes.take_shared([_writer_byte(volume_id)]):
            self._bytes.close()
            _refuse_held(layout.volume_lock(volume_id), volume_name)

    def close(self) -> None:
        """Give the volume up. Further calls do nothing."""
        self._bytes.close()


@held
def locked_to_remove(layout: Layout, volumes: Mapping[bytes, str]) -> Iterator[None]:
    """Hold volumes, by their ids with their names, as their writers do, without a file for any of them.

    One descriptor holds the bytes of all. A file that is there is only looked at: one who knows no bytes may hold that.

    Raises
    ------
    StateError
        Another handle, of this process or of another one, holds one of them.
    """
    locks = ByteLocks(layout.lock)
    try:
        of = {_writer_byte(id): id for id in volumes}
        taken = locks.take_exclusive(of)
        if taken is not None:
            id = of[taken]
            _refuse_taken(locks._open_descriptor(), layout.volume_lock(id), id, volumes[id])
        for id, name in volumes.items():
            refuse_file_held(layout, id, name)
        yield
    finally:
        locks.close()


def is_for_a_moment(layout: Layout, volume_ids: Iterable[bytes]) -> bool:
    """Whether those who hold volumes give them up by themselves: who drops one, or looks whether it may, has no file for it.

    True also of a volume that nobody holds by now. Who opens one has no file at first, and is told from those the next time.
    """
    descriptor = _open_to_share(layout.lock)
    try:
        return not any(
            _is_file_held(layout.volume_lock_path(id))
            or _kind_in_the_way(descriptor, fcntl.F_WRLCK, _writer_byte(id), 1) == fcntl.F_RDLCK  # it is read
            for id in volume_ids
        )
    finally:
        os.close(descriptor)


def refuse_file_held(layout: Layout, volume_id: bytes, name: str) -> None:
    """Raise StateError if somebody holds the own lock file of a volume, or what `volume_holder` raises where it is no file.

    The caller holds the byte of the volume's writer.
    """
    if _is_file_held(layout.volume_lock_path(volume_id)):
        _refuse_held(layout.volume_lock(volume_id), name)


def _refuse_taken(descriptor: int, path: FilePath, volume_id: bytes, volume_name: str) -> NoReturn:
    """Say who has the byte of a volume's writer: its writer, or readers of its head."""
    if _is_only_read(descriptor, volume_id):
        raise StateError(
            f"volume {volume_name!r} is open for reading in another handle; close that, or open one of its snapshots "
            "instead"
        )
    _refuse_held(path, volume_name)


def _writer_byte(volume_id: bytes) -> int:
    """Return the byte of the store's lock file that stands for the writer of a volume. It never stands for a file."""
    return _WRITER_BYTES + int.from_bytes(volume_id[:7], "big")


def _is_only_read(descriptor: int, volume_id: bytes) -> bool:
    """Whether a volume that is locked could also be locked for reading, so that its holders only read it."""
    return _kind_in_the_way(descriptor, fcntl.F_RDLCK, _writer_byte(volume_id), 1) == fcntl.F_UNLCK


def _lock_at_its_path(path: FilePath) -> int:
    """Open and lock the file at a path, and return its descriptor, or -1 if somebody else has it locked.

    The path leads to the file that is locked when this function returns.
    """
    while True:
        descriptor = _checked_lock_file(path, os.O_RDWR | os.O_CREAT, may_be_shared=True)
        try:
            is_shared = os.fstat(descriptor).st_nlink > 1
            is_taken = is_locked(descriptor, 0, 1) if is_shared else not _set_lock(descriptor, fcntl.F_WRLCK, 0, 1)
            if is_taken:
                os.close(descriptor)
                return -1
            if is_shared:  # of a process that died: to lock it would keep others from volumes whose name it has too
                os.unlink(path)  # noqa: PTH108 - a few microseconds
            elif is_file_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was removed or replaced before it was locked


def _refuse_held(path: FilePath, volume_name: str) -> NoReturn:
    holder = volume_holder(path) or Holder(0, 0)
    served = path.with_suffix(".control").exists()
    advice = "which serves it: stop that, work through it (onionskin.connect)" if served else "close it there"
    raise StateError(
        f"volume {volume_name!r} is open for writing in {holder}{',' if served else ';'} {advice}, "
        "or open one of its snapshots instead"
    )


def _write_holder(descriptor: int) -> None:
    """Write into a lock file which process holds the volume. If the disk is full, the file stays empty."""
    with _named(descriptor):
        os.ftruncate(descriptor, 0)
    try:
        with _named(descriptor):
            os.pwrite(descriptor, f"{os.getpid()} {_own_start_ticks(os.getpid())}\n".encode(), 0)
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise


def open_lock_file(path: FilePath) -> int:
    """Open a file to lock its bytes, and make it if it is not there.

    Anything but a regular file is refused, and so is a path that ends in a symbolic link.
    """
    return _checked_lock_file(path, os.O_RDWR | os.O_CREAT)


def _open_to_share(path: FilePath) -> int:
    """Open a lock file. If it may only be read, open it for shared locks alone.

    If there is no lock file and none can be made, a file in memory takes its place. Nobody has changed such a store
    yet, so it has no file that must be kept from being freed.
    """
    try:
        return open_lock_file(path)
    except OSError as error:
        if error.errno not in (EROFS, EACCES):
            raise
    try:
        return _checked_lock_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return os.memfd_create("onionskin lock")


def _checked_lock_file(path: FilePath | str, flags: int, *, may_be_shared: bool = False) -> int:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno == ELOOP:
            raise StateError(f"{path} is a symbolic link, and no file of a store is; remove it") from None
        raise
    try:
        with _named(descriptor):
            found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(f"{path} is not a regular file, and a lock of a store is a file of its own; remove it")
        if found.st_nlink > 1 and not (may_be_shared and _may_stand_for_many(descriptor)):
            raise StateError(second_name(path, "a lock of a store is a file of its own"))
        if flags & os.O_CREAT and not found.st_size and found.st_uid == os.geteuid():
            share_file(descriptor, FilePath(path))  # the file may have been made just now
    except BaseException:  # a network's file system may also fail to look
        os.close(descriptor)
        raise
    return descriptor


def second_name(path: FilePath | str, why: str) -> str:
    """Say that a file of a store has a second name. Nobody is told to remove the store's own file for that."""
    return (
        f"{path} has another name too (a hard link), and {why}; find that (find / -xdev -samefile FILE): if it is in a copy "
        "of this store that was made by links (cp -l), remove the copy, and if it is a file of something else, this name of "
        "it, while nobody has the store open"
    )


def is_file_at(descriptor: int, path: FilePath) -> bool:
    """Whether a path leads to this open file now, or to this block device through any node."""
    try:
        return is_same(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def volume_holder(path: FilePath | str) -> Holder | None:
    """Return the process that holds a volume for writing, or None. The lock itself is not touched."""
    try:
        descriptor = _checked_lock_file(path, os.O_RDONLY, may_be_shared=True)
    except FileNotFoundError:
        return None
    try:
        return _read_holder(descriptor) if is_locked(descriptor, 0, 1) else None
    finally:
        os.close(descriptor)


def _is_file_held(path: str) -> bool:
    """Whether somebody holds a lock file. It asks as `volume_holder` does, which takes three times as long for a hundred."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return volume_holder(path) is not None  # it says what is in the way
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            return volume_holder(path) is not None
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _VOLUME_FILE_LOCK)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(descriptor)


def stands_for_many(path: FilePath) -> bool:
    """Whether a lock file that has several names is one of a `SharedFile`, also where its process has died."""
    try:
        os.close(_checked_lock_file(path, os.O_RDONLY, may_be_shared=True))
    except (OSError, StateError, FormatError) as error:
        if isinstance(error, OSError) and error.errno in CANNOT_LOOK:
            raise
        return False
    return True


def _may_stand_for_many(descriptor: int) -> bool:
    """Whether a file with several names is a lock file, which may have them, and not some other file.

    It names a holder, as a `SharedFile` always does; after a power loss the names may be there and not yet what was
    written. It is only ever looked at, and one of its names removed.
    """
    with _named(descriptor):
        text = os.pread(descriptor, 100, 0)
    return not text.strip(b"\0") or _names_a_holder(descriptor)


def _names_a_holder(descriptor: int) -> bool:
    """Whether a file says which process has locked it."""
    return _read_holder(descriptor).pid > 0


def _read_holder(descriptor: int) -> Holder:
    """Return the process that a lock file names. While a process takes or gives up the lock, the pid is 0."""
    with _named(descriptor):
        fields = os.pread(descriptor, 100, 0).split()
    if len(fields) != 2 or not all(field.isdigit() for field in fields):
        return Holder(0, 0)
    return Holder(int(fields[0]), int(fields[1]))


@lru_cache(1)
def _own_start_ticks(pid: int) -> int:
    """Return the start of this process. The child of a fork has another id."""
    return start_ticks(pid)


def start_ticks(pid: int) -> int:
    """Return the start of a process, in clock ticks since the machine started, or 0 if there is no such process.

    The start tells the process from a later one with the same id.
    """
    try:
        with open(f"/proc/{pid}/stat") as about:
            text = about.read()
    except OSError as error:
        if error.errno in CANNOT_LOOK:
            raise
        return 0
    return int(text.rpartition(")")[2].split()[19])


_READERS_BYTE, _MERGER_BYTE, _EXPORTS_BYTE = 0, 1, 2


class BaseLock:
    """The lock of a base file. It is shared while something reads the base, and exclusive while a merge writes it.

    All reads and writes of the base use `descriptor`, the file that is locked, because the path may lead to another
    file at any time. A merge first locks a second byte, which only merges use. So no other merge can come in between
    when it gives up its shared lock and takes the exclusive one.

    Of a loop device, what it stands on is locked for reading too, so that nothing is merged into its file. An export over a
    block device locks a third byte of all that it changes, and then looks for readers; a reader looks for it when it has
    locked. So at least one of the two finds the other, and exports find each other not in the way.

    `half_merged` is what the file looked like under the lock, if a merge into it had begun and not ended then.
    """

    def __init__(self, path: FilePath) -> None:
        self.path = path
        self.half_merged: BaseLooks | None = None
        self._below: list[int] = []
        self.descriptor: int = open_base(path)
        try:
            self._below = _opened_below(self.descriptor)
            if not (_share_with_readers(self.descriptor) and all(map(_share_if_it_can, self._below))):
                raise StateError(f"a merge or an export is writing the base {path}; wait for it to end, and open again")
        except BaseException:
            self.after_fork()
            raise
        forking.register(self)

    def write_alone(self) -> None:
        """Take the exclusive lock of the base, to write it. After an error, the base is locked as before.

        Raises
        ------
        StateError
            Another handle has the base open, or another merge writes it.
        """
        writer = os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if not _set_lock(writer, fcntl.F_WRLCK, _MERGER_BYTE, 1):
                raise StateError(f"another merge is writing the base {self.path}; try again when it is done")
            try:
                _set_lock(self.descriptor, fcntl.F_UNLCK, _READERS_BYTE, 1)
                if not _set_lock(writer, fcntl.F_WRLCK, _READERS_BYTE, 1):
                    raise StateError(
                        f"the base {self.path} is in use; close the volumes and views that stand on it, and try again"
                    )
            except BaseException:  # a signal's handler may raise at any call
                _set_lock(writer, fcntl.F_UNLCK, _READERS_BYTE, 1)
                _set_lock(self.descriptor, fcntl.F_RDLCK, _READERS_BYTE, 1)
                raise
        except BaseException:
            os.close(writer)
            raise
        reader, self.descriptor = self.descriptor, writer
        os.close(reader)

    def share(self) -> None:
        """Let others read the base again after `write_alone`."""
        if self.descriptor >= 0:
            _set_lock(self.descriptor, fcntl.F_RDLCK, _READERS_BYTE, 1)
            _set_lock(self.descriptor, fcntl.F_UNLCK, _MERGER_BYTE, 1)

    @property
    def is_at_its_path(self) -> bool:
        """Whether the path still leads to the file that is locked."""
        return is_file_at(self.descriptor, self.path)

    def close(self) -> None:
        """Give the base up. Further calls do nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        try:
            if descriptor >= 0:
                try:
                    _set_lock(descriptor, fcntl.F_UNLCK, 0, 0)
                finally:
                    os.close(descriptor)
        finally:
            while self._below:
                with suppress(OSError):  # as in `_share_if_it_can`; it is closed
                    _unlock_and_close(self._below.pop())

    def after_fork(self) -> None:
        """Close the descriptors in a forked child, but unlock nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        for one in (descriptor, *self._below):
            if one >= 0:
                os.close(one)
        self._below = []

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            self.close()


def _share_with_readers(descriptor: int) -> bool:
    """Lock a base, or what is below it, for reading. False if somebody writes it."""
    return _set_lock(descriptor, fcntl.F_RDLCK, _READERS_BYTE, 1) and not is_locked(descriptor, _EXPORTS_BYTE, 1)


def _share_if_it_can(descriptor: int) -> bool:
    try:
        return _share_with_readers(descriptor)
    except OSError:  # the file of a loop device, on a file system that has no locks
        return True


def _opened_below(descriptor: int) -> list[int]:
    """Open what a base stands on if it is a loop device: other devices, and files, as far as they can be opened."""
    found = os.fstat(descriptor)
    if not stat.S_ISBLK(found.st_mode):
        return []
    return _opened(in_turn(identity_of(found))[1:], written_with(found.st_rdev).files)


def _opened(devices: Iterable[int], files: Iterable[LoopFile]) -> list[int]:
    opened: list[int] = []
    try:
        opened.extend(map(open_own_node, devices))
        opened.extend(map(open_loop_file, files))
    except BaseException:
        for one in opened:
            if one >= 0:
                os.close(one)
        raise
    return [one for one in opened if one >= 0]


def open_base(path: FilePath) -> int:
    """Open the file of a base to read it, or a block device at the node where all lock it, whichever path leads there."""
    return open_at_own_node(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))


@held
def written_over(descriptor: int, called: "str | os.PathLike[str]") -> Iterator[None]:
    """Keep volumes of all stores from using an open file or block device as their base, and what changes with it.

    Raises
    ------
    StateError
        Some volume has it open as its base.
    """
    marked = _opened_to_mark(descriptor)
    try:
        for one in marked:
            with suppress(OSError):  # a file system that has no locks
                _set_lock(one, fcntl.F_RDLCK, _EXPORTS_BYTE, 1)
        if any(is_locked(one, _READERS_BYTE, 1) for one in marked):
            raise StateError(f"{called} is in use, as a base of a volume of some store; write elsewhere")
        yield
    finally:
        with DeferredInterrupt():  # they would stay locked
            for one in marked:
                with suppress(OSError):  # it is closed
                    _unlock_and_close(one)


def _opened_to_mark(descriptor: int) -> list[int]:
    found = os.fstat(descriptor)
    if stat.S_ISBLK(found.st_mode):
        below = written_with(found.st_rdev)
        return _opened(below.devices, below.files)
    try:  # anew: a lock would be that of all who share stdout
        return [os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)]
    except OSError:  # it may be written, but not read
        return []


def is_in_use_below(number: int) -> bool:
    """Whether some volume of any store has open as its base what changes where a block device is written."""
    below = written_with(number)
    opened = _opened(below.devices, below.files)
    try:
        return any(is_locked(one, _READERS_BYTE, 1) for one in opened)
    finally:
        for one in opened:
            os.close(one)


def is_being_merged_into(path: FilePath) -> bool:
    """Whether a merge in any process writes the base at a path now."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return is_locked(descriptor, _MERGER_BYTE, 1)
    finally:
        os.close(descriptor)
