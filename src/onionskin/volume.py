"""A volume that is open for writing, or a read-only view of a snapshot or of a head.

What must hold: reading and writing go straight to the data path. After a revert, they go to the data path that replaced
the old one. This module only defines the interface of a volume: storage/open_head.py keeps what is open, and
operations/ has a module for each thing that is done to a volume.
"""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from onionskin.base.naming import check_name, check_note, several
from onionskin.base.paths import FilePath
from onionskin.base.progress import Progress
from onionskin.base.sizes import parse_size
from onionskin.catalog import new_id
from onionskin.catalog.tree import Snapshot, list_snapshots
from onionskin.errors import SnapshotNotFoundError, StateError
from onionskin.operations.flush import flush
from onionskin.storage.open_head import OpenDisk

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    import onionskin
    from onionskin.base.annotations import AnyPath, Bytes, ExtentArray, ReadableBuffer, WipePolicy, WritableBuffer
    from onionskin.kernels import _extents
    from onionskin.kernels._volume import DataPath
    from onionskin.operations.layering import Layering
    from onionskin.operations.usage import Usage

    Array = numpy.typing.NDArray[Any]

Result = TypeVar("Result")


class Volume:
    """One open volume.

    `Store.create` and `Store.open` make it. It is a context manager, which flushes and closes the volume at the end.

    Offsets and lengths are bytes; block indices count blocks of `block_size`. Any number of threads may read and write.
    Operations on snapshots run one after the other. What was written is durable only after `flush`, `snapshot`,
    `resize` or `close`.
    """

    def __init__(self, opened: OpenDisk, store: Any = None) -> None:
        self._opened = opened
        self._store = store
        # Each read and write uses this attribute, because a look-up by way of `_opened` would slow them down.
        opened.follow(self._follow)
        self._path: DataPath = opened.reading_path
        while self._path is not opened.reading_path:  # it was told of another one between the look and the assignment
            self._path = opened.reading_path

    def _follow(self, path: "DataPath") -> None:
        self._path = path

    # ---- what it is ----

    @property
    def store(self) -> "onionskin.Store":
        """The store in which the volume was opened."""
        return cast("onionskin.Store", self._store)

    @property
    def name(self) -> str:
        """The current name of the volume, also if the volume was renamed after it was opened."""
        return self._opened.name

    @property
    def size_bytes(self) -> int:
        """Size of the disk in bytes."""
        return int(self._path.size_bytes)

    @property
    def block_size(self) -> int:
        """The unit of copy-on-write, in bytes."""
        return self._opened.block_size

    @property
    def wipe(self) -> "WipePolicy":
        """What happens to freed space, ``"release"`` or ``"zero"``."""
        return cast("WipePolicy", self._opened.wipe)

    @property
    def writable(self) -> bool:
        """Whether the volume is open for writing, rather than as a read-only view."""
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
        """Return the bytes of a slice, whose step must be 1.

        A slice is cut at the end of the disk, as Python cuts slices elsewhere. An index that is a number is refused,
        for two reasons: it could mean a byte as well as a block, and a loop over the volume by mistake would make
        Python read the disk byte by byte.
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
        """Repeat a call that raised StateError, on the data path that a revert put in place of the one that failed.

        The first write to a fork fails too, and opens its head. If there is no new data path, the error that is being
        handled is raised again. `read`, `readinto` and `write`
        use this method only after an error, because a closure for each call would cost a quarter of the call's time.
        """
        if failed is self._path and not self._opened.begin_writing() and failed is self._path:
            raise  # it is looked at twice: another thread may have opened the head in between
        return self._opened.on_path(call)

    def read(self, offset: int, length: int) -> bytes:
        """Return a range as bytes.

        Any thread may call it, also while others write.

        Parameters
        ----------
        offset, length : int
            Bytes; they need no alignment. The range ends before `offset + length`, which is at most the size.

        Returns
        -------
        bytes
            Exactly `length` bytes.

        Raises
        ------
        ValueError
            The range passes the end of the volume.
        OSError
            EIO if a file of the volume cannot be read or was truncated.
        """
        path = self._path
        try:
            return path.read(offset, length)
        except StateError:
            return self._again(path, lambda new: new.read(offset, length))

    def readinto(self, offset: int, buffer: "WritableBuffer") -> int:
        """Fill a writable buffer with the bytes of a range. Threads, alignment and errors are as for `read`.

        Parameters
        ----------
        offset : int
            Offset of the first byte.
        buffer : buffer
            A writable and contiguous buffer; all of it is filled. Where this raises OSError, some of it may be.

        Returns
        -------
        int
            The number of bytes that were read, which is the length of the buffer.

        Raises
        ------
        ValueError
            The range passes the end of the volume.
        TypeError, BufferError
            The argument is no buffer, cannot be written to, or is not contiguous.
        OSError
            EIO if a file of the volume cannot be read or was truncated.
        """
        path = self._path
        try:
            return path.readinto(offset, buffer)
        except StateError:
            return self._again(path, lambda new: new.readinto(offset, buffer))

    def write(self, offset: int, data: "ReadableBuffer") -> int:
        """Write a buffer.

        The data is durable after the next `flush`. If only the process dies before that, nothing is lost. Any number of
        threads may write.

        Parameters
        ----------
        offset : int
            Offset of the first byte. No alignment is needed, but a write of whole blocks reads nothing.
        data : buffer
            A contiguous buffer. It must not change before the call returns.

        Returns
        -------
        int
            The number of bytes that were written, which is the length of the buffer.

        Raises
        ------
        ValueError
            The range passes the end of the volume.
        OSError
            ENOSPC if the disk is full. The bytes before the block that failed may be written; nothing else changed.
        StateError
            The volume is a view, is closed, or was poisoned by a failed sync.
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
            n indices in any order. An index may occur more than once.
        out : array of uint8, optional
            The array to fill, or another writable buffer. It is contiguous and has n * block_size bytes. By default a new
            array is made.

        Returns
        -------
        array of uint8
            The blocks in the order of the indices, as an array of shape (n, block_size). It is `out` if that was given.
            If the disk ends within its last block, the rest of that block is zero.

        Raises
        ------
        ValueError
            An index is not a block of the volume, or `out` has another number of bytes.
        OSError
            EIO if a file of the volume cannot be read or was truncated.
        """
        return self._opened.on_path(lambda path: path.read_blocks(block_indices, out))

    def write_blocks(self, block_indices: "Sequence[int] | Array", data: "ReadableBuffer") -> None:
        """Write many whole blocks, in one call. Threads and durability are as for `write`.

        Parameters
        ----------
        block_indices : sequence of int, or array of int
            n indices in any order. If an index occurs twice, the last block given for it counts.
        data : buffer
            A contiguous buffer of n * block_size bytes.

        Raises
        ------
        ValueError
            An index is not a block of the volume, or the buffer has another length.
        OSError, StateError
            As for `write`.
        """
        self._opened.on_path(lambda path: path.write_blocks(block_indices, data))

    def zero(self, offset: int, length: int) -> None:
        """Make a range read zero. Whole blocks are forgotten rather than overwritten with zeros.

        The change is durable after the next `flush`. Any thread may call it.

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
        """Declare that a range is no longer needed: it reads zero from now on, and the next flush frees its slots.

        The change is durable after that flush. With policy `zero`, the flush also overwrites the slots that it frees.
        Any thread may call it.

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

        The array keeps its files pinned, even after `close`. So if it shows a head, the head cannot be opened for
        writing until the array is gone. The SIGBUS guard does not cover an access to the array: if one of its files is
        cut short, or the medium fails, the access ends the process.

        Parameters
        ----------
        offset, length : int
            Bytes; they need no alignment.

        Returns
        -------
        array of uint8
            A read-only array of `length` bytes. Nothing is copied, unless the range lies in more than 4,096 pieces.

        Raises
        ------
        StateError
            The volume is open for writing.
        ValueError
            The range passes the end of the volume.
        """
        self._opened.begin_writing()  # a head has no view, whether it was written to or not
        return self._opened.on_path(lambda path: path.view(offset, length, self._opened.pins))

    def flush(self) -> None:
        """Make everything that was written before the call durable.

        Raises
        ------
        OSError
            With ENOSPC, nothing changed and the flush can be tried again. Any other failure of a sync poisons the
            volume.
        StateError
            The volume is a view, is closed, or was poisoned by a failed sync.
        """
        flush(self._opened)

    def resize(self, size: "int | str", *, force: bool = False) -> None:
        """Grow or, with `force`, shrink the disk.

        The change is durable on return, and the new part of the disk reads zero. Other threads may read and write
        meanwhile.

        Parameters
        ----------
        size : int or str
            The new size, as a number of bytes or as a string such as "20G". It is from 1 byte to 64 TiB.
        force : bool
            Allow the disk to shrink. What lies behind the new end is dropped from the disk, but snapshots keep it.

        Raises
        ------
        StateError
            The disk would shrink and `force` is not given, or the volume is a view or is closed.
        ValueError
            A volume cannot have this size.
        OSError
            With ENOSPC, the size is as it was.
        """
        from onionskin.operations.resize import resize

        resize(self._opened.to_write(), parse_size(size), force=force)

    def open_file(self) -> io.RawIOBase:
        """Return the disk as a raw, unbuffered, seekable binary file.

        Its `flush` and `close` make durable what was written. `io.BufferedRandom` over the file makes small reads and
        writes cheap. The file has no descriptor, and never changes the size.

        Returns
        -------
        io.RawIOBase
            A file that is writable if the volume is. It works as long as the volume is open, and closing the file does
            not close the volume.
        """
        from onionskin.storage.disk_file import DiskFile

        return DiskFile(self)

    def extents(self) -> "ExtentArray":
        """Return the parts of the disk that come from layers, and not from the base or a hole. Any thread may call it.

        Returns
        -------
        array
            Extents (offset, length, state) in bytes, sorted and separate. The state is 1 for DATA and 2 for ZERO.

        Raises
        ------
        StateError
            The volume is closed.
        """
        from onionskin.operations import copy

        return copy.extents(self._opened).array()

    # ---- snapshots ----

    @property
    def parent(self) -> Snapshot | None:
        """The snapshot of this volume that the disk stands on.

        It is the last snapshot on the branch of the head, or the one that the volume was reverted to.
        """
        from onionskin.operations import snapshots

        return snapshots.parent_of(self._opened)

    @property
    def head_changed(self) -> bool:
        """Whether anything was written, trimmed or resized since `parent`. Reading this flushes the volume first."""
        from onionskin.operations import snapshots

        return snapshots.is_changed(self._opened)

    @property
    def snapshots(self) -> list[Snapshot]:
        """The volume's snapshots, oldest first."""
        return list_snapshots(self._opened.store.catalog, self._opened.row)

    def snapshot(self, name: str | None = None, note: str = "", *, guid: str | None = None) -> Snapshot:
        """Give a name to the disk as it is now.

        The snapshot has everything that was written before the call, and is durable on return. Other threads may read
        and write meanwhile. What they write during the call may or may not be in the snapshot.

        Parameters
        ----------
        name : str, optional
            At most 255 bytes, without '/', '@' and control characters. By default it is the time in UTC, such as
            ``20261126T071101.123Z``. Such names sort in the order in which the snapshots were taken: if the name of a
            millisecond is taken already, the next free one is used.
        note : str
            A text that is kept with the snapshot; at most 64 KiB.
        guid : str, optional
            32 hex digits. By default the GUID is random. `apply` keeps the GUID of the other store.

        Returns
        -------
        Snapshot
            The snapshot that was taken.

        Raises
        ------
        SnapshotExistsError
            The name is taken.
        OSError
            With ENOSPC, no snapshot was taken, and the volume can be used as before.
        """
        from onionskin.operations import snapshots

        name = None if name is None else check_name("snapshot", name)
        note = check_note(note)
        guid_bytes = _guid_bytes(guid) if guid is not None else new_id()
        return snapshots.take(self._opened.to_write(), name, note, guid_bytes)

    def revert(self, name: str, *, guid: str | None = None) -> None:
        """Make the disk read as a snapshot again. What was written since the last snapshot is dropped.

        The snapshot stays, and so do newer ones. The change is durable on return. Calls of other threads go on, on the
        old disk or on the new one.

        Parameters
        ----------
        name : str
            A snapshot of this volume, on any branch.
        guid : str, optional
            The GUID that the snapshot must have, so that one that took its name meanwhile is not taken for it.

        Raises
        ------
        SnapshotNotFoundError
            There is no snapshot of that name.
        StateError
            The snapshot has another GUID.
        OSError
            With ENOSPC, the disk reads as before.
        """
        from onionskin.operations import snapshots

        snapshots.revert(self._opened.to_write(), name, guid=guid)

    def discard(
        self, name: "str | Sequence[str]", *, recursive: bool = False, guid: "str | Sequence[str] | None" = None
    ) -> None:
        """Drop a snapshot's name and all that was written after it on its branch.

        If the head descends from the snapshot, the disk reads as it did when the snapshot was taken. The change is
        durable on return. This is not TRIM. It is also not what other products call deleting a snapshot: that is
        `merge`.

        Parameters
        ----------
        name : str or sequence of str
            A snapshot of this volume, or several: then all are dropped in one transaction, or none is.
        recursive : bool
            Also drop the snapshots that were taken after them.
        guid : str or sequence of str, optional
            The GUID that each of these snapshots must have, so that one that took a name meanwhile is not taken for it.

        Raises
        ------
        SnapshotNotFoundError
            There is no snapshot of that name.
        StateError
            A snapshot has another GUID. Snapshots were taken after it and `recursive` is not given, or one of the snapshots
            to drop is held or is needed by a clone. The message lists some of them.
        ValueError
            The sequence is empty.
        """
        from onionskin.operations import snapshots

        snapshots.discard(self._opened.to_write(), several("snapshot", name), recursive=recursive, guids=guid)

    def merge(self, name: "str | Sequence[str]", *, guid: "str | Sequence[str] | None" = None) -> None:
        """Drop a snapshot's name and keep all data: what was written after it joins what was written before it.

        No block is copied: segments change their owner. Reads and other snapshots are unchanged. A layer with several
        children stays, without a name, until only one child is left. The change is durable on return. VMware, libvirt,
        ZFS and RBD call this deleting a snapshot.

        Parameters
        ----------
        name : str or sequence of str
            A snapshot of this volume, or several: then all names are dropped in one transaction, or none is.
        guid : str or sequence of str, optional
            The GUID that each of these snapshots must have, so that one that took a name meanwhile is not taken for it.

        Raises
        ------
        SnapshotNotFoundError
            There is no snapshot of that name.
        StateError
            Somebody holds one of them, or a snapshot has another GUID.
        ValueError
            The sequence is empty.
        """
        from onionskin.operations import snapshots

        snapshots.merge(self._opened.to_write(), several("snapshot", name), guids=guid)

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
            A snapshot that the disk descends from. None means all that was written before the call.
        progress : callable, optional
            It is called five times a second, with the number of bytes copied so far and in all. An exception from it
            cancels the merge. The base holds a part of the data then, which the layers hide, so the volume works as
            before. The base by itself is of no use until the merge is run again. That merge goes on where this one
            ended.
        threads : int
            The number of threads that copy. With 0, the number is chosen.
        bytes_per_second : int
            An upper bound for the rate of writing. With 0, there is none.

        Raises
        ------
        StateError
            An older snapshot, another branch, a clone or another volume needs the base as it is. The message lists
            them. Or the base is a block device: nothing is merged into one.
        OSError
            With ENOSPC, there is not enough room. This is checked before anything is written.
        """
        from onionskin.operations import merge_into_base

        merge_into_base.merge_into_base(
            self._opened.to_write(), upto, progress=progress, threads=threads, bytes_per_second=bytes_per_second
        )

    def flatten(self, *, progress: Progress | None = None) -> None:
        """Copy all that the disk reads into the volume's own files, so that it needs no base and no other volume.

        The change is durable on return. Other threads read and write meanwhile. Snapshots keep what they stand on.

        Parameters
        ----------
        progress : callable, optional
            It is called from time to time, with the number of bytes done and in all. An exception from it ends the
            copy, and leaves the volume as it was.

        Raises
        ------
        OSError
            A file below the volume could not be read to its end, or there is no space (ENOSPC). The volume is as it
            was.
        """
        from onionskin.operations.flatten import flatten

        flatten(self._opened.to_write(), progress=progress)

    def export(self, path: "AnyPath", *, progress: Progress | None = None) -> None:
        """Write the disk as a raw image file, which keeps the holes.

        The image is durable on return. A regular file at the path is replaced. Other threads read, write and change the
        tree meanwhile. The image has what was written before the call, and nothing that was written after the disk was
        sealed for the export.

        Parameters
        ----------
        path : path-like
            The path of the image.
        progress : callable, optional
            It is called from time to time, with the number of bytes done and in all. An exception from it ends the
            export, and no image is left.

        Raises
        ------
        StateError
            The path leads to a base, by any name, or a merge into the base is under way.
        ValueError
            The path leads into the store.
        OSError
            A file could not be read to its end, or there is no space (ENOSPC). Then there is no image, and a file that
            was at the path is unchanged.
        """
        from onionskin.operations import export

        export.export(self._opened, FilePath(path), replace=True, progress=progress)

    def diff(self, a: str, b: str | None = None) -> "ExtentArray":
        """Return where two snapshots, or a snapshot and the head, may differ.

        Parameters
        ----------
        a, b : str
            Snapshots, in any order. If `b` is None, the second state is the head, which is flushed first if it is open for
            writing.

        Returns
        -------
        array
            Extents (offset, length, state), as for `Store.diff`.

        Raises
        ------
        SnapshotNotFoundError
            There is no snapshot of that name.
        StateError
            The head is only read, and a writer that died left something unflushed, which is in no map yet.
        """
        return self._diff(a, b).array()

    def _diff(self, a: str, b: str | None = None) -> "_extents.Extents":
        from onionskin.operations import differences

        if b is None:
            self._bring_map_up_to_date()
        return differences.diff(self._opened.store, self._name_now(), a, b, id=self._opened.row.id)

    def usage(self) -> "list[Usage]":
        """Return what each snapshot holds, and what a discard or merge of it would free. A head is flushed first.

        Returns
        -------
        list of Usage
            As for `Store.usage`.

        Raises
        ------
        StateError
            The head is only read, and a writer that died left something unflushed, which is in no map yet.
        """
        from onionskin.operations import usage as usages

        self._bring_map_up_to_date()
        return usages.usage(self._opened.store, self._name_now(), id=self._opened.row.id)

    def layering(self) -> "Layering":
        """Return which layer each part of the disk comes from: (chain, extents).

        A writable volume is flushed first. Any thread may call it. The result may include what is written meanwhile.

        Returns
        -------
        Layering
            `chain`, a tuple that describes the layers and the base by depth, and `extents`, a structured array of
            (offset, length, state, depth) in order, without gaps. Offsets and lengths are bytes.

        Raises
        ------
        StateError
            The volume is closed or poisoned. The head is only read, and a writer that died left something unflushed, which
            is in no map yet.
        ChainError
            The base is not the file that it was.
        """
        from onionskin.operations.layering import read_layer_table

        opened = self._opened
        if opened.closed or opened.forked:
            raise StateError(f"volume {opened.row.name!r} is closed, or was opened before a fork; open it again")
        self._bring_map_up_to_date()
        return read_layer_table(opened.store, lambda: opened.head_now).layering()

    def _bring_map_up_to_date(self) -> None:
        """Flush a head that is open for writing. Refuse one that is only read, if a writer that died left its map behind."""
        from onionskin.operations import unflushed

        if self.writable:
            self.flush()
        elif self._opened.snapshot_name is None:
            unflushed.refuse_unflushed(self._opened.store, self._opened.row.id, self._name_now())

    def _name_now(self) -> str:
        """Look the current name up, because another process may have renamed the volume since it was opened."""
        row = self._opened.store.catalog.volume_with_id(self._opened.row.id)
        return row.name if row else self.name

    # ---- the end ----

    def close(self) -> None:
        """Flush and close the volume. Further calls do nothing. Arrays that `view` made stay valid.

        What was written is durable on return. Any thread may call it: it waits for calls under way, and later ones raise
        StateError.

        Raises
        ------
        OSError
            What was written could not be made durable. The volume is closed all the same; the next opening in the same
            boot of the system finds what was written, if the disk still has it.
        """
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
