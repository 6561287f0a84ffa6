"""A volume that is open for writing, or a read-only view of a snapshot or of a head.

What must hold: reading and writing go straight to the data path, and to the new one once a revert has put that in the place
of the old one. Here are only what a volume can do, and what it is asked with: storage/open_head.py has what is open, and
operations/ has a module for each thing that is done to it.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from onionskin.base.naming import check_name, check_note, several
from onionskin.base.progress import Progress
from onionskin.base.sizes import parse_size
from onionskin.catalog import new_id
from onionskin.catalog.tree import Snapshot, list_snapshots
from onionskin.errors import SnapshotNotFoundError, StateError
from onionskin.operations import copy, export, merge_into_base, snapshots
from onionskin.operations import usage as usages
from onionskin.operations.flatten import flatten
from onionskin.operations.flush import flush
from onionskin.operations.resize import resize
from onionskin.storage.disk_file import DiskFile
from onionskin.storage.open_head import OpenDisk

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    import onionskin
    from onionskin.base.annotations import AnyPath, Bytes, Extents, ReadableBuffer, WritableBuffer
    from onionskin.kernels._volume import DataPath
    from onionskin.operations.layering import Layering
    from onionskin.operations.usage import Usage

    Array = numpy.typing.NDArray[Any]

Result = TypeVar("Result")


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

    def __init__(self, opened: OpenDisk, store: Any = None) -> None:
        self._opened = opened
        self._store = store
        self.block_size: int = opened.block_size
        self.wipe: str = opened.wipe
        # Not found by way of `_opened` at each read or write: that would cost them some of their time.
        opened.follow(self._follow)
        self._path: DataPath = opened.path

    def _follow(self, path: "DataPath") -> None:
        self._path = path

    # ---- what it is ----

    @property
    def store(self) -> "onionskin.Store":
        """The store that it was opened in."""
        return cast("onionskin.Store", self._store)

    @property
    def name(self) -> str:
        """The volume's name, as it is now where somebody renamed it meanwhile."""
        return self._opened.name

    @property
    def size_bytes(self) -> int:
        """Size of the disk in bytes."""
        return int(self._path.size_bytes)

    @property
    def writable(self) -> bool:
        """Whether this is the head, and not a view of a snapshot."""
        return self._opened.writable

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._opened.closed

    def __repr__(self) -> str:
        return repr(self._opened)

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

    def _again(self, failed: "DataPath", call: "Callable[[DataPath], Result]") -> Result:
        """While a call's StateError is handled: run it on the data path that a revert put in place, or raise on.

        `read`, `readinto` and `write` come here only then: a closure for each call costs them a quarter of their time.
        """
        if failed is self._path:
            raise
        return self._opened.on_path(call)

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
        path = self._path
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
        path = self._path
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
        path = self._path
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
        return self._opened.on_path(lambda path: path.read_blocks(block_indices, out))

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
        self._opened.on_path(lambda path: path.write_blocks(block_indices, data))

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
        self._opened.store.reserve.retry(lambda: self._opened.on_path(lambda path: path.zero(offset, length)))

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
        self._opened.store.reserve.retry(lambda: self._opened.on_path(lambda path: path.trim(offset, length)))

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
        return self._opened.on_path(lambda path: path.view(offset, length, self._opened.pins))

    def flush(self) -> None:
        """Make everything that was written before the call durable.

        Raises
        ------
        OSError
            ENOSPC: nothing changed, it can be tried again. Any other failure of a sync poisons the volume.
        """
        flush(self._opened)

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
        resize(self._opened.to_write(), parse_size(size), force=force)

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
        return copy.extents(self._opened)

    # ---- snapshots ----

    @property
    def parent(self) -> Snapshot | None:
        """The snapshot of this volume that the disk stands on, the last one on its branch or the one reverted to."""
        return snapshots.parent_of(self._opened)

    @property
    def head_changed(self) -> bool:
        """Whether anything was written, trimmed or resized since `parent`. Flushes, to know."""
        return snapshots.is_changed(self._opened)

    @property
    def snapshots(self) -> list[Snapshot]:
        """The volume's snapshots, oldest first."""
        return list_snapshots(self._opened.store.catalog, self._opened.row)

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
        return snapshots.take(self._opened.to_write(), name, note, guid_bytes)

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
        snapshots.revert(self._opened.to_write(), name)

    def discard(self, name: "str | Sequence[str]", *, recursive: bool = False) -> None:
        """Drop a snapshot's name and all that was written after it on its branch.

        If the head descends from it, the disk reads as when the snapshot was taken. Durable on return. This is not TRIM, and
        not what others call deleting a snapshot: that is `merge`.

        Parameters
        ----------
        name : str or sequence of str
            A snapshot of this volume, or several: then all are dropped in one transaction, or none is.
        recursive : bool
            Drop the snapshots that were taken after them too.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        StateError
            A descendant has a name and `recursive` is not given, a clone needs one, or somebody holds one; some are listed.
        ValueError
            The sequence is empty.
        """
        snapshots.discard(self._opened.to_write(), several("snapshot", name), recursive=recursive)

    def merge(self, name: "str | Sequence[str]") -> None:
        """Drop a snapshot's name and keep all data: what was written after it joins what was written before it.

        No block is copied: segments change their owner. Reads and other snapshots are unchanged. A layer with several
        children stays, without a name, until one is left. Durable on return. VMware, libvirt, ZFS and RBD call this
        deleting a snapshot.

        Parameters
        ----------
        name : str or sequence of str
            A snapshot of this volume, or several: then all names are dropped in one transaction, or none is.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        StateError
            Somebody holds one of them.
        ValueError
            The sequence is empty.
        """
        snapshots.merge(self._opened.to_write(), several("snapshot", name))

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
            self._opened.to_write(), upto, progress=progress, threads=threads, bytes_per_second=bytes_per_second
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
        flatten(self._opened.to_write(), progress=progress)

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
        export.export(self._opened, Path(path), replace=True, progress=progress)

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
        return usages.diff(self._opened.store, self._name_now(), a, b)

    def usage(self) -> "list[Usage]":
        """Return what each snapshot holds and what discard or merge of it would free. A head is flushed first.

        Returns
        -------
        list of Usage
            As for `Store.usage`.
        """
        if self.writable:
            self.flush()
        return usages.usage(self._opened.store, self._name_now())

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

        opened = self._opened
        if opened.closed or opened.forked:
            raise StateError(f"volume {opened.row.name!r} is closed, or was opened before a fork; open it again")
        if self.writable:
            self.flush()
        return read_layering(opened.store, lambda: opened.head)

    def _name_now(self) -> str:
        """Look the name up: another process may have renamed the volume since it was opened."""
        row = self._opened.store.catalog.volume_with_id(self._opened.row.id)
        return row.name if row else self.name

    # ---- the end ----

    def close(self) -> None:
        """Flush, and give the volume up. Idempotent. Arrays made by `view` stay valid."""
        self._opened.close()


def _guid_bytes(guid: str) -> bytes:
    try:
        found = bytes.fromhex(guid)
    except (TypeError, ValueError):
        found = b""
    if len(found) != 16:
        raise ValueError(f"a GUID is 32 hex digits, not {guid!r}")
    return found


__all__ = ["Snapshot", "SnapshotNotFoundError", "Volume"]
