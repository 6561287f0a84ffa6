"""Who may free, and who may write: OFD locks on bytes of files that have no other use.

`ByteLocks` is one descriptor of the store's `lock` file. Each open volume or view has its own, so that two handles in
one process exclude each other as two processes do. A handle holds its bytes shared; whoever frees a file takes its
byte exclusively, without waiting. Within one handle the lock of a byte may be raised from shared to exclusive and
back: other handles see the change, the handle's own threads are kept apart by `_exclusive`.

`ReadersLock` is held by those who read a head that nobody writes. `VolumeLock` is held by the one writer of a volume.
Its file says who that is; what it says counts only while the lock is held. The file is looked at again once it is locked,
since it may have been removed or replaced meanwhile; and since a file that somebody removes later locks nobody out, the
writer also holds a byte of the store's `lock` file, far behind those that stand for files, whose number comes from the
volume's id.

Locks belong to the open file description, which a forked child shares: closing gives them up explicitly in the
process that took them, and a child only closes its descriptor.
"""

import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EACCES, EDQUOT, ELOOP, ENOSPC, EROFS
from pathlib import Path
from typing import NoReturn

from onionskin.base import forking
from onionskin.base.modes import share_file
from onionskin.errors import FormatError, StateError
from onionskin.storage.layout import Layout

STORE_BYTE = 0
_WRITER_BYTES = 1 << 62  # the first of those that stand for the writers of volumes
_FLOCK = struct.Struct("hhqqi4x")


@contextmanager
def _named(descriptor: int) -> Iterator[None]:
    """Give an error of a call on a descriptor the name of the file, which the call does not know."""
    try:
        yield
    except OSError as error:
        _name(error, descriptor)
        raise


def _name(error: OSError, descriptor: int) -> None:
    if error.filename is None:
        with suppress(OSError):
            error.filename = str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _set_lock(descriptor: int, kind: int, start: int, count: int) -> bool:
    """Set or change a lock without waiting; False if somebody else's is in the way."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, count, 0))
    except BlockingIOError:
        return False
    except PermissionError:  # POSIX lets a system answer EACCES for the same thing
        return False
    except OSError as error:
        _name(error, descriptor)
        raise
    return True


def is_locked(descriptor: int, start: int, count: int) -> bool:
    """Whether another open file description holds any lock on the bytes."""
    return _kind_in_the_way(descriptor, fcntl.F_WRLCK, start, count) != fcntl.F_UNLCK


def _kind_in_the_way(descriptor: int, kind: int, start: int, count: int) -> int:
    """Return the kind of a lock that somebody else has and that one of `kind` would meet; F_UNLCK: there is none."""
    with _named(descriptor):
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(kind, os.SEEK_SET, start, count, 0))
    found: int = _FLOCK.unpack(answer)[0]
    return found


def joined(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Sort numbers and join neighbours: (first, count) of each stretch, so that a deep chain costs few calls."""
    stretches: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if stretches and stretches[-1][0] + stretches[-1][1] == number:
            stretches[-1] = (stretches[-1][0], stretches[-1][1] + 1)
        else:
            stretches.append((number, 1))
    return stretches


class ByteLocks:
    """One handle's locks on bytes of a lock file. All methods may be called by any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._shared: set[int] = set()
        self._exclusive: set[int] = set()
        self._descriptor = _open_to_share(path)
        forking.register(self)

    def take_shared(self, numbers: Iterable[int]) -> bool:
        """Lock all bytes for reading, or none of them; False if one is being freed by somebody else."""
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
            One is being freed by somebody else.
        """
        if not self.take_shared(numbers):
            raise StateError(f"files of {self.path.parent} are being freed or wiped just now; try again")

    def wait_shared(self, number: int) -> None:
        """Lock one byte for reading, and wait for whoever holds it alone. Nobody else may use this handle yet."""
        descriptor = self._open_descriptor()
        with _named(descriptor):
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, number, 1, 0))
        self._shared.add(number)

    def drop_shared(self, numbers: Iterable[int]) -> None:
        """Give bytes up; those that are not held are passed over."""
        with self._guard:
            unwanted = set(numbers) & self._shared
            self._shared -= unwanted
            for start, count in joined(unwanted - self._exclusive):
                _set_lock(self._open_descriptor(), fcntl.F_UNLCK, start, count)

    def keep_shared(self, numbers: Iterable[int]) -> None:
        """Give up all bytes but these."""
        self.drop_shared(self.shared - set(numbers))

    @property
    def shared(self) -> frozenset[int]:
        """The bytes held for reading."""
        with self._guard:
            return frozenset(self._shared)

    def share_exclusive(self, number: int) -> None:
        """Let others read a byte that is held alone. Nobody can take it alone before it is given up."""
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

    @contextmanager
    def exclusive(self, number: int) -> Iterator[bool]:
        """Hold a byte alone: yields whether that could be had without waiting. A shared lock comes back after it.

        Locks that were closed meanwhile by another thread hold nothing.
        """
        held = False
        try:
            with self._guard:
                is_free = self._descriptor >= 0 and number not in self._exclusive
                held = is_free and _set_lock(self._descriptor, fcntl.F_WRLCK, number, 1)
                if held:
                    self._exclusive.add(number)
            yield held
        finally:
            if held:
                with self._guard:
                    self._exclusive.discard(number)
                    if self._descriptor >= 0:
                        kind = fcntl.F_RDLCK if number in self._shared else fcntl.F_UNLCK
                        _set_lock(self._descriptor, kind, number, 1)

    def close(self) -> None:
        """Give everything up. Idempotent."""
        with self._guard:
            # Forgotten first: where an interrupt comes between, a second call must not close what has that number by then.
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                self._shared.clear()
                _set_lock(descriptor, fcntl.F_UNLCK, 0, 0)
                os.close(descriptor)

    def after_fork(self) -> None:
        """In the child: close, but unlock nothing, for the locks are the parent's."""
        self._guard = threading.Lock()  # another thread of the parent may have held it
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


@contextmanager
def locked_directory(path: Path, *, alone: bool) -> Iterator[bool]:
    """Lock a directory: with others, which is waited for, or alone, without waiting; yields whether that could be had.

    It needs no block on a full disk. Each caller has a descriptor of its own, so threads exclude each other too. Where there
    is no directory, or its file system locks none, it counts as locked.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield True
        return
    try:
        yield _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    finally:
        _flock(descriptor, fcntl.LOCK_UN)  # also from a child that was forked meanwhile, and has the descriptor
        os.close(descriptor)


def _flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds a volume."""

    pid: int
    start_ticks: int

    def __str__(self) -> str:
        return f"process {self.pid}" if self.pid else "another process"


class VolumeLock:
    """The lock of the one writer of a volume: a byte of the store's lock file, and a file of the volume's own.

    Whoever gets the byte is the writer. Only he makes the file, and only while the volume has a row (`make_file`): so a
    crash leaves none that no row names.

    Raises
    ------
    StateError
        Another handle, of this process or of another one, holds the volume.
    """

    def __init__(self, layout: Layout, volume_id: bytes, volume_name: str) -> None:
        self._path, self._volume_name = layout.volume_lock(volume_id), volume_name
        self._descriptor = self._byte_descriptor = -1
        try:
            self._byte_descriptor = open_lock_file(layout.lock)
            if not _set_lock(self._byte_descriptor, fcntl.F_WRLCK, _writer_byte(volume_id), 1):
                _refuse_taken(self._byte_descriptor, self._path, volume_id, volume_name)
        except BaseException:
            self.after_fork()
            raise
        forking.register(self)

    def make_file(self) -> None:
        """Lock the volume's own file too, and write into it who holds the volume. The volume has a row."""
        if self._descriptor < 0:  # else it is locked already, and writing into it failed: the disk was full
            self._descriptor = _lock_at_its_path(self._path)
        if self._descriptor < 0:
            _refuse_held(self._path, self._volume_name)
        _write_holder(self._descriptor)

    def close(self) -> None:
        """Give the volume up. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        byte_descriptor, self._byte_descriptor = self._byte_descriptor, -1
        try:
            if descriptor >= 0:
                with _named(descriptor):
                    os.ftruncate(descriptor, 0)
        finally:
            for one in (descriptor, byte_descriptor):
                if one >= 0:
                    _set_lock(one, fcntl.F_UNLCK, 0, 0)
                    os.close(one)

    def after_fork(self) -> None:
        """In the child: close, but unlock nothing."""
        for descriptor in (self._descriptor, self._byte_descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._byte_descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_byte_descriptor", -1) >= 0:
            self.close()


class ReadersLock:
    """What keeps writers from a volume whose head is read. Any number of handles may have it; it leaves no trace in a file.

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
        """Give the volume up. Idempotent."""
        self._bytes.close()


@contextmanager
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
            path = layout.volume_lock(id)
            if volume_holder(path):
                _refuse_held(path, name)
        yield
    finally:
        locks.close()


def _refuse_taken(descriptor: int, path: Path, volume_id: bytes, volume_name: str) -> NoReturn:
    """Say who has the byte of a volume's writer: its writer, or readers of its head."""
    if _is_only_read(descriptor, volume_id):
        raise StateError(
            f"volume {volume_name!r} is open for reading in another handle; close that, or open one of its snapshots "
            "instead"
        )
    _refuse_held(path, volume_name)


def _writer_byte(volume_id: bytes) -> int:
    """Return the byte of the store's lock file that stands for the writer of a volume: none that stands for a file."""
    return _WRITER_BYTES + int.from_bytes(volume_id[:7], "big")


def _is_only_read(descriptor: int, volume_id: bytes) -> bool:
    """Whether a volume could be locked for reading: those who have it locked do no more."""
    return _kind_in_the_way(descriptor, fcntl.F_RDLCK, _writer_byte(volume_id), 1) == fcntl.F_UNLCK


def _lock_at_its_path(path: Path) -> int:
    """Open and lock the file at a path, and return its descriptor once it is known to be that file still; -1: it is held."""
    while True:
        descriptor = open_lock_file(path)
        try:
            if not _set_lock(descriptor, fcntl.F_WRLCK, 0, 1):
                os.close(descriptor)
                return -1
            if is_file_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was removed, or replaced, before it was locked


def _refuse_held(path: Path, volume_name: str) -> NoReturn:
    holder = volume_holder(path) or Holder(0, 0)
    served = path.with_suffix(".control").exists()
    advice = "which serves it: stop that, work through it (onionskin.connect)" if served else "close it there"
    raise StateError(
        f"volume {volume_name!r} is open for writing in {holder}{',' if served else ';'} {advice}, "
        "or open one of its snapshots instead"
    )


def _write_holder(descriptor: int) -> None:
    """Say who holds a volume; a disk that is full keeps nobody from it."""
    with _named(descriptor):
        os.ftruncate(descriptor, 0)
    try:
        with _named(descriptor):
            os.pwrite(descriptor, f"{os.getpid()} {start_ticks(os.getpid())}\n".encode(), 0)
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise


def open_lock_file(path: Path) -> int:
    """Open a file to lock its bytes, made where it is not there: a regular one, reached by no link at its end."""
    return _checked_lock_file(path, os.O_RDWR | os.O_CREAT)


def _open_to_share(path: Path) -> int:
    """Open a lock file; where it may only be read, to lock it for reading alone.

    Where there is none, and none can be made, nobody can have made a file that somebody has to keep from being freed.
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


def _checked_lock_file(path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno == ELOOP:
            raise StateError(f"{path} is a symbolic link, and no file of a store is; remove it") from None
        raise
    with _named(descriptor):
        found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        is_regular = stat.S_ISREG(found.st_mode)
        what = "has another name too (a hard link)" if is_regular else "is not a regular file"
        raise (StateError if is_regular else FormatError)(
            f"{path} {what}, and a lock of a store is a file of its own; remove it"
        )
    if flags & os.O_CREAT and not found.st_size and found.st_uid == os.geteuid():
        share_file(descriptor, path)  # it may be that it was made just now
    return descriptor


def is_file_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that a path leads to now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def volume_holder(path: Path) -> Holder | None:
    """Who holds a volume for writing, without touching its lock."""
    try:
        descriptor = _checked_lock_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _read_holder(descriptor) if is_locked(descriptor, 0, 1) else None
    finally:
        os.close(descriptor)


def _read_holder(descriptor: int) -> Holder:
    """What the file says; a process that is just taking or giving up the lock has pid 0."""
    with _named(descriptor):
        fields = os.pread(descriptor, 100, 0).split()
    if len(fields) != 2 or not all(field.isdigit() for field in fields):
        return Holder(0, 0)
    return Holder(int(fields[0]), int(fields[1]))


def start_ticks(pid: int) -> int:
    """When a process began, in clock ticks since the machine did: tells it from a later one with the same id."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


_READERS_BYTE, _MERGER_BYTE = 0, 1


class BaseLock:
    """The lock of a base file: shared while something reads it, exclusive while a merge writes it.

    Whoever reads or writes the base does it through `descriptor`, the file that is locked: what its path leads to may be
    another file at any time. Who wants to write first locks a byte that only mergers want, so that nobody else can come
    between giving up the shared lock and having the exclusive one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if not _set_lock(self.descriptor, fcntl.F_RDLCK, _READERS_BYTE, 1):
            self.after_fork()
            raise StateError(f"a merge is writing the base {path}; wait for it to end, and open again")
        forking.register(self)

    def write_alone(self) -> None:
        """Hold the base alone, to write it; on an error it is held as before.

        Raises
        ------
        StateError
            Others have it open.
        """
        writer = os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        if not _set_lock(writer, fcntl.F_WRLCK, _MERGER_BYTE, 1):
            os.close(writer)
            raise StateError(f"another merge is writing the base {self.path}; try again when it is done")
        _set_lock(self.descriptor, fcntl.F_UNLCK, _READERS_BYTE, 1)
        if not _set_lock(writer, fcntl.F_WRLCK, _READERS_BYTE, 1):
            _set_lock(self.descriptor, fcntl.F_RDLCK, _READERS_BYTE, 1)
            os.close(writer)
            raise StateError(
                f"the base {self.path} is in use; close the volumes and views that stand on it, and try again"
            )
        os.close(self.descriptor)
        self.descriptor = writer

    def share(self) -> None:
        """Let others read the base again that was held alone."""
        if self.descriptor >= 0:
            _set_lock(self.descriptor, fcntl.F_RDLCK, _READERS_BYTE, 1)
            _set_lock(self.descriptor, fcntl.F_UNLCK, _MERGER_BYTE, 1)

    @property
    def is_at_its_path(self) -> bool:
        """Whether the path still leads to the file that is locked."""
        return is_file_at(self.descriptor, self.path)

    def close(self) -> None:
        """Give the base up. Idempotent."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            _set_lock(descriptor, fcntl.F_UNLCK, 0, 0)
            os.close(descriptor)

    def after_fork(self) -> None:
        """In the child: close, but unlock nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            self.close()


def is_being_merged_into(path: Path) -> bool:
    """Whether a merge writes the base at a path now, in any process."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return is_locked(descriptor, _MERGER_BYTE, 1)
    finally:
        os.close(descriptor)
