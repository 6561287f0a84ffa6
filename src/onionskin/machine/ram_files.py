"""The RAM files of a store: what machines map. Each is a cache, made from the layer of a RAM volume that it is named after.

They lie in the directory `ram` of the store, and are not durable: the name says in which boot of this host a file was
made, and no file of another boot is used, since a crash may have kept half of it.

What must hold: a file appears under its name when it is whole, and is never written to from then on, until it is dropped.
Who uses one, or makes one, has a lock on it (flock): the users a shared one, which the preload library takes in the
hypervisor's process too. Only who has the lock alone drops a file, and overwrites it first under policy `zero`. What a
layer holds does not change as long as its row is there, so a file is right if it is there, and nobody wrote to it since: its
time of change is the one that it was made with (`_WHOLE_SECONDS`).
"""

import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

from onionskin.base import modes
from onionskin.base.files import data_ranges
from onionskin.base.lazy import logger
from onionskin.base.os_errors import words_of
from onionskin.base.threads import Thread
from onionskin.base.waiting import within
from onionskin.errors import OnionskinError, StateError
from onionskin.kernels._wipe import wipe

if TYPE_CHECKING:
    from onionskin.storage.open_store import OpenStore
    from onionskin.volume import Volume

_log = logger(__name__)

DIRECTORY = "ram"
# To make a file writes as much as the RAM that is in use. So it is not done between snapshots that follow each other.
QUIET_SECONDS = 2.0
STOPPED_SECONDS = 30.0  # for which somebody is waited for who has a file alone, and does not write to it
KEPT = 4  # files that nobody uses are kept up to this number, those that were used last


# The time of change that a whole file has. Any write to it sets another one, and use is noted in the time of access.
_WHOLE_SECONDS = 1_000_000_000
_TIMED = "t"  # behind the boot in the names of such files; an older onionskin made others


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8] + _TIMED


class RamFile:
    """A RAM file that is in use. A context manager: what it maps may be dropped after its end, if nobody else uses it.

    Attributes
    ----------
    path : Path
        The file.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path: Path = path
        self._descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def descriptor(self) -> int:
        """The open file, for reading, until `close`."""
        return self._descriptor

    def has(self, length: int) -> bool:
        """Whether it is a file of so many bytes."""
        found = os.fstat(self._descriptor)
        return stat.S_ISREG(found.st_mode) and found.st_size == length

    @property
    def is_whole(self) -> bool:
        """Whether nobody wrote to it since it was made."""
        return int(os.fstat(self._descriptor).st_mtime) == _WHOLE_SECONDS

    def close(self) -> None:
        """Say that this is no user of it any more. Further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes of a RAM file come from.

    Attributes
    ----------
    layer : bytes
        The sealed layer of a RAM volume that has them on top.
    wipe : str
        The policy of that volume.
    length : int
        Bytes of RAM.
    open : callable
        Opens what can be read as that layer: a snapshot, or a head above it that has nothing of its own.
    """

    layer: bytes
    wipe: str
    length: int
    open: "Callable[[], Volume]"


class RamFiles:
    """The RAM files of one store. Any thread may call it.

    Parameters
    ----------
    store : OpenStore
    """

    def __init__(self, store: "OpenStore") -> None:
        self._store = store
        self._directory = Path(store.layout.root) / DIRECTORY
        self._lock = (
            threading.RLock()
        )  # entered itself, as in `base/background.py`: an interrupt leaves it held by nobody
        self._changed = threading.Condition(self._lock)
        self._wanted: Source | None = None
        self._due = 0.0
        self._building: threading.Thread | None = None

    def _path(self, source: Source) -> Path:
        return self._directory / f"{source.layer.hex()}.{_boot()}.{source.wipe}"

    def use(self, source: Source) -> RamFile:
        """Return the file for a layer, made now if it is missing.

        Raises
        ------
        OSError
            It could not be made: there may be no room for it.
        """
        path, is_new = self._path(source), False
        while True:
            found = _use(path)
            if found is None:
                self._make(source, path)
                is_new = True
            elif found.has(source.length) and (found.is_whole or is_new):  # some file systems keep no times
                return found
            else:
                found.close()
                self._drop_wrong(path)

    def use_if_there(self, source: Source) -> RamFile | None:
        """Return the file for a layer, or None where none can be used now. Nobody is waited for: a machine stands still."""
        try:
            found = _use(self._path(source), seconds=0)
        except (OSError, StateError):  # it is no file, or is being dropped
            return None
        if found is not None and not (found.has(source.length) and found.is_whole):
            found.close()
            return None
        return found

    def _drop_wrong(self, path: Path) -> None:
        """Drop what is no RAM file, or was cut off: it is made again."""
        if not path.is_file() or not self._drop(path):
            raise StateError(
                f"{path} is not the RAM file that a machine needs, or was written to; remove it, and it is made again"
            )

    def make_soon(self, source: Source) -> None:
        """Make the file for a layer in the background, some seconds after the last such request: see QUIET_SECONDS.

        If that fails, it is made when it is needed. Of several requests only the last one counts.
        """
        with self._lock:
            self._wanted, self._due = source, time.monotonic() + QUIET_SECONDS
            if self._building is None:
                self._building = Thread(target=self._make_wanted, name="onionskin RAM file", daemon=True)
                self._building.start()

    def _make_wanted(self) -> None:
        source = self._next()
        # The machine goes first. Until then this waits with locks that whoever asks for a file waits for.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while source is not None:
            try:
                self.use(source).close()
                self.sweep()
            except (OSError, OnionskinError) as error:
                _log.warning(
                    "the RAM file of layer %s was not made beforehand: %s", source.layer.hex(), words_of(error)
                )
            source = self._next()

    def _next(self) -> Source | None:
        """Wait until what is wanted is due. Return it, or None if nothing is: the thread ends then."""
        with self._lock:
            while self._wanted is not None and (left := self._due - time.monotonic()) > 0:
                self._changed.wait(left)
            source, self._wanted = self._wanted, None
            if source is None:
                self._building = None
            return source

    def finish(self, *, is_wanted: bool = True) -> None:
        """Wait until what was asked for in the background is done, which begins at once; or until it is given up."""
        with self._lock:
            self._due = 0.0
            if not is_wanted:
                self._wanted = None
            self._changed.notify_all()
            thread = self._building
        if thread:
            thread.join()

    def _make(self, source: Source, path: Path) -> None:
        from onionskin.machine.ram import fill_file  # it brings NumPy, which whoever only drops files needs not

        self._make_directory()
        with self._drafted(path) as descriptor:
            if descriptor is None or path.exists():  # somebody else made it meanwhile
                return
            with source.open() as volume:
                fill_file(volume, descriptor, source.length)
            os.utime(descriptor, ns=(time.time_ns(), _WHOLE_SECONDS * 10**9))
            _draft_of(path).rename(path)

    def _make_directory(self) -> None:
        try:
            self._directory.mkdir(mode=0o700)
            modes.give_directory_to_owner(self._directory, self._store.layout.root)
        except FileExistsError:
            if self._directory.is_symlink() or not self._directory.is_dir():
                raise StateError(
                    f"{self._directory} is no directory; remove what is there: a store keeps RAM files in it"
                ) from None
            return
        if modes.is_shared(self._store.layout.root):
            self._directory.chmod(0o2770)

    @contextmanager
    def _drafted(self, path: Path) -> Iterator[int | None]:
        """Make the draft of a file, and hold it alone; None: somebody else made it, who was waited for."""
        draft = _draft_of(path)
        descriptor = _locked_draft(draft)
        try:
            if not _is_at(descriptor, draft):
                yield None
                return
            modes.share_file(descriptor, draft)
            self._empty(descriptor, path.suffix == ".zero")  # who made it before was killed
            try:
                yield descriptor
            finally:
                if _is_at(descriptor, draft):  # it failed, or was not needed
                    self._empty(descriptor, path.suffix == ".zero")
                    draft.unlink()
        finally:
            os.close(descriptor)

    def _empty(self, descriptor: int, is_wiped: bool) -> None:
        found = os.fstat(descriptor)
        if found.st_nlink > 1:  # by its other name it is somebody's, who may want it as it is
            if is_wiped:
                self._store.note_unwipeable(found.st_blocks * 512)
            return
        data = data_ranges(descriptor, 0, found.st_size) if is_wiped else ()
        if ranges := [(start, end - start) for start, end in data]:
            self._store.note_unwipeable(wipe(descriptor, ranges, zero=True, punch=False).bytes_unwipeable)
        os.ftruncate(descriptor, 0)

    # ---- dropping ----

    def sweep(self, *, keep: int = KEPT) -> None:
        """Drop the files that are not right any more, and of the others those that were not used for longest.

        A file that somebody uses stays, and is looked at the next time.
        """
        if not self._directory.is_dir() or self._store.read_only:
            return
        found = sorted(self._directory.iterdir(), key=_used_last, reverse=True)
        kept = 0
        for path in found:
            if self._is_right(path) and kept < keep:
                kept += 1
                continue
            try:
                self._drop(path)
            except OSError as error:
                _log.warning("the RAM file %s could not be dropped: %s", path, error.strerror)

    def drop(self, layer: bytes) -> bool:
        """Drop the files of a layer that nobody stands on any more. Return whether none is left."""
        if not self._directory.is_dir():
            return True
        left = [
            path for path in self._directory.iterdir() if path.name.startswith(layer.hex()) and not self._drop(path)
        ]
        return not left

    def _is_right(self, path: Path) -> bool:
        parts = path.name.split(".")
        if len(parts) != 3 or parts[1] != _boot():
            return False
        try:
            return self._store.catalog.layer_with_id(bytes.fromhex(parts[0])) is not None
        except ValueError:
            return False

    def _drop(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return True
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not _is_at(descriptor, path):
                return True
            # Nobody may begin to use it from here on, and who opened it before finds that the name is gone.
            gone = path.with_name(path.name.removesuffix(_DROPPED) + _DROPPED)
            path.rename(gone)
            self._empty(descriptor, ".zero" in path.name)
            gone.unlink()
            return True
        finally:
            os.close(descriptor)


_DROPPED = ".gone"


def _lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for_maker(descriptor: int, draft: Path) -> None:
    """Hold a draft alone. Who makes it is waited for as long as it writes, and no longer: it may have been stopped."""
    before = None
    while not within(STOPPED_SECONDS, lambda: _lock(descriptor, fcntl.LOCK_EX)):
        found = os.fstat(descriptor)
        written = found.st_blocks, found.st_mtime_ns
        if written == before:
            raise StateError(f"{draft} is being made by another process, which does not go on; try again when it does")
        before = written


def _locked_draft(draft: Path) -> int:
    """Open a draft, made now if it is missing, and hold it alone; where it is at its name no more, somebody else made it.

    A file that has another name too is somebody's, and not written to: it loses this name alone.
    """
    while True:
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _wait_for_maker(descriptor, draft)
            if os.fstat(descriptor).st_nlink < 2 or not _is_at(descriptor, draft):
                return descriptor
            draft.unlink()
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _draft_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _use(path: Path, seconds: float | None = None) -> RamFile | None:
    """Use a file, or return None if there is none. Who drops it is waited for so long, by default STOPPED_SECONDS."""
    limit = STOPPED_SECONDS if seconds is None else seconds
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):
                raise
            raise StateError(f"{path} is no file; remove it: the RAM file of that name is made again") from None
        try:
            if not within(limit, lambda: _lock(descriptor, fcntl.LOCK_SH) or not _is_at(descriptor, path)):  # noqa: B023
                raise StateError(
                    f"{path} is being dropped by another process, which does not go on; try again when it does"
                )
            if _is_at(descriptor, path):
                with suppress(OSError):  # it was used last now
                    os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
                return RamFile(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def was_written_to(path: Path) -> bool:
    """Whether somebody wrote to a RAM file that a machine maps; false where that is not known, as its name is gone."""
    try:
        return _TIMED in path.name.split(".")[1][8:] and int(path.stat().st_mtime) != _WHOLE_SECONDS
    except (FileNotFoundError, NotADirectoryError, IndexError):
        return False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether this is still the file of that name."""
    try:
        there = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _used_last(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat(follow_symlinks=False).st_atime
    return 0.0
