"""A disk that is open: the head of a volume for writing, or a head or a snapshot for reading.

What must hold: a handle holds shared locks on all files that its data path can read, until the last read of them has
ended, or the last array over them is gone. A change of the tree is one transaction, and the data path is told the outcome
afterwards, whatever was raised. If the outcome cannot be known, the head takes no more writes. Code that calls the
data path directly is told of a new one before the old one is closed.

Nothing here decides what is done to a disk. What has to happen at its end (a flush, freeing) is passed in.
"""

import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import EINVAL
from typing import TYPE_CHECKING, TypeVar

from onionskin.base import forking
from onionskin.base.held import held
from onionskin.base.lazy import logger
from onionskin.base.limits import HEADER_BYTES
from onionskin.base.named_tuples import NamedTuple
from onionskin.base.signals import DeferredInterrupt
from onionskin.catalog import CommitUnknownError, VolumeRow
from onionskin.errors import OnionskinError, StateError
from onionskin.storage.chain import read_chain, unfinished_base_merges
from onionskin.storage.layout import bytes_in
from onionskin.storage.open_store import OpenStore
from onionskin.storage.shared_paths import OpenChain, closed_path

if TYPE_CHECKING:
    from onionskin.catalog import LayerRow, SegmentRow
    from onionskin.kernels._volume import DataPath
    from onionskin.storage.locks import BaseLock, ByteLocks, ReadersLock, VolumeLock

_log = logger(__name__)

_LOOK_SECONDS = 0.002  # after so long a first write looks again whether an operation, which goes on, opened the head

Result = TypeVar("Result")


class OpenDisk(ABC):
    """What `OpenHead` and `OpenView` have in common.

    Attributes
    ----------
    store : OpenStore
        The opening of the store that it belongs to.
    row : VolumeRow
        The volume's row as it was when it was opened. The name may have changed since.
    path : DataPath
        The data path that reads and writes go through. To ask a head for it opens it, if nothing was written to it yet.
    reading_path : DataPath
        The data path that reads go through; it is not opened to ask for it.
    head : bytes
        The id of the top layer of the disk.
    base_lock : BaseLock or None
        The lock on the base, if there is one.
    guard : threading.RLock
        Held while the tree is changed, and while the handle is closed.
    """

    snapshot_name: str | None = None

    def __init__(self, store: OpenStore, row: VolumeRow, opened: OpenChain) -> None:
        self.store = store
        self.row = row
        self._path: DataPath = opened.path
        self.head: bytes = opened.chain.top.id  # under the guard, what the catalog has: see `head_now`
        self.base_lock: BaseLock | None = opened.base_lock
        self.block_size: int = opened.chain.top.block_size
        self.wipe: str = opened.chain.top.wipe
        self.guard: threading.RLock = threading.RLock()
        self._locks: ByteLocks | None = opened.locks
        self._followers: list[weakref.WeakMethod[Callable[[DataPath], None]]] = []
        self._closed = False
        self._forked = False
        self._released = False
        forking.register(self)

    @property
    def path(self) -> "DataPath":
        """The data path that reads and writes go through."""
        return self._path

    @property
    def reading_path(self) -> "DataPath":
        """The data path that reads go through."""
        return self._path

    @property
    def is_unwritten(self) -> bool:
        """Whether it is a head that reads through the view of what it stands on, since nothing was written to it."""
        return False

    @property
    def read_through(self) -> bytes | None:
        """The sealed layer whose view such a head is read through."""
        return None

    def begin_writing(self) -> bool:
        """Open a head that nothing was written to, so that it can be written; return whether there is a new path now."""
        return False

    @property
    def head_now(self) -> bytes:
        """The top layer that the catalog has for the disk, for a caller that does not hold the guard.

        While another thread replaces the head, `head` is for a moment one that the catalog does not have any more.
        """
        return self.head

    @property
    def locks(self) -> "ByteLocks":
        """The locks on the files that it can read."""
        locks = self._locks  # read once: another thread may close the disk meanwhile
        if locks is None:
            raise StateError(f"{self!r} is closed; open it again")
        return locks

    @property
    def pins(self) -> tuple[object, ...]:
        """The objects that an array over its files has to keep alive.

        A view that is closed has none, though other views of its layer may still read through the path that it had.
        """
        base_lock = self.base_lock  # read before the locks: it is never given up before them
        return (self.locks, base_lock)

    @property
    def name(self) -> str:
        """The volume's name now. Somebody may have renamed it since it was opened."""
        if not (self._closed or self._forked):
            found = self.store.catalog.volume_with_id(self.row.id)
            if found:
                return found.name
        return self.row.name

    @property
    def size_bytes(self) -> int:
        """Size of the disk in bytes."""
        return int(self._path.size_bytes)

    @property
    def writable(self) -> bool:
        """Whether this is a head that is open for writing."""
        return False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def forked(self) -> bool:
        """Whether this is the copy in the child of a fork, which cannot be used."""
        return self._forked

    def __repr__(self) -> str:
        at = f"@{self.snapshot_name}" if self.snapshot_name else ""
        if self._closed or self._forked:
            state = "closed" if self._closed else "lost in a fork"
        else:
            state = "poisoned" if self._path.poisoned else "open" if self.writable else "read-only"
        return f"<Volume {self.store.path}/{self.name}{at} {state}>"

    def follow(self, told: "Callable[[DataPath], None]") -> None:
        """Have a method called with each new data path, before the old one is closed.

        The method is held weakly, and must not raise.
        """
        self._followers.append(weakref.WeakMethod(told))

    def _tell(self, path: "DataPath") -> None:
        for follower in list(self._followers):
            if told := follower():
                told(path)

    def on_path(self, call: "Callable[[DataPath], Result]") -> Result:
        """Run a call. If a revert replaced the data path meanwhile, run it again on the new one.

        A head that nothing was written to refuses what is not a read, and is opened for it.
        """
        while True:
            path = self._path
            try:
                return call(path)
            except StateError:
                # The path is looked at again: another thread may have opened the head after the first look.
                if path is self._path and not self.begin_writing() and path is self._path:
                    raise

    def wait_for_readers(self) -> None:
        """Return when every read that began before has ended."""
        path = self._path
        try:
            path.wait_for_readers()
        except StateError:
            if not path.closed:  # a closed path has no readers
                raise

    def prepare_if_wanted(self) -> None:
        """Make the files of the next head. A disk that is only read has none, so nothing is done."""
        return

    def to_write(self) -> "OpenHead":
        """Return the head that is open for writing, or raise StateError if this is not one."""
        with self.guard:
            self._refuse_ended()
        raise StateError(f"{self!r} is a view of a snapshot; open the volume itself")

    def _refuse_ended(self) -> None:
        if self._forked:
            raise forking.forked_error(f"volume {self.name!r}")
        if self._closed:
            raise StateError(f"volume {self.name!r} is closed; open it again")

    @abstractmethod
    def close(self) -> None:
        """Close the disk. Idempotent. Arrays over its files stay valid."""

    def after_fork(self) -> None:
        """In the child of a fork: raise from now on, release nothing."""
        self._forked = True
        self.guard = threading.RLock()  # another thread of the parent may have held it
        self._path.after_fork()


class OpenView(OpenDisk):
    """A snapshot, or a head that nobody writes, that is open for reading.

    Parameters
    ----------
    store, row, opened
        The store, the volume, and the files under their locks. For a snapshot, `opened` comes from the store's views.
    snapshot : str, optional
        The snapshot's name, or None for a head.
    read_lock : ReadersLock, optional
        For a head: it keeps writers away.
    free_waiting : callable
        Called with the store when the files are given up. It frees those that waited for this.
    """

    def __init__(
        self,
        store: OpenStore,
        row: VolumeRow,
        opened: OpenChain,
        *,
        snapshot: str | None = None,
        read_lock: "ReadersLock | None" = None,
        free_waiting: Callable[[OpenStore], None],
    ) -> None:
        super().__init__(store, row, opened)
        self.snapshot_name = snapshot
        self._use = [self.head]  # of the store's views, until it is given back
        self._read_lock = read_lock
        self._free_waiting = free_waiting

    @property
    def pins(self) -> tuple[object, ...]:
        """The objects that an array over its files has to keep alive."""
        read_lock = self._read_lock  # before the others, as the base's lock
        return (*super().pins, read_lock)

    def close(self) -> None:
        """Close the view. Its locks are released when the last array over it is gone, since nothing refers to them then."""
        if self._forked:
            return
        with self.guard:
            if self._released:
                return
            self._closed = True  # a second call goes on here if an interrupt came before the end
            self.store.forget(self)
            if self.snapshot_name is None:
                self._path.close()
            else:
                self._give_back()
            self._locks = self.base_lock = self._read_lock = None
            self._released = True
            if self.snapshot_name is not None or self.store.does_work:  # whoever only reads a head frees nothing
                with suppress(
                    OSError, OnionskinError
                ):  # this frees what waited for these files, which may hold secrets
                    self._free_waiting(self.store)

    def _give_back(self) -> None:
        self._path = closed_path(self._path)  # other views of the layer may still use the open one
        self._tell(self._path)
        self.store.views.end(self._use)


def is_unwritten(store: OpenStore, volume: bytes, head: "LayerRow") -> bool:
    """Whether a volume that is locked and not open has nothing in its head, flushed or left by a process that died."""
    layout = store.layout
    return not (
        head.map_frames or bytes_in(layout.dirty_path(volume)) or bytes_in(layout.map_path(head.map_id)) > HEADER_BYTES
    )


def unwritten(store: OpenStore, heads: "Sequence[tuple[bytes, LayerRow, Sequence[SegmentRow]]]") -> "list[LayerRow]":
    """Return those of several heads for which `is_unwritten` holds, and whose segments are empty.

    Each comes with its volume's id and its segments. All files are looked at by one call.
    """
    from onionskin.base._names import sizes_of

    layout = store.layout
    files: list[str] = []
    for volume, head, segments in heads:
        files += (layout.map_path(head.map_id), layout.dirty_path(volume))
        files += [layout.segment_path(segment.id) for segment in segments]
    sizes, at = sizes_of(files), 0
    found = []
    for _, head, segments in heads:
        end = at + 2 + len(segments)
        if not head.map_frames and sizes[at] <= HEADER_BYTES and not any(sizes[at + 1 : end]):
            found.append(head)
        at = end
    return found


class Unwritten(NamedTuple):
    """A head that has nothing of its own, so that it reads as the sealed layer that it stands on.

    Attributes
    ----------
    head : LayerRow
        The head, as it was when the volume was locked.
    below : bytes
        The sealed layer, whose view the head is read through.
    use : list of bytes
        That use of the store's views, for `SealedViews.end`.
    open_head : callable
        Opens the head for writing, by what the catalog says then.
    after_open : callable
        Called with the head after that, for work that was left over.
    """

    head: "LayerRow"
    below: bytes
    use: list[bytes]
    open_head: "Callable[[OpenHead], OpenChain]"
    after_open: "Callable[[OpenHead], None]"


class OpenHead(OpenDisk):
    """The head of a volume that is open for writing, with the volume's lock.

    Parameters
    ----------
    store, row, opened
        The store, the volume, and the files under their locks.
    unwritten : Unwritten, optional
        The head has nothing of its own, and `opened` is the store's view of the layer that it stands on.
    volume_lock : VolumeLock
        It is released at the end.
    finish : callable
        Called with the head when it is closed, to make durable what was written. It is not called if the data path is
        poisoned.
    free_waiting : callable
        As for an `OpenView`. What others dropped while the head shared its files waits for the end of that.

    Attributes
    ----------
    is_merging : bool
        Whether a merge into the base is copying. Under `guard`.
    merge_stop : bool
        Whether such a merge has to stop, because the head is being closed.
    wants_next : bool
        Whether the files of the next head have to be made beforehand.
    """

    def __init__(
        self,
        store: OpenStore,
        row: VolumeRow,
        opened: OpenChain,
        *,
        volume_lock: "VolumeLock",
        finish: "Callable[[OpenHead], None]",
        free_waiting: "Callable[[OpenStore], None]",
        unwritten: "Unwritten | None" = None,
    ) -> None:
        super().__init__(store, row, opened)
        self._unwritten = unwritten
        if unwritten:
            self.head: bytes = unwritten.head.id
            self.wipe: str = unwritten.head.wipe
            self._locks = self.base_lock = None  # those of the view are not this handle's to lend or to give up
        self._volume_lock = volume_lock
        self._finish = finish
        self._free_waiting = free_waiting
        self._merge_end = threading.Condition(self.guard)
        self.is_merging: bool = False
        self.merge_stop: bool = False
        self.wants_next: bool = False
        self._expects_seal = self._wants_map = False
        self._unresolved: Callable[[], None] | None = None
        # The lock byte of each segment that the data path may read. It is kept here after the catalog has forgotten it.
        self._byte_of_segment: dict[bytes, int] = {} if unwritten else opened.chain.byte_of_segment

    # ---- a head that nothing was written to ----

    @property
    def is_unwritten(self) -> bool:
        """Whether it reads through the view of what it stands on, and has no data path and no locks of its own yet."""
        return self._unwritten is not None

    @property
    def read_through(self) -> bytes | None:
        """The sealed layer whose view it is read through, or None if it has a data path of its own."""
        unwritten = self._unwritten  # read once: another thread may write to it meanwhile
        return unwritten.below if unwritten else None

    @property
    def path(self) -> "DataPath":
        """The data path that reads and writes go through. It is the head's own: it is opened if it is not yet."""
        self.begin_writing()
        return self._path

    @property
    def locks(self) -> "ByteLocks":
        """The locks on the files that it can read. They are the head's own: it is opened if it is not yet."""
        self.begin_writing()
        return super().locks

    def begin_writing(self) -> bool:
        """Open a head that nothing was written to, so that it can be written. Returns whether this call did.

        Until then the lock of the volume kept others from the head, and this handle made no change to it. What lies below
        may be other layers by now, which read the same: so the head is opened as any other, by what the catalog says now.
        A write waits here for whoever holds the guard, until the head is open: an operation opens it first, and may then wait
        for this very write, as one does that cuts the disks of a machine, which stops when its writes are answered.
        """
        if self._unwritten is None or self._forked:  # the usual case: it is looked at again under the guard
            return False
        is_held = False
        try:
            while not is_held and self._unwritten is not None:
                with DeferredInterrupt():  # else one might come when the guard is there, and nobody knows
                    is_held = self.guard.acquire(timeout=_LOOK_SECONDS)
            unwritten = self._unwritten
            if unwritten is None:
                return True  # another thread was faster, and the caller goes on with the path that it opened
            if self._closed:
                return False
            self._open_unwritten(unwritten)
        finally:
            if is_held:
                self.guard.release()
        unwritten.after_open(self)
        return True

    def _open_unwritten(self, unwritten: Unwritten) -> None:
        with DeferredInterrupt():
            opened = unwritten.open_head(self)
            # Nobody writes before all are told: a write that was answered has to be seen by whoever reads.
            opened.path.freeze(opened.path.log_state()[1])
            try:
                self._path, self._locks, self.base_lock = opened.path, opened.locks, opened.base_lock
                self._byte_of_segment = opened.chain.byte_of_segment
                self._tell(self._path)
                self._unwritten = None  # a thread that finds it so was told of the new path
            finally:
                opened.path.thaw()
            # Later reads go to the new path, where they find what is written from now on. Those under way in the view
            # are waited for, if nobody else reads it.
            self.store.views.end(unwritten.use)

    @property
    def writable(self) -> bool:
        """Whether this is a head that is open for writing."""
        return True

    @property
    def head_now(self) -> bytes:
        """The head that the catalog has for the volume, for a caller that does not hold the guard."""
        return self.store.catalog.head_of(self.row) or self.head

    def to_write(self) -> "OpenHead":
        """Return this head."""
        return self

    # ---- operations ----

    @held
    def operation(
        self, *, during_merge: bool = False, may_resume: bool = False, within: float | None = None
    ) -> Iterator[None]:
        """Hold the volume for one operation on its tree.

        `during_merge`: the operation may run while a merge into the base copies, and the caller itself checks for an
        interrupted merge. `may_resume`: the operation ends an interrupted merge. `within`: how many seconds another
        operation is waited for; by default until it ends.
        """
        if self._forked:
            raise forking.forked_error(f"volume {self.name!r}")
        with self._guarded(within):
            self._refuse_ended()
            self.begin_writing()
            self._resolve()
            if self.path.poisoned:
                raise StateError(f"volume {self.name!r} is poisoned by a failed sync; close it and open it again")
            if self.is_merging and not during_merge:
                raise StateError(
                    f"a merge into the base of volume {self.name!r} is under way; wait for it to end, or cancel it"
                )
            if not (may_resume or during_merge):
                self.refuse_half_merged()
            yield

    @held
    def _guarded(self, within: float | None) -> Iterator[None]:
        if within is None:
            with self.guard:
                yield
            return
        is_held = False
        try:
            with DeferredInterrupt():  # else one might come when the guard is there, and nobody knows
                is_held = self.guard.acquire(timeout=within)
            if not is_held:
                raise StateError(
                    f"another operation on volume {self.row.name!r} has gone on for {within:.0f} s; try again when it has "
                    "ended"
                )
            yield
        finally:
            if is_held:
                self.guard.release()

    def refuse_half_merged(self) -> None:
        """Raise StateError if a merge into the base was begun and has not ended, and none is under way."""
        if not self.is_merging and unfinished_base_merges(self.store.catalog, self.head):
            raise StateError(
                f"a merge of {self.name!r} into its base was begun and has not ended; merge into the base again"
            )

    def merge_ended(self) -> None:
        """Let other operations, and a `close` that waits, go on. Under `guard`."""
        self.is_merging = False
        self._merge_end.notify_all()

    def if_idle(self, work: Callable[[], None]) -> None:
        """Do work unless an operation is under way or the head is being closed. A later call can do it as well.

        On a head that nothing was written to, it is done when that is opened.
        """
        if not self.guard.acquire(blocking=False):
            return
        try:
            if not (self._closed or self.is_merging or self._unresolved or self._unwritten):
                work()
        finally:
            self.guard.release()

    # ---- how a change of the catalog ended ----

    @contextmanager
    def resolving(self, resolve: Callable[[], None], done: Callable[[], None] | None = None) -> Iterator[None]:
        """Run a change of the catalog, then `resolve`, which asks the catalog how it ended and tells the data path.

        If the change returns and `done` is given, `done` is called instead: there is nothing to ask then.

        The outcome is told whatever was raised. An interrupt may come just after a commit, and a flush waits for ever
        for a seal or a rewrite whose end is not told. If a second interrupt prevents this, the next operation does it.
        The guard is held: another operation would take a change that is under way for one whose end was not told.
        """
        with self.guard, DeferredInterrupt():
            self._unresolved = resolve
            try:
                yield
                if done:
                    done()
                    self._unresolved = None
            except CommitUnknownError:
                self.path.poison()
                raise
            finally:
                self._resolve()

    def resolve_what_is_left(self) -> None:
        """Tell the data path an outcome that it still waits for, because an operation was interrupted twice."""
        if self._unresolved:
            with self.guard:
                self._resolve()

    def _resolve(self) -> None:
        resolve = self._unresolved
        if resolve is None:
            return
        try:
            resolve()
        except Exception:
            self.path.poison()  # the catalog cannot be read
            resolve()
            self._unresolved = None
            raise
        self._unresolved = None

    @contextmanager
    def changing_below(self, happened: Callable[[], bool]) -> Iterator[None]:
        """Replace what lies below the head. In the block, the data path prepares it, and then the catalog changes.

        `happened` says whether the catalog has changed. If memory runs out after the commit, the volume reads the same
        bytes from the old files, and its locks keep them from being freed as long as it is open.
        """

        def resolve() -> None:
            if self.path.poisoned or not happened():
                self.path.abort_below()
            elif self._goes_on_below():
                with suppress(OSError, OnionskinError):  # if this fails, the old files stay locked until the next time
                    self.leave_base()
                    self.give_up_unread()

        with self.resolving(resolve):
            yield

    def _goes_on_below(self) -> bool:
        """Go on with what was prepared and is committed. An interrupt may have come after the data path was told."""
        try:
            return bool(self.path.commit_below())
        except StateError:  # the data path was told already
            return True

    # ---- its files ----

    def share(self, segments: "Mapping[int, bytes]", *others: int) -> None:
        """Lock files that the volume will read, by lock byte, before the commit that names them.

        So nothing that can fail is left to do after the commit. The ids of the segments are kept.
        """
        self.locks.must_share({*segments, *others})
        self._byte_of_segment.update((id, lock_byte) for lock_byte, id in segments.items())

    def give_up_unread(self) -> None:
        """Unlock the files that are not read any more after a change of the tree, once no read of them is under way.

        The data path decides what is read. The catalog may name fewer files (somebody compacted segments of a layer
        that is open here). Then the old files stay locked, and are not freed.
        """
        chain = read_chain(self.store.catalog, self.head)
        self._byte_of_segment |= chain.byte_of_segment
        self.wait_for_readers()
        open_segments = {id for _, id, _, _ in self.path.segments()}
        self._byte_of_segment = {id: byte for id, byte in self._byte_of_segment.items() if id in open_segments}
        self.locks.keep_shared(chain.lock_bytes.union(self._byte_of_segment.values()))

    def leave_base(self) -> None:
        """Release the base if the disk does not stand on one any more."""
        if self.base_lock and read_chain(self.store.catalog, self.head).base is None:
            self.wait_for_readers()
            self.base_lock.close()
            self.base_lock = None

    def segment_bytes(self) -> dict[bytes, int]:
        """Return what `put_segment_bytes` restores if the change that `share` was called for fails."""
        return dict(self._byte_of_segment)

    def put_segment_bytes(self, before: dict[bytes, int]) -> None:
        """Restore the lock bytes of segments as they were before a change."""
        self._byte_of_segment = before

    def switch(
        self, new_path: "DataPath", head: bytes, base_lock: "BaseLock | None", byte_of_segment: Mapping[bytes, int]
    ) -> None:
        """Go on with another head. It is open, its files are locked, and the catalog names it."""
        self._byte_of_segment.update(byte_of_segment)
        self.base_lock = base_lock
        self.wants_next = self._wants_map = False  # for the old head; set before the path, see prepare_if_wanted
        old_path = self._path
        self.head = head  # before the path: who finds the path by the old head is told the slots that this head reads
        self._path = new_path
        if old_path is not new_path:
            self._tell(new_path)
            old_path.close(superseded=True)  # this waits for reads that are under way
        self.give_up_unread()

    def note_seal(self) -> None:
        """Have the files of the next head made beforehand, from the second seal on.

        A process may end after one snapshot. A process that takes a second one will probably take more.
        """
        self.wants_next, self._expects_seal = self._expects_seal, True
        if self.wants_next:
            self.store.wake()

    def expect_seal(self) -> None:
        """Have files made beforehand for the first seal too: somebody begins to write, and writes beside it.

        Those of the next head, else made by the first writes behind the cut, and the map of this one, else made by the
        first flush. Each takes up to a millisecond of a processor, and those of a group come together.
        `OpenStore.finish_work` waits for it.
        """
        self.wants_next = self._expects_seal = self._wants_map = True
        self.store.wake()

    def prepare_if_wanted(self) -> None:
        """Make the files of the next head, so that neither a snapshot nor the first flush after it has to."""
        path, head = self._path, self.head
        # This is checked after the path was read: a revert meanwhile begins a head for which nothing must be made.
        if not self.wants_next or self._closed:
            return
        # There is none while a snapshot is told its outcome; the call is repeated after that.
        for spare in self.store.catalog.spares_of(head):
            self.wants_next = False
            if self._wants_map:
                self._wants_map = False
                with suppress(OSError, OnionskinError):  # a flush makes it too
                    path.make_map()
            path.prepare(map_path=str(self.store.layout.map_file(spare.id)), map_id=spare.id)

    # ---- the end ----

    def close(self) -> None:
        """Flush, and close the volume. Idempotent."""
        if self._forked:
            return
        with self.guard:
            if self._released:
                return
            self.merge_stop = True
            while self.is_merging:
                self._merge_end.wait()
            if self._released:  # by another thread that waited too
                return
            self._closed = True  # a second call goes on here if an interrupt came before the end
            try:
                self._resolve()
                if not (self._unwritten or self._path.poisoned or self._path.closed):
                    self._finish(self)
            finally:
                self._release()
            with suppress(OSError, OnionskinError):  # this frees what waited for its files, which may hold secrets
                self._free_waiting(self.store)

    def abandon(self) -> None:
        """Close the volume without a flush: what was written is not wanted."""
        with self.guard:
            if not self._released:
                self._closed = True
                self._release()

    def _release(self) -> None:
        self.store.forget(self)
        if self._unwritten:
            self._leave_view(self._unwritten)
        else:
            self._path.close()
            if self._locks:
                self._locks.close()
            if self.base_lock:
                self.base_lock.close()
        self._volume_lock.close()
        self._released = True

    def _leave_view(self, unwritten: "Unwritten") -> None:
        """Give back the view that a head which nothing was written to was read through."""
        self._path = closed_path(self._path)  # others may read through the open one
        self._tell(self._path)
        self.store.views.end(unwritten.use)
        self._unwritten = None

    def __del__(self) -> None:
        """Warn if an open volume is dropped with writes that were not flushed: those are lost. End its use of a view."""
        unwritten = getattr(self, "_unwritten", None)
        if unwritten and not self._forked:
            self.store.views.drop(unwritten.use)
        if not getattr(self, "_released", True) and not self._forked and self._path.unflushed:
            warnings.warn(f"unclosed Volume {self.row.name!r}", ResourceWarning, source=self, stacklevel=2)


def if_begun(tell: Callable[[], None]) -> None:
    """Tell the data path how a seal or a rewrite ended. If it was not begun, or was told already, do nothing."""
    try:
        tell()
    except OSError as error:
        if error.errno != EINVAL:
            raise
