"""Delta streams: one is written from two snapshots and holds what changed, and a volume of another store applies it.

    header                  magic "ONIONDLT", version, sizes, GUIDs of a and b, name and note of b, CRC-32
    record, record, ...     DATA (bytes) or ZERO (a length), in rising order of offset, each with a CRC-32
    END record              the counts, and the SHA-256 of every byte before it

The byte tables are in docs/format.md ("Delta stream"). What must hold:

- The stream is written and read front to back, so that it goes through a pipe.
- Header, data, size and GUIDs come from one pinned state of both snapshots.
- The stream names its starting point by GUID. A volume that is not exactly there (its head stands on another snapshot, or
  was written to) is refused before a byte of it changes.
- The reader trusts nothing in a stream. It checks each size against a limit before it uses memory or disk for it. Each
  record must lie inside the size that the header names, and after the record before it, so every stream ends.
- The data that arrives goes into a staged volume. Only if the SHA-256 at the end agrees does the staged volume become
  the snapshot b and the head, in one transaction. After a failure or a kill before that, the volume is as it was.
- The cost of applying a stream is bounded by the stream's length, not by the sizes that it names.
"""

import errno
import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NoReturn, Protocol

from onionskin.base import states
from onionskin.base.files import data_ranges
from onionskin.base.held import held, held_together
from onionskin.base.limits import BLOCK_SIZE_MAX, NAME_BYTES_MAX, NOTE_BYTES_MAX, VOLUME_BYTES_MAX
from onionskin.base.naming import check_name
from onionskin.base.progress import Progress
from onionskin.base.records import record, replaced
from onionskin.base.signals import DeferredInterrupt
from onionskin.catalog import SnapshotRow
from onionskin.catalog.tree import Snapshot
from onionskin.errors import ChainError, FormatError, SnapshotExistsError, StateError
from onionskin.kernels._copy import split_same, split_zeros
from onionskin.kernels._extents import Extents
from onionskin.operations import copy
from onionskin.operations.differences import State, are_related, diff_of_chains, snapshot_of
from onionskin.operations.pinned import pinned
from onionskin.storage.chain import Chain, lock_chain, read_chain
from onionskin.storage.locks import ByteLocks
from onionskin.storage.open_head import OpenHead
from onionskin.storage.shared_paths import OpenChain, refuse_changed_base
from onionskin.store import Store
from onionskin.volume import Volume

if TYPE_CHECKING:
    from onionskin.operations.staged_volumes import StagedVolume

MAGIC = b"ONIONDLT"
VERSION = 1
# magic, version, features, block size, name length, note length, size of a, size of b, GUID of a, GUID of b
HEADER = struct.Struct("<8sIIIIIQQ16s16s")
CRC = struct.Struct("<I")
RECORD = struct.Struct("<IIQQ")  # kind, CRC-32, offset, length
COUNTS = struct.Struct("<QQQ")  # DATA and ZERO records, bytes of DATA, bytes of ZERO

DATA, ZERO, END = 1, 2, 3  # kinds of records
FEATURE_FULL = 1  # there is no a: the stream holds all of b
FEATURES_KNOWN = FEATURE_FULL
NO_GUID = bytes(16)

DATA_BYTES_MAX = 1 << 20


class Writable(Protocol):
    """The target of a stream: a pipe, a file, the file of a socket. ``write`` takes all, or returns how much it took."""

    def write(self, data: bytes, /) -> object:
        """Take bytes.

        Parameters
        ----------
        data : bytes
            All of them are taken; or some, and their number is returned.
        """


class Readable(Protocol):
    """The source of a stream. ``read`` may return less than was asked for, and returns b"" at the end."""

    def read(self, length: int, /) -> bytes:
        """Return the next bytes.

        Parameters
        ----------
        length : int
            The largest number of bytes to return.

        Returns
        -------
        bytes
            At least one byte, or none at the end.
        """


@record
class Delta:
    """The header of a stream, and how much data the stream holds.

    Attributes
    ----------
    full : bool
        Whether the stream holds all of snapshot b. It can then be applied only to an empty volume.
    name, note : str
        The name and the note of snapshot b.
    guid_a, guid_b : bytes
        The GUIDs of the snapshots a and b. `guid_a` is 16 zero bytes in a full stream.
    size_a, size_b : int
        The sizes of the disk at a and at b, in bytes.
    block_size : int
        The block size of the volume that the stream came from. It is information only: a volume with another block size
        can apply the stream too.
    data_bytes, zero_bytes : int
        The number of bytes of the disk that the DATA and the ZERO records cover.
    """

    full: bool
    name: str
    note: str
    guid_a: bytes
    guid_b: bytes
    size_a: int
    size_b: int
    block_size: int
    data_bytes: int = 0
    zero_bytes: int = 0


def delta(
    store: Store, volume: str | None, a: str | None, b: str, out: Writable, *, progress: Progress | None = None
) -> Delta:
    """Write what changed from snapshot `a` to snapshot `b` as a stream, also across clones and volumes of a store.

    Two snapshots that share a layer or a base are compared by their maps. Otherwise (for example after a flatten) both
    disks are read, and data that is the same in both is not in the stream.

    Parameters
    ----------
    store : Store
    volume : str or None
        The volume of a snapshot that is named without one. It may be in use, because snapshots do not change. None if
        both names contain their volume.
    a : str or None
        The snapshot that the receiver has: a name, or ``"golden@clean"`` for one of any volume. None writes all of `b`,
        for an empty volume.
    b : str
        The snapshot that the receiver will have: a name, or ``"test-1@done"`` for one of any volume. To send a head,
        take a snapshot of it first.
    out : file
        It is written front to back. The call does not seek in it, flush it or close it.
    progress : callable, optional
        Called with the bytes looked at so far and in all.

    Returns
    -------
    Delta
        The header of the stream, with the counts.

    Raises
    ------
    VolumeNotFoundError, SnapshotNotFoundError
        A snapshot does not exist.
    ChainError
        A base is not the file that it was.
    ValueError
        `a` or `b` cannot be the name of a snapshot.
    OSError
        Reading or writing failed.
    """
    with _ends(store, volume, a, b) as ends:
        writer = _Writer(out, _header(ends))
        _write_records(writer, ends, _extents(store, ends), progress)
        for opened in (ends.opened, ends.opened_a):
            if opened is not None:
                refuse_changed_base(opened)
        return writer.end()


def estimate(store: Store, volume: str | None, a: str | None, b: str) -> Delta:
    """Say how much `delta` would write at most, from the maps alone.

    Parameters
    ----------
    store, volume, a, b
        As for `delta`.

    Returns
    -------
    Delta
        The header of the stream, with counts. Blocks of `data_bytes` that turn out to be zeros, or the same in both, are
        not written.

    Raises
    ------
    VolumeNotFoundError, SnapshotNotFoundError
        A snapshot does not exist.
    ChainError
        A base is not the file that it was.
    ValueError
        `a` or `b` cannot be the name of a snapshot.
    """
    with _ends(store, volume, a, b) as ends:
        extents = _extents(store, ends)
        zero_bytes = extents.only(states.ZERO).total_bytes
        return replaced(_header(ends), data_bytes=extents.total_bytes - zero_bytes, zero_bytes=zero_bytes)


def _header(ends: "_Ends") -> Delta:
    top = ends.opened.chain.top
    return Delta(
        full=ends.a is None,
        name=ends.b.name,
        note=ends.b.note,
        guid_a=ends.a.guid if ends.a else NO_GUID,
        guid_b=ends.b.guid,
        size_a=ends.chain_a.top.size_bytes if ends.chain_a else 0,
        size_b=top.size_bytes,
        block_size=top.block_size,
    )


def _extents(store: Store, ends: "_Ends") -> Extents:
    """Return the extents that a stream has to say something about. Those that are not ZERO have to be read."""
    extents = _full_extents(ends) if ends.chain_a is None else _changed_extents(store, ends, ends.chain_a)
    # They are of whole blocks, and the disk may have shrunk.
    return extents.within(Extents([(0, ends.opened.chain.top.size_bytes)]))


def apply(stream: Readable, volume: Volume, *, progress: Progress | None = None) -> Snapshot:
    """Bring a volume from snapshot a to snapshot b of a stream, or leave it as it was.

    Parameters
    ----------
    stream : file
        It is read front to back, to its end.
    volume : Volume
        It is open for writing, and its head is unchanged since the snapshot that has the GUID of a. That snapshot may
        belong to another volume if this one is a clone without snapshots of its own. For a full stream, the volume has
        no base, no snapshots and no data; its size does not matter.
    progress : callable, optional
        Called with the offset on the disk reached so far and its size.

    Returns
    -------
    Snapshot
        The new snapshot. It has the same name, note and GUID as in the store that it comes from. It is durable.

    Raises
    ------
    ChainError
        The volume is not where the stream starts; nothing was changed.
    StateError
        The head has changes; nothing was changed.
    SnapshotExistsError
        The volume has a snapshot of that name; nothing was changed.
    FormatError
        The stream is damaged, cut short, or not a delta stream; the volume is as it was.
    """
    reader = _Reader(stream)
    header = reader.header()
    start = _check_start(volume, header)
    with _staged_at(volume, start, header) as staged:
        disk, base_bytes = Volume(staged.head), _base_bytes(staged.head) if start else 0
        if header.size_b > header.size_a:
            _zero(disk, header.size_a, header.size_b - header.size_a, base_bytes)
        for offset, length, data in reader.records(header):
            if data is None:
                _zero(disk, offset, length, base_bytes)
            else:
                disk.write(offset, data)
            if progress is not None:
                progress(offset + length, header.size_b)
        return staged.become_snapshot_of(
            volume._opened.to_write(), name=header.name, note=header.note, guid=header.guid_b
        )


@contextmanager
def _staged_at(volume: Volume, start: SnapshotRow | None, header: Delta) -> "Iterator[StagedVolume]":
    """Yield a staged volume that has the size of b and reads as a. The data that arrives is written there.

    So the volume itself changes only when everything has arrived. A disk that grows needs no resize here, because the
    staged volume is made with the larger size. A disk that shrinks is resized, which drops the data past the new end.
    """
    from onionskin.operations import staged_volumes  # a stream is written without it
    from onionskin.operations.resize import resize

    size_bytes = max(header.size_a, header.size_b)
    layer = start.layer if start else None
    with staged_volumes.stage(
        volume._opened.store, size=size_bytes, block_size=volume.block_size, wipe=volume.wipe, clone_of=layer
    ) as staged:
        if size_bytes > header.size_b:
            resize(staged.head, header.size_b, force=True)
        yield staged


def _base_bytes(head: OpenHead) -> int:
    """Return the size of the base below a staged volume, in bytes, or 0 if there is none."""
    base = read_chain(head.store.catalog, head.head).base
    return base.size_bytes if base else 0


def _zero(disk: Volume, offset: int, length: int, base_bytes: int) -> None:
    """Zero a range, but only where it may hold data, so that the cost depends on the data and not on the length.

    A record of 24 bytes may name any length.
    """
    end = offset + length
    if offset < base_bytes:
        disk.zero(offset, min(end, base_bytes) - offset)
        offset = min(end, base_bytes)
    if offset == end:
        return
    held = disk._path.extents(offset, end - offset).only(states.DATA)
    for first, length, *_ in held.within(Extents([(offset, end)])):
        disk.zero(first, length)


def read_header(stream: Readable) -> Delta:
    """Read the header of a stream. The stream then stands at its first record.

    Parameters
    ----------
    stream : Readable
        It stands at its first byte.

    Returns
    -------
    Delta
        The contents of the header; sizes are in bytes.

    Raises
    ------
    FormatError
        It is not a delta stream that this onionskin can read.
    """
    return _Reader(stream).header()


@record
class _Ends:
    """The two snapshots of a stream, and their layers, whose files are pinned. No name is looked up again.

    `view_a` and `opened_a` are set only if the bytes of both have to be compared.
    """

    a: SnapshotRow | None
    b: SnapshotRow
    chain_a: Chain | None
    view: Volume
    opened: OpenChain
    view_a: Volume | None = None
    opened_a: OpenChain | None = None


@held
def _ends(store: Store, volume: str | None, a: str | None, b: str) -> Iterator[_Ends]:
    """Find both snapshots in one state of the catalog and pin what they read.

    If a name means another snapshot by then, this begins again.
    """
    names = None if a is None else snapshot_of(volume, a), snapshot_of(volume, b)
    while True:
        rows = _rows(store, *names)
        with held_together() as stack:
            try:
                with DeferredInterrupt():
                    ends = _pin(store, names, rows, stack)
            except StateError:  # perhaps a layer was removed meanwhile: begin again if the rows changed
                if rows == _rows(store, *names):
                    raise
                continue
            if ends is not None:
                yield ends
                return


def _pin(store: Store, names: "tuple[State | None, State]", rows: "_Rows", stack: ExitStack) -> _Ends | None:
    """Pin what two snapshots read until the stack is unwound; return None if a name means another snapshot by now."""
    row_a, row_b = rows
    found = _open_pinned(store, names[1], row_b, stack)
    if found is None:
        return None
    view, opened = found
    if row_a is None or names[0] is None:
        return _Ends(None, row_b, None, view, opened)
    locks = ByteLocks(store._opened.layout.lock)
    stack.callback(locks.close)
    chain_a = lock_chain(store._opened.catalog, row_a.layer, locks)
    if are_related(chain_a, opened.chain):
        return _Ends(row_a, row_b, chain_a, view, opened)
    before = _open_pinned(store, names[0], row_a, stack)
    return None if before is None else _Ends(row_a, row_b, chain_a, view, opened, *before)


def _open_pinned(store: Store, name: State, row: SnapshotRow, stack: ExitStack) -> tuple[Volume, OpenChain] | None:
    view = stack.enter_context(store.open(name.volume, snapshot=name.snapshot))
    if (view._opened.row.id, view._opened.head) != (row.volume, row.layer):
        return None
    return view, stack.enter_context(pinned(view._opened))


_Rows = tuple[SnapshotRow | None, SnapshotRow]


def _rows(store: Store, a: State | None, b: State) -> _Rows:
    catalog = store._opened.catalog
    with catalog.reading():
        start, end = (name.layer(catalog)[1] if name else None for name in (a, b))
    assert end is not None
    return start, end


def _changed_extents(store: Store, ends: _Ends, chain_a: Chain) -> Extents:
    """Return the extents that may differ.

    The two chains may be read at different times, because a layer that is in both reads the same at both times.
    """
    found = diff_of_chains(store._opened, chain_a, ends.opened.chain)
    # Where the bytes are compared, the zeros that the maps name are not used.
    return found if ends.view_a is None else found.ranges()


def _full_extents(ends: _Ends) -> Extents:
    """Return the extents that may hold something other than zeros: data of the layers, and data of the base between."""
    found = copy.extents(ends.view._opened)
    base, lock = ends.opened.chain.base, ends.opened.base_lock
    if base is not None and lock is not None:
        inside = data_ranges(lock.descriptor, 0, min(ends.view.size_bytes, base.size_bytes))
        found = found.over(Extents(inside, state=states.DATA, source=copy.BASE))
    return found.only(states.DATA)


def _write_records(writer: "_Writer", ends: _Ends, extents: Extents, progress: Progress | None) -> None:
    total, done = extents.total_bytes, 0
    room = min(DATA_BYTES_MAX, total)
    buffer, before = memoryview(bytearray(room)), memoryview(bytearray(room if ends.view_a else 0))
    for offset, length, state, *_ in extents:
        if state == states.ZERO:
            writer.zero(offset, length)
            done += length
            continue
        for at in range(offset, offset + length, DATA_BYTES_MAX):
            piece = buffer[: min(DATA_BYTES_MAX, offset + length - at)]
            ends.view.readinto(at, piece)
            for start, stop in _differing(ends, at, piece, before) if ends.view_a else ((0, len(piece)),):
                _write_piece(writer, at + start, piece[start:stop], ends.view.block_size)
            done += len(piece)
            if progress is not None:
                progress(done, total)


def _differing(ends: _Ends, at: int, piece: memoryview, buffer: memoryview) -> Iterator[tuple[int, int]]:
    """Yield the runs of blocks of a piece that differ from a. Past the end of a, a counts as zero."""
    assert ends.view_a is not None
    old = buffer[: len(piece)]
    inside = min(max(ends.view_a.size_bytes - at, 0), len(piece))
    if inside:
        ends.view_a.readinto(at, old[:inside])
    old[inside:] = bytes(len(old) - inside)  # because `apply` zeroes what is past the end of a
    for start, stop, is_same in split_same(piece, old, ends.view.block_size):
        if not is_same:
            yield start, stop


def _write_piece(writer: "_Writer", offset: int, piece: memoryview, block_size: int) -> None:
    for start, stop, is_zero in split_zeros(piece, block_size):
        if is_zero:
            writer.zero(offset + start, stop - start)
        else:
            writer.data(offset + start, piece[start:stop].tobytes())


def _check_start(volume: Volume, header: Delta) -> SnapshotRow | None:
    """Refuse a volume that is not where the stream starts. Return the snapshot that its head stands on, of any volume.

    Return None for a full stream.
    """
    from onionskin.operations.staged_volumes import is_changed_since, snapshot_below

    opened, catalog = volume._opened, volume._opened.store.catalog
    with catalog.reading():
        names = {row.name for row in catalog.snapshots_of(opened.row.id)}
        head = opened.head_now
        parent = snapshot_below(catalog, opened.row, head)
        base = read_chain(catalog, head).base
        size_bytes = catalog.layer(parent.layer).size_bytes if parent else 0
    if header.full:
        if names or base is not None or _holds_data(volume):
            raise ChainError(
                f"volume {volume.name!r} is not empty, and this stream holds a whole disk; "
                "make a volume with onionskin create --size, and apply it to that"
            )
        return None
    if parent is None or parent.guid != header.guid_a:
        stands = "no snapshot" if parent is None else f"snapshot {parent.name!r}"
        raise ChainError(
            f"volume {volume.name!r} stands on {stands}, where the stream to {header.name!r} does not start; "
            "revert to the snapshot where it starts, or write a stream from the one that is here"
        )
    if is_changed_since(opened, parent):
        raise StateError(
            f"volume {volume.name!r} was written to after snapshot {parent.name!r}; "
            f"revert to {parent.name!r}, then apply the stream again"
        )
    if header.name in names:
        raise SnapshotExistsError(
            f"volume {volume.name!r} already has a snapshot {header.name!r}; merge or discard it first"
        )
    if size_bytes != header.size_a:
        raise ChainError(
            f"volume {volume.name!r} has {size_bytes} bytes, the stream starts at {header.size_a}; "
            "it was not made from this disk: transfer the whole snapshot"
        )
    return parent


def _holds_data(volume: Volume) -> bool:
    return len(copy.extents(volume._opened).only(states.DATA)) > 0


class _Writer:
    """Writes a stream front to back, and counts and hashes what it writes.

    Adjacent runs of zeros are written as one record. A full stream is applied to an empty volume, so no zeros are
    written in it.
    """

    def __init__(self, out: Writable, header: Delta) -> None:
        self._out = out
        self._header = header
        self._digest = hashlib.sha256()
        self._pending = (0, 0)  # start and stop of a run of zeros that is not written yet
        self._records = self._data_bytes = self._zero_bytes = 0
        name, note = header.name.encode(), header.note.encode()
        fixed = HEADER.pack(
            MAGIC,
            VERSION,
            FEATURE_FULL if header.full else 0,
            header.block_size,
            len(name),
            len(note),
            header.size_a,
            header.size_b,
            header.guid_a,
            header.guid_b,
        )
        self._put(fixed + name + note + CRC.pack(zlib.crc32(fixed + name + note)))

    def data(self, offset: int, data: bytes) -> None:
        self._write_pending()
        self._record(DATA, offset, len(data), data)
        self._data_bytes += len(data)

    def zero(self, offset: int, length: int) -> None:
        if self._header.full:
            return
        start, stop = self._pending
        if stop != offset:
            self._write_pending()
            start = offset
        self._pending = (start, offset + length)

    def end(self) -> Delta:
        self._write_pending()
        counts = COUNTS.pack(self._records, self._data_bytes, self._zero_bytes)
        length = COUNTS.size + self._digest.digest_size
        crc = zlib.crc32(counts, zlib.crc32(RECORD.pack(END, 0, self._header.size_b, length)))
        self._put(RECORD.pack(END, crc, self._header.size_b, length) + counts)
        self._write(self._digest.digest())
        return replaced(self._header, data_bytes=self._data_bytes, zero_bytes=self._zero_bytes)

    def _write_pending(self) -> None:
        start, stop = self._pending
        self._pending = (0, 0)
        if start < stop:
            self._record(ZERO, start, stop - start, b"")
            self._zero_bytes += stop - start

    def _record(self, kind: int, offset: int, length: int, payload: bytes) -> None:
        crc = zlib.crc32(payload, zlib.crc32(RECORD.pack(kind, 0, offset, length)))
        self._put(RECORD.pack(kind, crc, offset, length))
        self._put(payload)
        self._records += 1

    def _put(self, data: bytes) -> None:
        self._digest.update(data)
        self._write(data)

    def _write(self, data: bytes) -> None:
        """Write all: a file without a buffer says how much it took, which is less where a signal or a full disk came."""
        while data:
            taken = self._out.write(data)
            if taken is None and not isinstance(self._out, io.RawIOBase):  # of another kind: it took all
                return
            if not taken:
                raise BlockingIOError(
                    errno.EAGAIN, "the stream goes to a file that takes nothing now; make it blocking"
                )
            data = data[taken:] if isinstance(taken, int) else b""


class _Reader:
    """Reads a stream front to back and checks all of it. Each size is checked before it is used."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._position = 0

    def header(self) -> Delta:
        fixed = self._take(HEADER.size)
        fields = HEADER.unpack(fixed)
        magic, version, features, block_size, name_length, note_length, size_a, size_b, guid_a, guid_b = fields
        if magic != MAGIC:
            raise FormatError("the input is not a delta stream; write one with onionskin delta")
        if version != VERSION or features & ~FEATURES_KNOWN:
            raise FormatError(
                f"the stream has version {version} and features {features:#x}, which are not known here; "
                "use a newer onionskin"
            )
        if not 0 < name_length <= NAME_BYTES_MAX or note_length > NOTE_BYTES_MAX:
            self._damaged("the length of a name or note is out of range")
        texts = self._take(name_length + note_length)
        if CRC.unpack(self._take(CRC.size))[0] != zlib.crc32(fixed + texts):
            self._damaged("the CRC-32 of the header does not match")
        full = bool(features & FEATURE_FULL)
        if not 512 <= block_size <= BLOCK_SIZE_MAX or block_size & (block_size - 1):
            self._damaged(f"a block size of {block_size}")
        if not 0 < size_b <= VOLUME_BYTES_MAX or size_a > VOLUME_BYTES_MAX:
            self._damaged("sizes that no disk has: one has at most 64 TiB")
        if full != (guid_a == NO_GUID) or guid_b == NO_GUID or (full and size_a):
            self._damaged("a start that is there and is not")
        try:
            name, note = texts[:name_length].decode(), texts[name_length:].decode()
            check_name("snapshot", name)
        except ValueError:
            self._damaged("a name or note that no snapshot can have")
        if "\0" in note:
            self._damaged("a note with a NUL, which no snapshot can have")
        return Delta(full, name, note, guid_a, guid_b, size_a, size_b, block_size)

    def records(self, header: Delta) -> Iterator[tuple[int, int, bytes | None]]:
        """Yield (offset, length, bytes or None for zeros) of each record; return when the END record is verified."""
        reached = records = data_bytes = zero_bytes = 0
        while True:
            kind, crc, offset, length = RECORD.unpack(self._take(RECORD.size))
            if kind == END:
                self._check_end(crc, offset, length, header.size_b, (records, data_bytes, zero_bytes))
                return
            if kind not in (DATA, ZERO):
                self._damaged(f"a record of kind {kind}")
            if not reached <= offset < header.size_b or not 0 < length <= header.size_b - offset:
                self._damaged(f"a record at offset {offset} with length {length}")
            if kind == DATA and length > DATA_BYTES_MAX:
                self._damaged(f"a record of {length} bytes, more than a record may have")
            payload = self._take(length) if kind == DATA else b""
            if zlib.crc32(payload, zlib.crc32(RECORD.pack(kind, 0, offset, length))) != crc:
                self._damaged(f"the CRC-32 of the record at offset {offset} does not match")
            reached = offset + length
            records += 1
            data_bytes += len(payload)
            zero_bytes += length - len(payload)
            yield offset, length, payload if kind == DATA else None

    def _check_end(self, crc: int, offset: int, length: int, size_b: int, counted: tuple[int, int, int]) -> None:
        counts = self._take(COUNTS.size)
        expected = self._digest.digest()
        same_crc = zlib.crc32(counts, zlib.crc32(RECORD.pack(END, 0, offset, length))) == crc
        if not same_crc or offset != size_b or length != COUNTS.size + len(expected):
            self._damaged("the END record is not whole")
        if COUNTS.unpack(counts) != counted:
            self._damaged("records are missing")
        if self._take(len(expected)) != expected:
            self._damaged("the SHA-256 of the stream does not match")
        if self._stream.read(1):
            self._damaged("bytes follow the END record")

    def _take(self, length: int) -> bytes:
        parts = []
        wanted = length
        while wanted:
            part = self._stream.read(wanted)
            if not part:
                at = self._position + length - wanted
                raise FormatError(f"the stream ends early, at byte {at}; transfer it again")
            parts.append(part)
            wanted -= len(part)
        data = b"".join(parts)
        self._digest.update(data)
        self._position += length
        return data

    def _damaged(self, what: str) -> NoReturn:
        raise FormatError(f"the stream is damaged before byte {self._position}: {what}; transfer it again")
