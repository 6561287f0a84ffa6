"""A disk that is open: the head of a volume for writing, or a head or a snapshot to be read.

What must hold: a handle holds shared locks on all files that its data path can read, until the last read of them has
ended, or the last array over them is gone. A change of the tree is one transaction, and the data path is told the outcome
afterwards, whatever was raised; where nobody can know the outcome the head takes no more writes. Who goes straight to
the data path is told of a new one before the old one is closed.

Nothing here decides what is done to a disk: what its end needs (a flush, freeing) is handed in.
"""

import logging
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EINVAL
from typing import TYPE_CHECKING, TypeVar

from onionskin.base import forking
from onionskin.base.signals import HeldBack
from onionskin.catalog import CommitUnknownError, VolumeRow
from onionskin.errors import OnionskinError, StateError
from onionskin.storage.chain import pending_base_merges, read_chain
from onionskin.storage.open_store import OpenStore
from onionskin.storage.shared_paths import OpenChain, closed_path

if TYPE_CHECKING:
    from onionskin.kernels._volume import DataPath
    from onionskin.storage.locks import BaseLock, ByteLocks, ReadersLock, VolumeLock

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


class OpenDisk(ABC):
    """What all that is open has: see `OpenHead` and `OpenView`.

    Attributes
    ----------
    store : OpenStore
        The opening of the store that it belongs to.
    row : VolumeRow
        The volume, as it was when it was opened. Its name may be another one by now.
    path : DataPath
        What it reads through.
    head : bytes
        The id of the top layer of what it reads.
    base_lock : BaseLock or None
        The lock on its base, where it has one.
    guard : threading.RLock
        Held by who changes the tree, or ends the handle.
    """

    snapshot_name: str | None = None

    def __init__(self, store: OpenStore, row: VolumeRow, opened: OpenChain) -> None:
        self.store = store
        self.row = row
        self.path: DataPath = opened.path
        self.head: bytes = opened.chain.top.id
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
    def locks(self) -> "ByteLocks":
        """The locks on the files that it can read."""
        if self._locks is None:
            raise StateError(f"{self!r} is closed; open it again")
        return self._locks

    @property
    def pins(self) -> tuple[object, ...]:
        """What an array over its files has to keep."""
        return (self._locks, self.base_lock)

    @property
    def name(self) -> str:
        """The volume's name, as it is now where somebody renamed it meanwhile."""
        if not (self._closed or self._forked):
            found = self.store.catalog.volume_with_id(self.row.id)
            if found:
                return found.name
        return self.row.name

    @property
    def size_bytes(self) -> int:
        """Size of the disk in bytes."""
        return int(self.path.size_bytes)

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
        """Whether this is what a fork left in the child, where nothing of it works."""
        return self._forked

    def __repr__(self) -> str:
        at = f"@{self.snapshot_name}" if self.snapshot_name else ""
        if self._closed or self._forked:
            state = "closed" if self._closed else "lost in a fork"
        else:
            state = "poisoned" if self.path.poisoned else "open" if self.writable else "read-only"
        return f"<Volume {self.store.path}/{self.name}{at} {state}>"

    def follow(self, told: "Callable[[DataPath], None]") -> None:
        """Have a method called with each new data path, before the old one is closed. It is held weakly; must not raise."""
        self._followers.append(weakref.WeakMethod(told))

    def _tell(self, path: "DataPath") -> None:
        for follower in list(self._followers):
            if told := follower():
                told(path)

    def on_path(self, call: "Callable[[DataPath], Result]") -> Result:
        """Run a call; again on the new data path if a revert replaced the old one meanwhile."""
        while True:
            path = self.path
            try:
                return call(path)
            except StateError:
                if path is self.path:
                    raise

    def wait_for_readers(self) -> None:
        """Return when every read that began before has ended."""
        path = self.path
        try:
            path.wait_for_readers()
        except StateError:
            if not path.closed:  # a closed path has no readers
                raise

    def prepare_if_wanted(self) -> None:
        """Make the files of the next head; what is only read has none."""
        return

    def to_write(self) -> "OpenHead":
        """Return the head that is open for writing, or raise StateError where this is none."""
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
        """Give it up. Idempotent. Arrays over its files stay valid."""

    def after_fork(self) -> None:
        """In the child of a fork: raise from now on, release nothing."""
        self._forked = True
        self.guard = threading.RLock()  # another thread of the parent may have held it
        self.path.after_fork()


class OpenView(OpenDisk):
    """A snapshot, or a head that nobody writes, that is open to be read.

    Parameters
    ----------
    store, row, opened
        What it is of, and its files under their locks. Of a snapshot, `opened` was taken from the store's views.
    snapshot : str, optional
        The snapshot's name. None: it is a head.
    read_lock : ReadersLock, optional
        Of a head: keeps writers away.
    free_waiting : callable
        Called with the store when a snapshot's files are given up, to free those that waited for that.
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
        self._read_lock = read_lock
        self._free_waiting = free_waiting

    @property
    def pins(self) -> tuple[object, ...]:
        """What an array over its files has to keep."""
        return (*super().pins, self._read_lock)

    def close(self) -> None:
        """Give it up. Its locks end with the last array over it: they close when nothing refers to them."""
        if self._forked:
            return
        with self.guard:
            if self._released:
                return
            self._closed = True  # and again where an interrupt came before the end
            self.store.forget(self)
            if self.snapshot_name is None:
                self.path.close()
                self._locks = self.base_lock = self._read_lock = None
                self._released = True
            else:
                self._give_back()

    def _give_back(self) -> None:
        self.path = closed_path(self.path)  # other views of the layer may go on with the open one
        self._tell(self.path)
        self.store.views.give_back(self.head)
        self._locks = self.base_lock = None
        self._released = True
        with suppress(OSError, OnionskinError):  # what waited for these files, perhaps with secrets in it
            self._free_waiting(self.store)


class OpenHead(OpenDisk):
    """The head of a volume that is open for writing, with the volume's lock.

    Parameters
    ----------
    store, row, opened
        What it is of, and its files under their locks.
    volume_lock : VolumeLock
        Is given up at the end.
    finish : callable
        Called with this when it is closed, to make durable what was written; not where the data path is poisoned.

    Attributes
    ----------
    is_merging : bool
        Whether a merge into the base copies. Under `guard`.
    merge_stop : bool
        Whether such a merge is to end, since the head is being closed.
    wants_next : bool
        Whether the files of the next head are to be made beforehand.
    """

    def __init__(
        self,
        store: OpenStore,
        row: VolumeRow,
        opened: OpenChain,
        *,
        volume_lock: "VolumeLock",
        finish: "Callable[[OpenHead], None]",
    ) -> None:
        super().__init__(store, row, opened)
        self._volume_lock = volume_lock
        self._finish = finish
        self._merge_end = threading.Condition(self.guard)
        self.is_merging: bool = False
        self.merge_stop: bool = False
        self.wants_next: bool = False
        self._has_sealed = False
        self._unsettled: Callable[[], None] | None = None
        # The lock byte of each segment that the data path may read: known here also when the catalog has forgotten it.
        self._byte_of_segment: dict[bytes, int] = opened.chain.byte_of_segment

    @property
    def writable(self) -> bool:
        """Whether this is a head that is open for writing."""
        return True

    def to_write(self) -> "OpenHead":
        """Return this."""
        return self

    # ---- operations ----

    @contextmanager
    def operation(self, *, during_merge: bool = False, may_resume: bool = False) -> Iterator[None]:
        """Hold the volume for one operation on its tree.

        `during_merge`: also while a merge into the base copies, and the caller looks for one that was interrupted.
        `may_resume`: it ends one that was interrupted.
        """
        if self._forked:
            raise forking.forked_error(f"volume {self.name!r}")
        with self.guard:
            self._refuse_ended()
            self._settle()
            if self.path.poisoned:
                raise StateError(f"volume {self.name!r} is poisoned by a failed sync; close it and open it again")
            if self.is_merging and not during_merge:
                raise StateError(
                    f"a merge into the base of volume {self.name!r} is under way; wait for it to end, or cancel it"
                )
            if not (may_resume or during_merge):
                self.refuse_half_merged()
            yield

    def refuse_half_merged(self) -> None:
        """Raise where a merge into the base was begun and has not ended, and none is under way."""
        if not self.is_merging and pending_base_merges(self.store.catalog, self.head):
            raise StateError(
                f"a merge of {self.name!r} into its base was begun and has not ended; merge into the base again"
            )

    def merge_ended(self) -> None:
        """Let other operations, and a `close` that waits, go on. Under `guard`."""
        self.is_merging = False
        self._merge_end.notify_all()

    def if_idle(self, work: Callable[[], None]) -> None:
        """Do work that a later call may do as well, unless an operation is under way or the head is being closed."""
        if not self.guard.acquire(blocking=False):
            return
        try:
            if not (self._closed or self.is_merging or self._unsettled):
                work()
        finally:
            self.guard.release()

    # ---- how a change of the catalog ended ----

    @contextmanager
    def settling(self, settle: Callable[[], None], done: Callable[[], None] | None = None) -> Iterator[None]:
        """Run a change of the catalog, then `settle`, which asks the catalog how it ended and tells the data path.

        `done` stands for it, where given, when the change returned: then there is nothing to ask.

        Whatever was raised: an interrupt may come just behind a commit, and a flush waits for ever for a seal or a
        rewrite of which nobody tells the end. What a second interrupt prevents is done by the next operation.
        """
        with HeldBack():
            self._unsettled = settle
            try:
                yield
                if done:
                    done()
                    self._unsettled = None
            except CommitUnknownError:
                self.path.poison()
                raise
            finally:
                self._settle()

    def settle_what_is_left(self) -> None:
        """Tell the data path what it waits for: an operation goes on in another thread, or was interrupted twice."""
        if self._unsettled:
            with self.guard:
                self._settle()

    def _settle(self) -> None:
        settle = self._unsettled
        if settle is None:
            return
        try:
            settle()
        except Exception:
            self.path.poison()  # the catalog cannot be read
            settle()
            self._unsettled = None
            raise
        self._unsettled = None

    @contextmanager
    def changing_below(self, happened: Callable[[], bool]) -> Iterator[None]:
        """Replace what lies below the head: in the block the data path prepares it, and then the catalog changes.

        `happened` says whether the catalog has changed. Where memory is missing behind the commit, the volume reads the
        same bytes from the old files, which its locks keep from being freed as long as it is open.
        """

        def settle() -> None:
            if self.path.poisoned or not happened():
                self.path.abort_below()
            elif self._goes_on_below():
                with suppress(OSError, OnionskinError):  # else the old files stay locked until this is next done
                    self.leave_base()
                    self.give_up_unread()

        with self.settling(settle):
            yield

    def _goes_on_below(self) -> bool:
        """Go on with what was prepared, whose commit is done; also where an interrupt came when that was told already."""
        try:
            return bool(self.path.commit_below())
        except StateError:  # nothing is prepared any more
            return True

    # ---- its files ----

    def share(self, segments: "Mapping[int, bytes]", *others: int) -> None:
        """Lock files that the volume will read, by lock byte, before the commit that names them; ids of segments are kept.

        So nothing that can fail is left to do behind the commit.
        """
        self.locks.must_share({*segments, *others})
        self._byte_of_segment.update((id, lock_byte) for lock_byte, id in segments.items())

    def give_up_unread(self) -> None:
        """After a change of the tree: give up the files that are not read any more, once no read is under way in them.

        What is read is what the data path has open. The catalog may say less (somebody gathered segments of a layer that
        is open here), and then the old files stay locked, and so stay.
        """
        chain = read_chain(self.store.catalog, self.head)
        self._byte_of_segment |= chain.byte_of_segment
        self.wait_for_readers()
        open_segments = {id for _, id, _, _ in self.path.segments()}
        self._byte_of_segment = {id: byte for id, byte in self._byte_of_segment.items() if id in open_segments}
        self.locks.keep_shared(chain.lock_bytes.union(self._byte_of_segment.values()))

    def leave_base(self) -> None:
        """Give up the base, where the disk stands on none any more."""
        if self.base_lock and read_chain(self.store.catalog, self.head).base is None:
            self.wait_for_readers()
            self.base_lock.close()
            self.base_lock = None

    def segment_bytes(self) -> dict[bytes, int]:
        """Return what `put_segment_bytes` brings back, where the change that `share` was called for came to nothing."""
        return dict(self._byte_of_segment)

    def put_segment_bytes(self, before: dict[bytes, int]) -> None:
        """Know the lock bytes of segments as before a change."""
        self._byte_of_segment = before

    def switch(
        self, new_path: "DataPath", head: bytes, base_lock: "BaseLock | None", byte_of_segment: Mapping[bytes, int]
    ) -> None:
        """Go on with another head, which is open: what it reads is locked, and the catalog has it."""
        self._byte_of_segment.update(byte_of_segment)
        self.base_lock = base_lock
        self.wants_next = False  # it was for the head that is left; before the path, see prepare_if_wanted
        old_path, self.path, self.head = self.path, new_path, head
        if old_path is not new_path:
            self._tell(new_path)
            old_path.close()  # waits for those who read
        self.give_up_unread()

    def note_seal(self) -> None:
        """Have the files of the next head made beforehand, from the second seal on.

        A first one may be all that this process is for; who takes a second will take more.
        """
        self.wants_next, self._has_sealed = self._has_sealed, True
        if self.wants_next:
            self.store.wake()

    def prepare_if_wanted(self) -> None:
        """Make the files of the next head, so that a snapshot and the first flush after it need not."""
        path, head = self.path, self.head
        # Asked after the path was taken: a revert meanwhile wants nothing made for the head that it begins.
        if not self.wants_next or self._closed:
            return
        # None where a snapshot is just being told what it is: then somebody asks again.
        for spare in self.store.catalog.spares_of(head):
            self.wants_next = False
            path.prepare(map_path=str(self.store.layout.map_file(spare.id)), map_id=spare.id)

    # ---- the end ----

    def close(self) -> None:
        """Flush, and give the volume up. Idempotent."""
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
            self._closed = True  # and again where an interrupt came before the end
            try:
                self._settle()
                if not (self.path.poisoned or self.path.closed):
                    self._finish(self)
            finally:
                self._release()

    def abandon(self) -> None:
        """Give the volume up without a flush: what was written is not wanted."""
        with self.guard:
            if not self._released:
                self._closed = True
                self._release()

    def _release(self) -> None:
        self.store.forget(self)
        self.path.close()
        self.locks.close()
        if self.base_lock:
            self.base_lock.close()
        self._volume_lock.close()
        self._released = True

    def __del__(self) -> None:
        """Warn of an open volume that is lost with writes that were not flushed, which are lost too."""
        if not getattr(self, "_released", True) and not self._forked and self.path.unflushed:
            warnings.warn(f"unclosed Volume {self.row.name!r}", ResourceWarning, source=self, stacklevel=2)


def if_begun(tell: Callable[[], None]) -> None:
    """Tell the data path how a seal or a rewrite ended; one that was not begun, or was told already, needs nothing."""
    try:
        tell()
    except OSError as error:
        if error.errno != EINVAL:
            raise
