"""A volume that is open for writing, or a read-only view of a snapshot.

What must hold: reading and writing go straight to the data path; what changes the tree is one catalog transaction, and
the data path is told the outcome afterwards. A new data path is opened in full before the transaction that makes it
the right one, so a failure at any step leaves the old one working.
"""

import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from onionskin.base import forking
from onionskin.base.naming import check_name, check_note, some_of
from onionskin.base.progress import Progress
from onionskin.base.signals import HeldBack
from onionskin.catalog import (
    CommitUnknownError,
    LayerRow,
    SegmentRow,
    SnapshotRow,
    VolumeRow,
    new_id,
)
from onionskin.catalog.tree import (
    Snapshot,
    descendants,
    describe_snapshot,
    find_snapshot,
    free_unneeded,
    list_snapshots,
    nearest_snapshot,
    unnamed_around,
    users_of,
)
from onionskin.errors import OnionskinError, SnapshotNotFoundError, StateError
from onionskin.operations import copy, export, holds, merge_into_base, reclaim, snapshot_names
from onionskin.operations import usage as usages
from onionskin.storage.block_maps import map_is_used
from onionskin.storage.chain import (
    Chain,
    NewHead,
    lock_base,
    lock_chain,
    open_chain,
    pending_base_merges,
    read_chain,
    replace_spare,
)
from onionskin.storage.disk_file import DiskFile
from onionskin.storage.open_store import OpenStore
from onionskin.storage.shared_paths import OpenChain, closed_path

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    import onionskin
    from onionskin.base.annotations import AnyPath, Bytes, Extents, ReadableBuffer, WritableBuffer
    from onionskin.kernels._volume import DataPath
    from onionskin.operations.layering import Layering
    from onionskin.operations.usage import Usage
    from onionskin.storage.locks import BaseLock, ByteLocks, ReadersLock, VolumeLock

    Array = numpy.typing.NDArray[Any]

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Sealing:
    """What is new after a seal: the head, its spare, and the lock bytes of the head's map and of the spare."""

    head: bytes
    spare: bytes
    map_byte: int
    spare_byte: int


class Volume:
    """One open volume. Made by `Store.create` and `Store.open`; a context manager that flushes and closes.

    Offsets and lengths are bytes; block indices count blocks of `block_size`. Reading and writing may be done from any
    number of threads; operations on snapshots are one after the other. Nothing written is durable before `flush`,
    `snapshot`, `resize` or `close`.

    Attributes
    ----------
    block_size : int
        The unit of copy-on-write, in bytes.
    wipe : {"release", "zero"}
        What happens to freed space.
    """

    def __init__(
        self,
        store: OpenStore,
        row: VolumeRow,
        opened: OpenChain,
        *,
        volume_lock: "VolumeLock | None" = None,
        read_lock: "ReadersLock | None" = None,
        snapshot: str | None = None,
        opened_by: Any = None,
    ) -> None:
        self.opened_store = store
        self._opened_by = opened_by
        self.row = row
        self.path: DataPath = opened.path
        self._locks: ByteLocks | None = opened.locks
        self.snapshot_name = snapshot
        self.base_lock: BaseLock | None = opened.base_lock
        self.head: bytes = opened.chain.top.id
        self.block_size: int = opened.chain.top.block_size
        self.wipe: str = opened.chain.top.wipe
        self._volume_lock = volume_lock
        self._read_lock = read_lock  # of a head that is open for reading only
        self.guard: threading.RLock = threading.RLock()
        self._merge_end = threading.Condition(self.guard)
        self.is_merging: bool = False  # a merge into the base copies: under `guard`
        self.merge_stop: bool = False
        # Called with the new data path before the old one is closed. Must not raise.
        self.on_switch: Callable[[DataPath], None] | None = None
        self._closed = False
        self._forked = False
        self._released = False
        self._unsettled: Callable[[], None] | None = None
        self._has_sealed = self._prepare_wanted = False
        # The lock byte of each segment that the data path may read: known here also when the catalog has forgotten it.
        self._byte_of_segment: dict[bytes, int] = opened.chain.byte_of_segment
        forking.register(self)

    # ---- what it is ----

    @property
    def store(self) -> "onionskin.Store":
        """The store that it was opened in."""
        return cast("onionskin.Store", self._opened_by)

    @property
    def locks(self) -> "ByteLocks":
        """The locks on the files that the volume can read."""
        if self._locks is None:
            raise StateError(f"{self!r} is closed; open it again")
        return self._locks

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
        chain = read_chain(self.opened_store.catalog, self.head)
        self._byte_of_segment |= chain.byte_of_segment
        self.wait_for_readers()
        open_segments = {id for _, id, _, _ in self.path.segments()}
        self._byte_of_segment = {id: byte for id, byte in self._byte_of_segment.items() if id in open_segments}
        self.locks.keep_shared(chain.lock_bytes.union(self._byte_of_segment.values()))

    def leave_base(self) -> None:
        """Give up the base, where the disk stands on none any more."""
        if self.base_lock and read_chain(self.opened_store.catalog, self.head).base is None:
            self.wait_for_readers()
            self.base_lock.close()
            self.base_lock = None

    @property
    def name(self) -> str:
        """The volume's name, as it is now where somebody renamed it meanwhile."""
        if not (self._closed or self._forked):
            found = self.opened_store.catalog.row(VolumeRow, "id = ?", self.row.id)
            if found:
                return found.name
        return self.row.name

    @property
    def size_bytes(self) -> int:
        """Size of the disk in bytes."""
        return int(self.path.size_bytes)

    @property
    def writable(self) -> bool:
        """Whether this is the head, and not a view of a snapshot."""
        return self._volume_lock is not None

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
        return f"<Volume {self.opened_store.path}/{self.name}{at} {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Volume cannot be pickled, since one process has its lock; pickle its store and its name, and open it there"
        )

    def __getitem__(self, index: slice) -> bytes:
        """Return the bytes of a slice, which is cut at the end of the disk as Python does; its step is 1.

        A number is refused: for a disk it could mean a byte as well as a block, and Python would read a disk byte by
        byte where somebody loops over it by mistake.
        """
        if not isinstance(index, slice):
            raise TypeError("a disk is read by slices, such as volume[512:1024]; volume.read_blocks takes blocks")
        start, stop, step = index.indices(self.size_bytes)
        if step != 1:
            raise ValueError(f"the bytes of a disk are read one after the other, not every {step}; slice what was read")
        return self.read(start, max(stop - start, 0))

    def __enter__(self) -> "Volume":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- bytes ----

    def _on_path(self, call: "Callable[[DataPath], Result]") -> Result:
        """Run a call; again on the new data path if a revert replaced the old one meanwhile."""
        while True:
            path = self.path
            try:
                return call(path)
            except StateError:
                if path is self.path:
                    raise

    def _again(self, failed: "DataPath", call: "Callable[[DataPath], Result]") -> Result:
        """While a call's StateError is handled: run it on the data path that a revert put in place, or raise on.

        `read`, `readinto` and `write` come here only then: a closure for each call costs them a quarter of their time.
        """
        if failed is self.path:
            raise
        return self._on_path(call)

    def read(self, offset: int, length: int) -> bytes:
        """Return a range as bytes.

        Any thread may call it, beside writers too.

        Parameters
        ----------
        offset, length : int
            Bytes; they need no alignment. The range ends before `offset + length`, which is at most the size.

        Returns
        -------
        bytes
            Exactly `length` of them.

        Raises
        ------
        ValueError
            The range passes the end of the volume.
        OSError
            EIO where a file under the volume fails or was truncated.
        """
        path = self.path
        try:
            return path.read(offset, length)
        except StateError:
            return self._again(path, lambda new: new.read(offset, length))

    def readinto(self, offset: int, buffer: "WritableBuffer") -> int:
        """Fill a writable buffer with what the disk reads. Threads, alignment and errors are as for `read`.

        Parameters
        ----------
        offset : int
            Of the first byte.
        buffer : buffer
            Writable and contiguous; all of it is filled.

        Returns
        -------
        int
            The bytes that were read: the length of the buffer.

        Raises
        ------
        ValueError
            The range passes the end of the volume.
        TypeError, BufferError
            It is no buffer, it cannot be written to, or it is not contiguous.
        OSError
            EIO where a file under the volume fails or was truncated.
        """
        path = self.path
        try:
            return path.readinto(offset, buffer)
        except StateError:
            return self._again(path, lambda new: new.readinto(offset, buffer))

    def write(self, offset: int, data: "ReadableBuffer") -> int:
        """Write a buffer. It is durable after the next `flush`; the death of the process alone loses none of it.

        Any number of threads may write.

        Parameters
        ----------
        offset : int
            Of the first byte; no alignment is needed, but a write of whole blocks reads nothing.
        data : buffer
            Contiguous. It must not change before the call returns.

        Returns
        -------
        int
            The bytes that were written: the length of the buffer.

        Raises
        ------
        ValueError
            The range passes the end of the volume.
        OSError
            ENOSPC where the disk is full: the bytes before the failed block may be written, nothing else changed.
        StateError
            A view, closed, or poisoned by a failed sync.
        """
        path = self.path
        try:
            return path.write(offset, data)
        except StateError:
            return self._again(path, lambda new: new.write(offset, data))

    def read_blocks(self, block_indices: "Sequence[int] | Array", out: "Bytes | None" = None) -> "Bytes":
        """Return many blocks by index, in one call. Threads are as for `read`.

        Parameters
        ----------
        block_indices : sequence of int, or array of int
            n indices in any order; one may come more than once.
        out : array of uint8, optional
            What to fill, of shape (n, block_size); contiguous. By default a new one.

        Returns
        -------
        array of uint8
            Of shape (n, block_size): the blocks in the order of the indices; `out` where that was given. A last block
            that the disk cuts ends in zeros.

        Raises
        ------
        ValueError
            An index is not a block of the volume, or `out` has another shape.
        OSError
            EIO where a file under the volume fails or was truncated.
        """
        return self._on_path(lambda path: path.read_blocks(block_indices, out))

    def write_blocks(self, block_indices: "Sequence[int] | Array", data: "ReadableBuffer") -> None:
        """Write many whole blocks, in one call. Threads and durability are as for `write`.

        Parameters
        ----------
        block_indices : sequence of int, or array of int
            n indices in any order. Of one that is given twice the last one counts.
        data : buffer
            n * block_size bytes, contiguous.

        Raises
        ------
        ValueError
            An index is not a block of the volume, or the buffer has another length.
        OSError, StateError
            As for `write`.
        """
        self._on_path(lambda path: path.write_blocks(block_indices, data))

    def zero(self, offset: int, length: int) -> None:
        """Make a range read zero, without writing zeros where whole blocks can be forgotten.

        Durable after the next `flush`. Any thread may call it.

        Parameters
        ----------
        offset, length : int
            Bytes; they need no alignment.

        Raises
        ------
        ValueError
            The range passes the end of the volume.
        OSError, StateError
            As for `write`.
        """
        self.opened_store.reserve.retry(lambda: self._on_path(lambda path: path.zero(offset, length)))

    def trim(self, offset: int, length: int) -> None:
        """Say that a range is not needed: it reads zero from now on, and its slots are freed at the next flush.

        Durable after that flush; with policy `zero` what was freed is overwritten by it. Any thread may call it.

        Parameters
        ----------
        offset, length : int
            Bytes; they need no alignment.

        Raises
        ------
        ValueError
            The range passes the end of the volume.
        OSError, StateError
            As for `write`.
        """
        self.opened_store.reserve.retry(lambda: self._on_path(lambda path: path.trim(offset, length)))

    def view(self, offset: int, length: int) -> "Bytes":
        """Return a range of a snapshot as a read-only array of uint8 over the segments' own pages.

        The array keeps its files pinned, also past `close`: a head that it shows cannot be opened for writing before it is
        gone. An access to it is outside the SIGBUS guard: a file that somebody
        cuts short under it, or a medium that fails, ends the process.

        Parameters
        ----------
        offset, length : int
            Bytes; they need no alignment.

        Returns
        -------
        array of uint8
            `length` bytes, read-only. Nothing is copied, but where the range lies in more than 4,096 pieces.

        Raises
        ------
        StateError
            The volume is open for writing.
        ValueError
            The range passes the end of the volume.
        """
        return self._on_path(lambda path: path.view(offset, length, (self._locks, self.base_lock, self._read_lock)))

    def flush(self) -> None:
        """Make everything that was written before the call durable.

        Raises
        ------
        OSError
            ENOSPC: nothing changed, it can be tried again. Any other failure of a sync poisons the volume.
        """
        if self._unsettled:  # by an operation that goes on in another thread, or by two interrupts
            with self.guard:
                self._settle()
        self.opened_store.reserve.retry(lambda: self._on_path(lambda path: path.flush()))
        self.scrub_freed()
        self.compact_if_wanted()

    def scrub_freed(self) -> None:
        """Free on the medium what durable frames freed in adopted segments: after flushes that did not go through here."""
        path = self.path
        self.opened_store.note_unreachable(path.take_unreachable())
        wanted = path.scrub_wanted()
        if not wanted:
            return
        try:
            reclaim.scrub(self.opened_store, wanted, self.wipe)
        except BaseException:
            path.want_scrub(wanted)  # a wish is over when it is recorded
            raise

    def compact_if_wanted(self) -> None:
        """Write the head's map log anew where most of it is dead: after flushes, also those that did not go through here."""
        if not self.writable or not self.path.wants_compaction():
            return
        if not self.guard.acquire(blocking=False):  # an operation is under way: a later flush asks again
            return
        try:
            if not (self._closed or self.is_merging or self._unsettled):
                merge_into_base.compact(self)
        except (OSError, OnionskinError) as error:
            if self.path.poisoned:
                raise
            _log.warning("%r: its map could not be written anew, and goes on as it is: %s", self, error)
        finally:
            self.guard.release()

    def resize(self, size: "int | str", *, force: bool = False) -> None:
        """Grow or, with `force`, shrink the disk. Durable on return; what is new reads zero.

        Other threads may read and write meanwhile.

        Parameters
        ----------
        size : int or str
            Bytes, or such as "20G": 1 byte to 64 TiB.
        force : bool
            Shrink, and drop what is behind the new end. Snapshots keep it.

        Raises
        ------
        StateError
            It would shrink and `force` is not given; or a view, or closed.
        ValueError
            It is no size that a volume can have.
        OSError
            ENOSPC: the size is as it was.
        """
        from onionskin.base.sizes import parse_size

        size_bytes = parse_size(size)
        if size_bytes < 1:
            raise ValueError("a volume has at least one byte; delete it if it is not needed")
        with self.operation():
            if size_bytes < self.size_bytes and not force:
                raise StateError(
                    f"resize would cut {self.name!r} from {self.size_bytes} to {size_bytes} bytes and lose what lies "
                    "behind; pass force if that is meant"
                )
            self.path.resize(size_bytes)
            self._note_size()

    def _note_size(self) -> None:
        """Write the size to the catalog, which shows it without opening the disk; what counts is the one in the map."""
        try:
            self.opened_store.change(
                lambda: self.opened_store.catalog.update(LayerRow, self.head, size_bytes=self.size_bytes)
            )
        except OSError as error:
            _log.warning("%r: its new size is not listed before it is next closed: %s", self, error)

    def open_file(self) -> io.RawIOBase:
        """Return the disk as a raw, unbuffered, seekable binary file, whose `flush` and `close` make durable.

        `io.BufferedRandom` over it makes small reads and writes cheap. It has no descriptor, and never changes the size.

        Returns
        -------
        io.RawIOBase
            Writable where the volume is. It works as long as the volume is open, and its `close` leaves that open.
        """
        return DiskFile(self)

    def extents(self) -> "Extents":
        """Return what is not the base's (or a hole). Any thread may call it.

        Returns
        -------
        array
            Extents (offset, length, state) in bytes, sorted, apart from each other; state 1 DATA, 2 ZERO.
        """
        return copy.extents(self)

    # ---- snapshots ----

    @property
    def parent(self) -> Snapshot | None:
        """The snapshot of this volume that the disk stands on, the last one on its branch or the one reverted to."""
        catalog = self.opened_store.catalog
        with catalog.reading():
            row = nearest_snapshot(catalog, self.row, catalog.layer(self.head).parent)
            return describe_snapshot(catalog, self.row, row, catalog.layer(row.layer)) if row else None

    @property
    def head_changed(self) -> bool:
        """Whether anything was written, trimmed or resized since `parent`. Flushes, to know."""
        self.flush()
        named = {row.layer for row in self.opened_store.catalog.rows(SnapshotRow, "volume = ?", self.row.id)}
        chain = read_chain(self.opened_store.catalog, self.head).layers
        above = list(takewhile(lambda layer: layer.id not in named, reversed(chain)))
        below = chain[-len(above) - 1] if len(above) < len(chain) else None
        if below and below.size_bytes != self.size_bytes:
            return True
        return any(map_is_used(self.opened_store, layer) for layer in above)

    @property
    def snapshots(self) -> list[Snapshot]:
        """The volume's snapshots, oldest first."""
        return list_snapshots(self.opened_store.catalog, self.row)

    def snapshot(self, name: str | None = None, note: str = "", *, guid: str | None = None) -> Snapshot:
        """Name the disk as it is now. Everything written before the call is in it, and durable on return.

        Other threads may read and write meanwhile; what they write while it runs may be in it or not.

        Parameters
        ----------
        name : str, optional
            At most 255 bytes, without '/', '@' and control characters. By default the time in UTC, as
            ``20261126T071101.123Z``: such names sort as they were taken, and of several in one millisecond each later one
            has the next that is free.
        note : str
            Kept with it; at most 64 KiB.
        guid : str, optional
            32 hex digits; drawn where not given. `apply` keeps the one of the other store.

        Returns
        -------
        Snapshot
            What was taken.

        Raises
        ------
        SnapshotExistsError
            The name is taken.
        OSError
            ENOSPC: no snapshot was taken, the volume goes on.
        """
        name = None if name is None else check_name("snapshot", name)
        note = check_note(note)
        guid_bytes = _guid_bytes(guid) if guid is not None else new_id()
        with self.operation(during_merge=True):
            catalog = self.opened_store.catalog
            taken: list[Snapshot] = []

            def check_free() -> None:
                self._refuse_half_merged()
                if name is not None:
                    snapshot_names.refuse_taken(catalog, self.row.id, self.name, name)

            def name_it(sealed: LayerRow, head: LayerRow) -> None:
                # The head's lock byte is a number that no snapshot has yet. One of its own would lie between the bytes of
                # the chain, which are locked in stretches: for the kernel each stretch costs the more the more there are.
                number = head.map_lock_byte
                called = name or snapshot_names.name_of_time(catalog, self.row.id, head.created_ns)
                row = SnapshotRow(self.row.id, called, sealed.id, guid_bytes, head.created_ns, note, number)
                taken.append(describe_snapshot(catalog, self.row, row, sealed))
                catalog.insert(row)

            self.seal(check_free, name_it)
            return taken[0]

    def seal(self, check: Callable[[], None], also: Callable[[LayerRow, LayerRow], None]) -> LayerRow:
        """Seal the head and go on in a new one. Returns the sealed layer.

        `also` runs in the same transaction, with the rows of the sealed layer and of the new head.
        `check` is asked before anything happens, and again inside the transaction. No data is synced inside that: a slow
        disk under this volume holds no other one up.
        """
        catalog = self.opened_store.catalog
        check()
        self._need_spare()
        spare = self._spare()
        new: list[Sealing] = []
        unused: set[int] = set()
        scrubs: list[bytes] = []
        rows: list[LayerRow] = []

        def write_rows() -> None:
            for found in (new, unused, rows):
                found.clear()
            check()
            # The size as the map has it: a crash behind a resize may have left the row with the old one.
            old = replace(catalog.layer(self.head), size_bytes=sealed.size_bytes)
            # Its id is the spare's: so the catalog names the file before there is such a layer, if it is made beforehand.
            head = NewHead.on(
                old, base=None, block_size=self.block_size, wipe=self.wipe, size_bytes=old.size_bytes, map_id=spare.id
            )
            new.append(Sealing(head.layer.id, new_id(), *catalog.take_lock_bytes(2)))
            layer = replace(head.layer, map_lock_byte=new[0].map_byte)
            self._write_new_head(layer, spare, new[0])
            reclaim.add_scrubs(self.opened_store, scrubs, self.wipe)
            row, freed = self._write_sealed(old, sealed)
            also(row, layer)
            rows.append(row)
            unused.update(freed)
            self.share({new[0].spare_byte: new[0].spare}, new[0].map_byte)

        try:
            with self.settling(lambda: self._settle_seal(new), lambda: self._go_on(new[0])):
                sealed = self.path.seal(map_path=str(self.opened_store.layout.map_file(spare.id)), map_id=spare.id)
                # Slots that the last flush of this head freed in segments it had adopted: the new head never asks.
                scrubs += self.path.scrub_wanted()
                self.opened_store.change(write_rows)
        except BaseException:
            if scrubs and not self.path.closed:
                self.path.want_scrub(scrubs)
            raise
        self.locks.drop_shared(unused)
        if scrubs or unused:
            reclaim.work_soon(self.opened_store)
        # A first one may be all that this process is for; who takes a second will take more.
        self._prepare_wanted, self._has_sealed = self._has_sealed, True
        if self._prepare_wanted:
            self.opened_store.wake()
        return rows[0]

    def _settle_seal(self, begun: "list[Sealing]") -> None:
        """Go on with the new head if the catalog has it, with the old one if not."""
        head = begun[0].head if begun else None
        if head is None or self.path.poisoned or self.opened_store.catalog.head_of(self.row) != head:
            merge_into_base.if_begun(self.path.seal_abort)
        else:
            self._go_on(begun[0])

    def _go_on(self, new: "Sealing") -> None:
        self.head = new.head
        merge_into_base.if_begun(lambda: self.path.seal_commit(new.spare))

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

    def _write_new_head(self, layer: LayerRow, spare: SegmentRow, new: "Sealing") -> None:
        """Write the new head, which begins with the old one's spare, and make it the volume's."""
        catalog = self.opened_store.catalog
        catalog.insert(layer)
        catalog.update(SegmentRow, spare.id, role="own", layer=layer.id)
        catalog.insert(SegmentRow(new.spare, layer.id, "spare", 0, new.spare_byte))
        self.opened_store.catalog.update(VolumeRow, self.row.id, head=layer.id)

    def _write_sealed(self, old: LayerRow, sealed: Any) -> tuple[LayerRow, set[int]]:
        """Write how the files of the old head are now. Returns its row, and the lock bytes of files made for nothing."""
        catalog = self.opened_store.catalog
        what = {
            "sealed": 1,
            "size_bytes": sealed.size_bytes,
            "map_length": sealed.map_length,
            "map_frames": sealed.map_frames,
            "map_crc": sealed.map_crc,
        }
        catalog.update(LayerRow, old.id, **what)
        freed: set[int] = set()
        for id, slots in sealed.segments:
            if slots:
                catalog.update(SegmentRow, id, role="sealed", slots=slots)
            else:
                freed |= self._drop_empty_segment(id, old.wipe)
        return replace(old, **what), freed

    def _drop_empty_segment(self, id: bytes, wipe: str) -> set[int]:
        """Remove the row of a segment without slots. If it has a file, that becomes pending work of the byte returned."""
        catalog, freed = self.opened_store.catalog, set()
        for row in catalog.rows(SegmentRow, "id = ?", id):
            if self.opened_store.layout.segment_file(id).exists():
                catalog.add_pending("segment", id, row.lock_byte, wipe)
                freed.add(row.lock_byte)
            catalog.delete(SegmentRow, "id = ?", id)
        return freed

    def _spare(self) -> SegmentRow:
        """The segment that the next head begins with. Its id is the id of that head's map too."""
        return self.opened_store.catalog.spare_of(self.head)

    def prepare_if_wanted(self) -> None:
        """Make the files of the next head, so that a snapshot and the first flush after it need not."""
        path, head = self.path, self.head
        # Asked after the path was taken: a revert meanwhile wants nothing made for the head that it begins.
        if not self._prepare_wanted or self._closed:
            return
        # None where a snapshot is just being told what it is: then somebody asks again.
        for spare in self.opened_store.catalog.rows(SegmentRow, "layer = ? AND role = 'spare'", head):
            self._prepare_wanted = False
            path.prepare(map_path=str(self.opened_store.layout.map_file(spare.id)), map_id=spare.id)

    def _need_spare(self) -> None:
        """Register a spare segment where an aborted snapshot used it up."""
        if self.path.has_spare:
            return
        spares: list[SegmentRow] = []

        def register() -> None:
            spares[:] = [replace_spare(self.opened_store.catalog, self.head)]
            self.share({spares[0].lock_byte: spares[0].id})

        self.opened_store.change(register)
        self.path.set_spare(spares[0].id)

    def revert(self, name: str) -> None:
        """Make the disk read as a snapshot again. What was written since the last snapshot is dropped.

        The snapshot stays, and so do newer ones. Durable on return. Other threads' calls go on, on the old disk or on
        the new one.

        Parameters
        ----------
        name : str
            A snapshot of this volume, on whatever branch.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        OSError
            ENOSPC: the disk reads as before.
        """
        with self.operation():
            catalog = self.opened_store.catalog
            target = find_snapshot(catalog, self.row, name).layer
            around = unnamed_around(catalog, catalog.layer(self.head).parent)
            self.restart_on(target, lambda: None)
            merge_into_base.free_hidden(self, around)

    def restart_on(self, layer_id: bytes, also: Callable[[], None]) -> None:
        """Replace the head by an empty child of a layer; `also` runs in the transaction, before layers are freed."""
        catalog = self.opened_store.catalog
        below = lock_chain(catalog, layer_id, self.locks)
        base_lock = self.base_lock
        if below.base and not base_lock:  # the head was flattened, and the snapshot is older than that
            base_lock = lock_base(catalog, below)
        try:
            self.restart_over(below, base_lock, also=also)
        except BaseException:
            if base_lock is not self.base_lock and base_lock:
                base_lock.close()
            raise

    def restart_over(self, below: Chain, base_lock: "BaseLock | None", *, also: Callable[[], None]) -> None:
        """Replace the head by an empty child of the top of a chain whose files are locked.

        `also` runs in the transaction, before layers are freed.
        """
        catalog, top = self.opened_store.catalog, below.top
        head = NewHead.on(top, base=None, block_size=top.block_size, wipe=self.wipe, size_bytes=top.size_bytes)
        layout = self.opened_store.layout
        dirty = layout.dirty_file(self.row.id)
        new_path = open_chain(layout, head.chain(below), writable=True, base_lock=base_lock, dirty=dirty)
        old_path, old_head, bytes_before = self.path, self.head, dict(self._byte_of_segment)

        def change() -> None:
            if catalog.head_of(self.row) != old_head or not catalog.has(LayerRow, "id = ?", top.id):
                raise StateError("another process changed the tree; close the volume and open it again")
            map_byte, segments = head.insert(catalog)
            self.share(segments, map_byte)
            self.opened_store.catalog.update(VolumeRow, self.row.id, head=head.layer.id)
            also()
            free_unneeded(catalog, old_head)

        def settle() -> None:
            if old_path.poisoned or catalog.head_of(self.row) != head.layer.id:
                new_path.close()
                self._byte_of_segment = bytes_before
            else:
                self._byte_of_segment |= below.byte_of_segment
                self.base_lock = base_lock
                self._switch(new_path, head.layer.id)

        with self.settling(settle):
            self.opened_store.change(change)
        reclaim.work_soon(self.opened_store)

    def _switch(self, new_path: "DataPath", head: bytes) -> None:
        self._prepare_wanted = False  # it was for the head that is left; before the path, see prepare_if_wanted
        old_path, self.path, self.head = self.path, new_path, head
        if old_path is not new_path:
            if self.on_switch:
                self.on_switch(new_path)
            old_path.close()  # waits for those who read
        self.give_up_unread()

    def discard(self, name: str, *, recursive: bool = False) -> None:
        """Drop a snapshot's name and all that was written after it on its branch.

        If the head descends from it, the disk reads as when the snapshot was taken. Durable on return. This is not TRIM, and
        not what others call deleting a snapshot: that is `merge`.

        Parameters
        ----------
        name : str
            A snapshot of this volume.
        recursive : bool
            Drop the snapshots that were taken after it too.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        StateError
            A descendant has a name and `recursive` is not given, a clone needs one, or somebody holds one; some are listed.
        """
        with self.operation():
            catalog = self.opened_store.catalog
            layer = find_snapshot(catalog, self.row, name).layer
            parent = catalog.layer(layer).parent
            around = unnamed_around(catalog, layer)

            def drop() -> None:
                # Asked where nobody can change the answer: others may clone a snapshot at any time.
                above = descendants(catalog, layer)
                self._refuse_discard(name, above, recursive)
                named = [*above, layer]
                holds.refuse_held(catalog, named)
                for id in named:
                    catalog.delete(SnapshotRow, "layer = ?", id)
                for id in named:
                    free_unneeded(catalog, id)

            above = descendants(catalog, layer)
            self._refuse_discard(name, above, recursive)
            if self.head in above:
                self.restart_on(layer, drop)
            else:
                self.opened_store.change(drop)
                reclaim.work_soon(self.opened_store)
            merge_into_base.fold_where_unnamed(self, [layer, parent])
            merge_into_base.free_hidden(self, around)

    def _refuse_discard(self, name: str, above: set[bytes], recursive: bool) -> None:
        catalog = self.opened_store.catalog
        users = users_of(catalog, above, besides=self.row.id)
        if users:
            raise StateError(
                f"snapshot {name!r} is needed by {some_of(users)}; delete or flatten those volumes first, or merge the "
                "snapshot instead"
            )
        named = sorted(row.name for row in catalog.rows(SnapshotRow, "volume = ?", self.row.id) if row.layer in above)
        if named and not recursive:
            raise StateError(
                f"snapshots were taken after {name!r}: {some_of(named)}; pass recursive to discard them too, or merge "
                f"{name!r} to keep what was written"
            )

    def merge(self, name: str) -> None:
        """Drop a snapshot's name and keep all data: what was written after it joins what was written before it.

        No block is copied: segments change their owner. Reads and other snapshots are unchanged. A layer with several
        children stays, without a name, until one is left. Durable on return. VMware, libvirt, ZFS and RBD call this
        deleting a snapshot.

        Parameters
        ----------
        name : str
            A snapshot of this volume.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        """
        with self.operation():
            catalog = self.opened_store.catalog
            row = find_snapshot(catalog, self.row, name)
            around = unnamed_around(catalog, row.layer)

            def drop() -> None:
                holds.refuse_held(catalog, [row.layer])
                catalog.delete(SnapshotRow, "volume = ? AND name = ?", self.row.id, name)
                free_unneeded(catalog, row.layer)

            self.opened_store.change(drop)
            reclaim.work_soon(self.opened_store)
            merge_into_base.fold_where_unnamed(self, [row.layer])
            merge_into_base.free_hidden(self, around)

    def merge_into_base(
        self,
        upto: str | None = None,
        *,
        progress: Progress | None = None,
        threads: int = 0,
        bytes_per_second: int = 0,
    ) -> None:
        """Fold the layers up to a snapshot, or the whole volume, into the base file.

        Other threads read, write and take snapshots meanwhile; other operations on the tree are refused.

        Parameters
        ----------
        upto : str, optional
            A snapshot that the disk descends from. None: all that was written before the call.
        progress : callable, optional
            Called with the bytes copied so far and in all, five times a second. What it raises cancels the merge: the
            base holds a part of the data then, hidden by the layers. The volume works as before; the base by itself is
            of no use until the merge is run again, which goes on where it was.
        threads : int
            That copy; 0 chooses.
        bytes_per_second : int
            At most so many are written; 0 is no bound.

        Raises
        ------
        StateError
            An older snapshot, another branch, a clone or another volume needs the base as it is (listed).
        OSError
            ENOSPC: there is no room, checked before anything is written.
        """
        merge_into_base.merge_into_base(
            self, upto, progress=progress, threads=threads, bytes_per_second=bytes_per_second
        )

    def flatten(self, *, progress: Progress | None = None) -> None:
        """Copy all that the disk reads into the volume's own files, so that it needs no base and no other volume.

        Durable on return. Other threads read and write meanwhile. Snapshots keep what they stand on.

        Parameters
        ----------
        progress : callable, optional
            Called with the bytes done and those in all, from time to time. What it raises ends the copy, and leaves the
            volume as it was.

        Raises
        ------
        OSError
            A file below could not be read to its end; or ENOSPC. The volume is as it was.
        """
        with self.operation():
            copy.flatten(self, progress=progress)

    def export(self, path: "AnyPath", *, progress: Progress | None = None) -> None:
        """Write the disk as a raw image file, holes kept. Durable on return; a regular file that is there is replaced.

        Other threads read, write and change the tree meanwhile: what was written before the call is in the image, and
        nothing that was written after the disk was sealed for it.

        Parameters
        ----------
        path : path-like
            Where to write it.
        progress : callable, optional
            Called with the bytes done and those in all, from time to time. What it raises ends the export, and no image
            is left.

        Raises
        ------
        StateError
            The path is a base, of whatever name; or a merge into the base is under way.
        ValueError
            It leads into the store.
        OSError
            A file could not be read to its end; or ENOSPC. There is no image then, and what was there is unchanged.
        """
        export.export(self, Path(path), replace=True, progress=progress)

    def diff(self, a: str, b: str | None = None) -> "Extents":
        """Return where two snapshots, or a snapshot and the head, may differ.

        Parameters
        ----------
        a, b : str
            Snapshots, in any order; `b` None means the head, which is flushed first.

        Returns
        -------
        array
            Extents (offset, length, state), as for `Store.diff`.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        """
        if b is None and self.writable:
            self.flush()
        return usages.diff(self.opened_store, self._name_now(), a, b)

    def usage(self) -> "list[Usage]":
        """Return what each snapshot holds and what discard or merge of it would free. A head is flushed first.

        Returns
        -------
        list of Usage
            As for `Store.usage`.
        """
        if self.writable:
            self.flush()
        return usages.usage(self.opened_store, self._name_now())

    def layering(self) -> "Layering":
        """Return which layer each part of the disk comes from: (chain, extents).

        A writable volume is flushed first, to know. Any thread may call it; what is written meanwhile may be in it.

        Returns
        -------
        Layering
            `chain`, a tuple that describes the layers and the base by depth, and `extents`, a structured array of
            (offset, length, state, depth) in order, without gaps; offsets and lengths are bytes.

        Raises
        ------
        StateError
            Closed, or poisoned.
        ChainError
            The base is not the file that it was.
        """
        from onionskin.operations.layering import read_layering

        if self._closed or self._forked:
            raise StateError(f"volume {self.row.name!r} is closed, or was opened before a fork; open it again")
        if self.writable:
            self.flush()
        return read_layering(self.opened_store, lambda: self.head)

    def _name_now(self) -> str:
        """Look the name up: another process may have renamed the volume since it was opened."""
        row = self.opened_store.catalog.row(VolumeRow, "id = ?", self.row.id)
        return row.name if row else self.name

    # ---- the end ----

    @contextmanager
    def operation(self, *, during_merge: bool = False, may_resume: bool = False) -> Iterator[None]:
        """Hold the volume for one operation on its tree.

        `during_merge`: also while a merge into the base copies, and the caller looks for one that was interrupted.
        `may_resume`: it ends one that was interrupted.
        """
        if self._forked:
            raise forking.forked_error(f"volume {self.name!r}")
        with self.guard:
            if self._closed:
                raise StateError(f"volume {self.name!r} is closed; open it again")
            if not self.writable:
                raise StateError(f"{self!r} is a view of a snapshot; open the volume itself")
            self._settle()
            if self.path.poisoned:
                raise StateError(f"volume {self.name!r} is poisoned by a failed sync; close it and open it again")
            if self.is_merging and not during_merge:
                raise StateError(
                    f"a merge into the base of volume {self.name!r} is under way; wait for it to end, or cancel it"
                )
            if not (may_resume or during_merge):
                self._refuse_half_merged()
            yield

    def _refuse_half_merged(self) -> None:
        if not self.is_merging and pending_base_merges(self.opened_store.catalog, self.head):
            raise StateError(
                f"a merge of {self.name!r} into its base was begun and has not ended; merge into the base again"
            )

    def merge_ended(self) -> None:
        """Let other operations, and a `close` that waits, go on. Under `guard`."""
        self.is_merging = False
        self._merge_end.notify_all()

    def wait_for_readers(self) -> None:
        """Return when every read that began before has ended."""
        path = self.path
        try:
            path.wait_for_readers()
        except StateError:
            if not path.closed:  # a closed path has no readers
                raise

    def close(self) -> None:
        """Flush, and give the volume up. Idempotent. Arrays made by `view` stay valid."""
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
                if self.writable and not (self.path.poisoned or self.path.closed):
                    self._flush_and_compact()
            finally:
                self._release()

    def abandon(self) -> None:
        """Give the volume up without a flush: what was written is not wanted."""
        with self.guard:
            if not self._released:
                self._closed = True
                self._release()

    def _flush_and_compact(self) -> None:
        self.flush()
        if self.path.map_dead_ratio() > 0.5:
            merge_into_base.compact(self)
        self._note_close()
        reclaim.work_soon(self.opened_store)
        self.opened_store.finish_work()

    def _note_close(self) -> None:
        """Write down what the head's log durably holds: from then on, a map that holds less is damaged, not new.

        An opening that changed nothing writes nothing.
        """
        catalog = self.opened_store.catalog
        length, frames, crc = self.path.log_state()
        now = {"map_length": length, "map_frames": frames, "map_crc": crc, "size_bytes": self.size_bytes}
        row = catalog.layer(self.head)
        if frames and any(getattr(row, column) != value for column, value in now.items()):
            with suppress(OSError):  # a full disk: then the next opening knows no more than this one did
                self.opened_store.change(lambda: catalog.update(LayerRow, self.head, **now))

    def _release(self) -> None:
        self.opened_store.forget(self)
        if self.snapshot_name is not None:
            self._release_view()
            return
        self.path.close()
        if self._read_lock:
            # As of a view: they end with the last array over the head, which a writer would change under it.
            self._locks = self.base_lock = self._read_lock = None
            self._released = True
            return
        self.locks.close()
        if self.base_lock:
            self.base_lock.close()
        if self._volume_lock:
            self._volume_lock.close()
        self._released = True

    def _release_view(self) -> None:
        """Give a view up. Its locks end with the last array over it: they close when nothing refers to them."""
        self.path = closed_path(self.path)  # other views of the layer may go on with the open one
        self.opened_store.views.give_back(self.head)
        self._locks = self.base_lock = None
        self._released = True
        with suppress(OSError, OnionskinError):  # what waited for these files, perhaps with secrets in it
            reclaim.work_soon(self.opened_store)

    def __del__(self) -> None:
        """Warn of an open volume that is lost with writes that were not flushed, which are lost too."""
        if not getattr(self, "_released", True) and not self._forked and self.path.unflushed:
            warnings.warn(
                f"unclosed {type(self).__name__} {self.row.name!r}", ResourceWarning, source=self, stacklevel=2
            )

    def after_fork(self) -> None:
        """In the child of a fork: raise from now on, release nothing."""
        self._forked = True
        self.guard = threading.RLock()  # another thread of the parent may have held it
        self.path.after_fork()


def _guid_bytes(guid: str) -> bytes:
    try:
        found = bytes.fromhex(guid)
    except (TypeError, ValueError):
        found = b""
    if len(found) != 16:
        raise ValueError(f"a GUID is 32 hex digits, not {guid!r}")
    return found


__all__ = ["Snapshot", "SnapshotNotFoundError", "Volume"]
