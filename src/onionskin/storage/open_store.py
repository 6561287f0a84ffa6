"""One opening of a store, with everything that its handles share.

The handles share the directory, the catalog, the locks, the reserve, the list of open handles, and the thread that
works in the background. The work of that thread is handed in; the operations themselves are elsewhere.

What must hold: a handle holds shared locks on all files that it can read before it trusts the catalog.
"""

import os
import stat
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from errno import EDQUOT, ENOSPC
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from onionskin.base import forking
from onionskin.base.background import Background
from onionskin.base.fsync import sync_directory
from onionskin.base.lazy import logger
from onionskin.base.modes import give_directory_to_owner, group_id, is_shared, make_shared, refuse_other_group
from onionskin.base.paths import FilePath
from onionskin.base.sizes import format_size
from onionskin.catalog import Catalog
from onionskin.catalog.progress import Progress
from onionskin.catalog.read_only import can_be_written
from onionskin.errors import ChainError, FormatError, OnionskinError, StateError
from onionskin.storage import mark
from onionskin.storage.chain import Chain, lock_base, lock_chain, open_chain, read_chain
from onionskin.storage.layout import CATALOG, DIRECTORIES, Layout, allocated_files, bytes_in
from onionskin.storage.locks import BaseLock, ByteLocks, SharedFile, second_name
from onionskin.storage.reserve import Reserve
from onionskin.storage.shared_paths import OpenChain, SealedViews

if TYPE_CHECKING:
    from onionskin.base.annotations import AnyPath
    from onionskin.kernels._volume import DataPath

_log = logger(__name__)

_NOTE_SECONDS = 1.0  # between two notes of how far the catalog has come, beside those of the background and of the end

Result = TypeVar("Result")


class Handle(Protocol):
    """One open disk of a store: a volume that is open for writing, or a head or a snapshot that is open for reading."""

    @property
    def writable(self) -> bool:
        """Whether this is a head that is open for writing."""

    @property
    def head(self) -> bytes:
        """The id of the top layer that the handle reads."""

    @property
    def path(self) -> "DataPath":
        """The data path that the handle reads and writes through."""

    @property
    def is_unwritten(self) -> bool:
        """Whether it is a head that nothing was written to, and that is not opened before: it has no locks yet."""

    @property
    def locks(self) -> ByteLocks:
        """The locks on the files that the handle can read."""

    @property
    def base_lock(self) -> BaseLock | None:
        """The lock on the base, if there is a base."""

    def wait_for_readers(self) -> None:
        """Wait until every read that began before the call has ended."""

    def prepare_if_wanted(self) -> None:
        """Make the files of the next head, so that a snapshot need not make them."""

    def close(self) -> None:
        """Make durable what was written, and close the handle."""


class OpenStore:
    """One opening of a store. Any thread may call it.

    Parameters
    ----------
    path, create, trust, group
        These are as for `Store`.
    work : callable
        The function that the background thread calls with this object when it is woken. It should raise nothing.

    Attributes
    ----------
    views : SealedViews
        The sealed layers that are open in this store.
    shared_file : SharedFile
        What stands for the lock files of volumes that are opened as some of many.
    reported_work : set of int
        The ids of the pending work whose failure was logged already.
    reported_volumes : set of bytes
        The ids of the volumes of which it was logged that they stay beyond their lifetime, and why.
    doubted_segments : set of bytes
        The ids of segments that are not of the layers that their rows name: nothing in them is freed.
    work_found : int
        The greatest id of the pending work that was there when the store was opened.
    does_work : bool
        Whether this handle has done pending work, as none does that only looks.
    """

    def __init__(
        self,
        path: "AnyPath",
        *,
        create: bool,
        trust: bool,
        group: str | int | None,
        work: "Callable[[OpenStore], None]",
    ) -> None:
        if not os.fspath(path):  # which pathlib takes for the directory that is here
            raise ValueError("the path of a store is empty: give a directory, such as '.'")
        self.path: FilePath = FilePath(path)
        self.layout: Layout = Layout(self.path.absolute())
        self._closed = False
        # The bytes that this handle wiped with policy `zero`, but that may still be on the medium: see
        # `note_unwipeable`.
        self.unwipeable_bytes: int = 0
        self.reported_work: set[int] = set()
        self.reported_volumes: set[bytes] = set()
        self.doubted_segments: set[bytes] = set()
        self.does_work: bool = False
        self._progress: Progress | None = None  # as it was written to the mark
        self._noted_at = float("-inf")  # when that was, or was tried
        self._counting = threading.Lock()
        self._background = Background(partial(work, self), "onionskin pending work")
        self._open: weakref.WeakSet[Handle] = weakref.WeakSet()
        self._open_guard = threading.Lock()
        self.views: SealedViews = SealedViews()
        self.shared_file: SharedFile = SharedFile()
        if create and not self.layout.catalog.exists():
            self._make_directories(group)
        elif group is not None:
            refuse_other_group(self.layout.root, group)
        if not trust:
            refuse_foreign(self.layout)
        refuse_links(self.layout)
        self.read_only: bool = self.layout.catalog.exists() and not can_be_written(self.layout.catalog)
        self.reserve: Reserve = Reserve(self.layout, read_only=self.read_only)
        self.catalog: Catalog = self._open_catalog(create)
        if not self.read_only:  # the catalog is open, so this is a store: no directory is made anywhere else
            with suppress(OSError):  # an operation that needs one of the directories raises the error
                self._make_parts()
        try:
            self.locks: ByteLocks = self.reserve.retry(lambda: ByteLocks(self.layout.lock))
            self.locks.share_store()
            self._refuse_changes_of_another_catalog()
            self.work_found: int = 0 if self.read_only else self.catalog.last_work()
        except BaseException:
            self.catalog.close()
            raise
        forking.register(self)

    def _refuse_changes_of_another_catalog(self) -> None:
        """Have the store be read alone if its catalog is older than its files, or another's: see `storage.mark`."""
        if self.read_only:
            return
        known = mark.read(self.layout.mark)  # before the catalog, which only goes on
        progress = self.catalog.progress() if known else None
        why = mark.why_not_of(progress, known, self.layout) if known and progress else None
        if why is not None:
            self.catalog.is_not_its_own = why
            self.read_only = self.reserve.read_only = True
            _log.warning("%s", why)

    def note_progress(self) -> None:
        """Write down how far the catalog has come, if this process has changed it, and that is durable."""
        if self.read_only:
            return
        self._noted_at = time.monotonic()
        with suppress(OSError, OnionskinError):  # a store works without it
            progress = self.catalog.durable_progress()
            if progress is not None and progress != self._progress:
                self.catalog.refuse_moved()
                mark.write(self.layout.mark, progress)
                self._progress = progress

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this object is the copy that a forked child inherited."""
        return self._closed

    def _open_catalog(self, create: bool) -> Catalog:
        """Open the catalog. If the disk is full to the last block and no reserve is left, open it read-only."""
        try:
            with self.reserve.is_kept():
                if not self.read_only:
                    self.reserve.make_room_for_catalog()
                return self.reserve.retry(lambda: Catalog(self.layout.catalog, create=create, read_only=self.read_only))
        except OSError as error:
            if error.errno not in (ENOSPC, EDQUOT) or not self.layout.catalog.exists():
                raise
        _log.warning("%s: the disk is full to the last block, so the store is opened to be read alone", self.path)
        self.read_only = self.reserve.read_only = True
        return Catalog(self.layout.catalog, create=False, read_only=True)

    def _make_directories(self, group: str | int | None) -> None:
        self._refuse_remains()
        group = None if group is None else group_id(group)
        way = [self.layout.root, *self.layout.root.parents]
        found = next(index for index, directory in enumerate(way) if directory.exists())
        # The loop begins with the directory that exists already: a process that crashed may have made it, and then its
        # name need not be durable yet.
        for directory in reversed(way[: found + 1]):
            is_root, was_there = directory == self.layout.root, directory.exists()
            directory.mkdir(exist_ok=True, mode=0o700 if is_root else 0o777)
            if group is not None and is_root:
                # A directory that existed before belongs to somebody, and so do its contents. Its mode and its group
                # are therefore not changed.
                (refuse_other_group if was_there else make_shared)(directory, group)
            with suppress(PermissionError):  # this is somebody else's directory, so this store did not make it
                sync_directory(directory.parent)  # BARRIER: store name
        self._make_parts()

    def _refuse_remains(self) -> None:
        """Raise FormatError where a catalog would be made for the files of a store that has lost its own.

        No row would name them, so `check --repair` would remove all that the volumes held. SQLite would take a log that is
        left for the new catalog's, and mix the two.
        """
        layout = self.layout
        if not layout.root.is_dir():
            return
        log = layout.catalog.with_name(f"{CATALOG}-wal")
        names = ((layout.segments, ".seg"), (layout.layers, ".map"))
        found = [log] if bytes_in(log) else [at for at, suffix in names if next(allocated_files(at, suffix), None)]
        if found and not layout.catalog.exists():  # another process may have made the store meanwhile
            raise FormatError(
                f"{layout.root} has files of volumes ({found[0]}), and no {CATALOG} that says what they are: it was removed, "
                "or the store was copied in part. Put the whole store back from a copy, or make a store in another directory"
            )

    def _make_parts(self) -> None:
        """Make the directories of a store that are missing. A copy of a store may lack those that were empty."""
        for name in DIRECTORIES:
            with suppress(FileExistsError):
                (self.layout.root / name).mkdir(mode=0o700)
                give_directory_to_owner(self.layout.root / name, self.layout.root)
                if is_shared(self.layout.root):
                    make_shared(self.layout.root / name, self.layout.root.stat().st_gid)

    def open_head(self, layer: bytes, volume_id: bytes) -> OpenChain:
        """Open a head for writing. The caller holds the lock of its volume."""
        self.catalog.sync_found()
        return self.open_layer(layer, writable=True, dirty=self.layout.dirty_file(volume_id))

    def open_layer(
        self, layer: bytes, *, writable: bool = False, verify: bool = False, dirty: FilePath | None = None
    ) -> OpenChain:
        """Lock the files and the base of a head or a sealed layer, and open its data path.

        The caller closes the data path and both locks.
        """
        locks = ByteLocks(self.layout.lock)
        base_lock = None
        try:
            chain, base_lock = self._lock_layer(layer, locks, verify)
            path = open_chain(self.layout, chain, writable=writable, base_lock=base_lock, dirty=dirty)
            self.catalog.refuse_moved()  # what was opened by name is in this store
        except BaseException:
            locks.close()
            if base_lock:
                base_lock.close()
            raise
        return OpenChain(chain, path, locks, base_lock, base_lock.half_merged if base_lock else None)

    def _lock_layer(self, layer: bytes, locks: ByteLocks, verify: bool) -> tuple[Chain, BaseLock | None]:
        """Lock a chain and its base. If a merge into the base ended between the two steps, begin anew."""
        while True:
            chain = lock_chain(self.catalog, layer, locks)
            try:
                return chain, lock_base(self.catalog, chain, verify=verify)
            except ChainError:
                if read_chain(self.catalog, layer).base == chain.base:
                    raise

    def register(self, handle: Handle) -> None:
        """Add a handle to the list of open handles. If the store was closed meanwhile, close it and raise StateError."""
        with self._open_guard:
            if not self._closed:
                self._open.add(handle)
                return
        with suppress(OSError, OnionskinError):  # it cannot ask the catalog any more, and nothing was written
            handle.close()
        raise StateError(f"the store {self.path} is closed; open it again")

    def open_handles(self) -> list[Handle]:
        """Return the volumes and views that are open in this store."""
        with self._open_guard:
            return list(self._open)

    def change(self, change: "Callable[[], Result]") -> "Result":
        """Run a change as one transaction. If the disk is full, give the reserve up and run the change again.

        So a change may run twice. The first run leaves nothing in the catalog then.
        """

        def once() -> "Result":
            with self.catalog.transaction():
                return change()

        result = self.reserve.retry(once)
        if time.monotonic() > self._noted_at + _NOTE_SECONDS:
            self.note_progress()
        if self.catalog.wants_room_in_log:
            self.wake()
        return result

    def path_of_head(self, layer: bytes) -> "DataPath | None":
        """Return the data path of the volume that is open for writing in this store with this head, if there is one."""
        for handle in self.open_handles():
            if handle.writable and not handle.is_unwritten and handle.head == layer:
                return handle.path
        return None

    def wake(self) -> None:
        """Let the background look for work."""
        self._background.wake()

    def rest(self, seconds: float) -> None:
        """Have the background begin nothing for so long, unless somebody waits for it."""
        self._background.rest(seconds)

    def finish_work(self) -> None:
        """Wait until the background has done its work."""
        self._background.finish()

    def note_unwipeable(self, count: int) -> None:
        """Count bytes that a wipe overwrote but that may still be on the medium, and log a warning the first time."""
        with self._counting:
            first = count and not self.unwipeable_bytes
            self.unwipeable_bytes += count
        if first:
            _log.warning(
                "%s: a wipe overwrote %s whose old contents may still be on the medium, since the file system writes "
                "elsewhere or other files share the blocks; keep the store on ext4 or XFS, or encrypt the device",
                self.path,
                format_size(count),
            )

    def forget(self, handle: Handle) -> None:
        """Remove a handle that closes from the list of open handles."""
        with self._open_guard:
            self._open.discard(handle)

    def close(self) -> None:
        """Close the store, and the handles that are still open in it. Further calls do nothing."""
        if self._closed:  # in the child of a fork the guard may be held by nobody, for ever
            return
        with self._open_guard:  # what is not in the list by now never will be
            if self._closed:
                return
            self._closed = True
        with ExitStack() as stack:  # if the flush of one volume fails, the others are closed all the same
            stack.callback(self.reserve.make_again)  # the catalog's log is gone by then
            stack.callback(self.catalog.close)
            stack.callback(self.locks.close)
            stack.callback(self.note_progress)
            stack.callback(self._background.end)
            for handle in self.open_handles():
                stack.callback(handle.close)

    def after_fork(self) -> None:
        """Mark this object as closed. A forked child calls this, and then does nothing with the store."""
        self._closed = True


def refuse_foreign(layout: Layout) -> None:
    """Refuse the store of another user. Its rows name files that would be used with the rights of this user."""
    try:
        owner = layout.root.stat().st_uid
    except FileNotFoundError:
        return
    if owner != os.geteuid():
        raise StateError(
            f"the store {layout.root} belongs to user {owner}, and this is user {os.geteuid()}; a store can name any file "
            "as a base, so open it only if you trust that user (--trust on the command line, trust=True in Python)"
        )


def refuse_links(layout: Layout) -> None:
    """Refuse a store in which a link, or something else of the wrong kind, stands for one of its files or directories.

    A link would lead out of the store. So would a second name of a file that SQLite writes in place beside the catalog.
    """
    for path in (*(layout.root / name for name in DIRECTORIES), *layout.files):
        try:
            found = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        mode = found.st_mode
        if stat.S_ISREG(mode) and found.st_nlink > 1 and path in layout.made_by_sqlite:
            raise StateError(second_name(path, "what is written to it would be in that file"))
        wanted = stat.S_ISDIR(mode) if path.name in DIRECTORIES else stat.S_ISREG(mode)
        if not wanted:
            is_link = stat.S_ISLNK(mode)
            what = "a symbolic link" if is_link else "something else"
            kind = "directory" if path.name in DIRECTORIES else "regular file"
            raise (StateError if is_link else FormatError)(
                f"{path} is {what}, where a store has a {kind} of its own; look at what it is, and remove it"
            )
