"""Sealing a head: the head becomes a layer that never changes again, and writers go on in a new head.

What must hold: the sealed data is durable before the transaction that makes it a sealed layer and gives the volume its
new head. Whatever error is raised, the data path goes on with the head that the catalog has. Writers go on all the
time, except while the heads are swapped. No data is synced inside the transaction, so a slow disk under one volume does
not delay others.

A seal has two parts, so that several heads can be sealed in one transaction. The rows are written in the with block of
`begin_seals`, and `Sealing.finish` is called after the block. Heads that are sealed together are cut at one instant: all
seals are begun, then the writers of all are held while all heads are swapped, in one call of the data path. Nobody waits
for the disk meanwhile.

The rows are written from a description (`SealedHead`), because the head may be open in another process (`RemoteHead`),
which seals it by the same steps, and goes on by itself as the catalog says. The transaction checks that the description
still holds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

from onionskin.base.named_tuples import NamedTuple
from onionskin.base.records import record
from onionskin.catalog import CommitUnknownError, LayerRow, SegmentRow, VolumeRow, new_id
from onionskin.errors import FormatError, StateError
from onionskin.kernels._volume import LongTurns, ShortTurns, begin_heads, cut_heads, sync_heads
from onionskin.operations import reclaim
from onionskin.storage.chain import NewHead, replace_spare
from onionskin.storage.open_head import OpenHead, if_begun
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.kernels._volume import DataPath, Sealed


Check = Callable[[], None]
Also = Callable[[LayerRow, LayerRow], None]
Ready = Callable[[Check], None]


@record
class NextHead:
    """The ids of the new head and its spare segment after a seal, and the lock bytes of its map and of the spare."""

    head: bytes
    spare: bytes
    map_byte: int
    spare_byte: int


@record
class SealedHead:
    """What is durable of a head that was cut off, and what the volume goes on with: all that the rows are written from.

    Attributes
    ----------
    volume, head, spare : bytes
        The volume, the head that was cut off, and its spare segment, whose id the map of the next head has too.
    block_size, wipe
        Of the next head.
    size_bytes, map_length, map_frames, map_crc
        Of the disk, and of the map of the head.
    segments : tuple of (bytes, int)
        The segments that the head made, with the slots in each.
    to_reclaim : tuple of bytes
        Inherited segments in which the head freed slots.
    next : NextHead
        What the volume goes on with.
    """

    volume: bytes
    head: bytes
    spare: bytes
    block_size: int
    wipe: str
    size_bytes: int
    map_length: int
    map_frames: int
    map_crc: int
    segments: tuple[tuple[bytes, int], ...]
    to_reclaim: tuple[bytes, ...]
    next: NextHead


class Sealing:
    """A seal that was begun. The data path has its new head, and waits to be told whether the volume has it too.

    `begin_seals` makes it.

    Parameters
    ----------
    volume : OpenHead
    spare : SegmentRow
        What `spares_for` has for it: the first segment of the next head, whose id is also the id of that head's map.
    """

    def __init__(self, volume: OpenHead, spare: SegmentRow) -> None:
        self.volume = volume
        self._spare = spare
        self._sealed: Sealed | None = None
        self.to_reclaim: list[bytes] = []
        self.next_head: NextHead | None = None

    @property
    def next_map(self) -> tuple[str, bytes]:
        """The path and the id of the next head's map."""
        return str(self.volume.store.layout.map_file(self._spare.id)), self._spare.id

    def note_synced(self, sealed: "Sealed") -> None:
        """Keep what was sealed, which is durable."""
        self._sealed = sealed
        # The last flush of this head may have freed slots in inherited segments. The new head does not know of them.
        self.to_reclaim = self.volume.path.reclaim_wanted()

    def describe(self, map_byte: int, spare_byte: int) -> SealedHead:
        """Describe what was sealed, for the rows, with the lock bytes of the next head's map and spare."""
        volume, sealed = self.volume, self._sealed
        assert sealed is not None
        self.next_head = NextHead(new_id(), new_id(), map_byte, spare_byte)
        return SealedHead(
            volume.row.id,
            volume.head,
            self._spare.id,
            volume.block_size,
            volume.wipe,
            sealed.size_bytes,
            sealed.map_length,
            sealed.map_frames,
            sealed.map_crc,
            tuple(sealed.segments),
            tuple(self.to_reclaim),
            self.next_head,
        )

    def share_next(self) -> None:
        """Lock the files of the next head, before the commit that names them."""
        new = self.next_head
        assert new is not None
        self.volume.share({new.spare_byte: new.spare}, new.map_byte)

    def go_on(self) -> None:
        """Tell the data path that the volume goes on with the new head."""
        assert self.next_head is not None
        self.volume.head = self.next_head.head
        spare = self.next_head.spare
        if_begun(lambda: self.volume.path.seal_commit(spare))

    def resolve(self) -> None:
        """Go on with the new head if the catalog has it, with the old one if not."""
        volume, new = self.volume, self.next_head
        if new is None or volume.path.poisoned or volume.store.catalog.head_of(volume.row) != new.head:
            if_begun(volume.path.seal_abort)
        else:
            self.go_on()

    def give_back_reclaims(self) -> None:
        """Have the data path wish again what no row was written for."""
        if self.to_reclaim and not self.volume.path.closed:
            self.volume.path.want_reclaim(self.to_reclaim)

    def finish(self) -> None:
        """Give up files that were made for nothing, and start freeing slots. The data path knows its head by then."""
        assert self._sealed is not None
        byte_of_segment = self.volume.segment_bytes()
        unused = {byte_of_segment[id] for id, slots in self._sealed.segments if not slots and id in byte_of_segment}
        self.volume.locks.drop_shared(unused)
        if self.to_reclaim or unused:
            reclaim.work_soon(self.volume.store)
        self.volume.note_seal()


def describe_all(store: OpenStore, sealings: Sequence[Sealing]) -> list[SealedHead]:
    """Describe what was sealed here, with lock bytes that are drawn now. In the transaction, which may run twice."""
    lock_bytes = iter(store.catalog.take_lock_bytes(2 * len(sealings)) if sealings else ())
    for sealing in sealings:
        sealing.next_head = None  # what an earlier run described is not in the catalog
    return [sealing.describe(next(lock_bytes), next(lock_bytes)) for sealing in sealings]


def write_sealed(store: OpenStore, heads: Sequence[SealedHead]) -> list[tuple[LayerRow, LayerRow]]:
    """Write the rows of layers that were sealed and of the heads over them, and return both. In a transaction.

    Raises
    ------
    StateError
        A volume does not stand any more as it is described: whoever holds it has gone on with its old head.
    """
    catalog = store.catalog
    _refuse_changed(store, heads)
    before = {row.id: row for row in catalog.layers_with_ids([what.head for what in heads])}
    # The size comes from the map, because a crash after a resize may have left the old size in the row.
    old = [before[what.head]._replace(size_bytes=what.size_bytes) for what in heads]
    new = [_next_layer(row, what) for row, what in zip(old, heads, strict=True)]
    _write_next_heads(store, new, heads)
    for what in heads:
        if what.to_reclaim:
            reclaim.add_slot_work(store, what.to_reclaim, what.wipe)
    return list(zip(_write_layers(store, old, heads), new, strict=True))


def _next_layer(old: LayerRow, what: SealedHead) -> LayerRow:
    # The map has the id of the spare. So if the map is made beforehand, the catalog names it before the head exists.
    head = NewHead.on(
        old, base=None, block_size=what.block_size, wipe=what.wipe, size_bytes=old.size_bytes, map_id=what.spare
    )
    return head.layer._replace(id=what.next.head, map_lock_byte=what.next.map_byte)


def refuse_untrue(store: OpenStore, heads: "Sequence[RemoteHead]") -> None:
    """Refuse what other processes described, if it is not what the catalog has. In the transaction that writes it.

    That each volume still has the head that was described is what `write_sealed` checks.

    Raises
    ------
    FormatError
        One described another volume, or files that are not of the head.
    """
    layers = {row.id: row for row in store.catalog.layers_with_ids([head.sealed.head for head in heads])}
    segments = store.catalog.segments_with_ids([id for head in heads for id, _ in head.sealed.segments])
    own = {row.id: row.layer for row in segments if row.role == "own"}
    there = {row.id for row in segments}
    for head in heads:
        what = head.sealed
        if (
            what.volume != head.row.id
            or what.head not in layers
            or what.block_size != layers[what.head].block_size
            or any(own.get(id) != what.head for id, slots in what.segments if slots or id in there)
            or not _are_below(store, what)
        ):
            raise FormatError(f"what the server of volume {head.name!r} sealed is not what the catalog has of it")


def _are_below(store: OpenStore, what: SealedHead) -> bool:
    """Whether the segments in which slots are to be freed are of the head, which is sealed now, or of the layers below it.

    Of the head itself where a seal before was given up: what was written meanwhile freed slots in what had been sealed.
    """
    if not what.to_reclaim:
        return True
    below = {layer.id for layer in store.catalog.chain(what.head)}
    layers = dict(store.catalog.layers_of_segments(what.to_reclaim))
    return all(id not in layers or layers[id] in below for id in what.to_reclaim)  # what is gone has no slots


def _refuse_changed(store: OpenStore, heads: Sequence[SealedHead]) -> None:
    catalog = store.catalog
    volumes = {row.id: row for row in catalog.volumes_with_ids([what.volume for what in heads])}
    spares: dict[bytes, list[bytes]] = {}
    for row in catalog.spares_of_all([what.head for what in heads]):
        spares.setdefault(row.layer, []).append(row.id)
    for what in heads:
        volume = volumes.get(what.volume)
        if volume is None or volume.head != what.head or spares.get(what.head) != [what.spare]:
            called = repr(volume.name) if volume else what.volume.hex()
            raise StateError(
                f"volume {called} went on with its old head meanwhile, because its process waited too long; nothing was "
                "taken"
            )


def _write_next_heads(store: OpenStore, new: Sequence[LayerRow], heads: Sequence[SealedHead]) -> None:
    """Write the rows of the new heads, make the old heads' spares their segments, and give them to the volumes."""
    catalog = store.catalog
    catalog.insert_all(new)
    catalog.update_all(
        SegmentRow,
        ("role", "layer"),
        [("own", layer.id, what.spare) for layer, what in zip(new, heads, strict=True)],
    )
    catalog.insert_all(SegmentRow(what.next.spare, what.next.head, "spare", 0, what.next.spare_byte) for what in heads)
    catalog.update_all(VolumeRow, ("head",), [(what.next.head, what.volume) for what in heads])


def _write_layers(store: OpenStore, old: Sequence[LayerRow], heads: Sequence[SealedHead]) -> list[LayerRow]:
    """Write the rows of the layers that were sealed and of their segments, and return the rows of the layers.

    Segments without slots are dropped.
    """
    catalog = store.catalog
    sealed = [
        row._replace(sealed=1, map_length=what.map_length, map_frames=what.map_frames, map_crc=what.map_crc)
        for row, what in zip(old, heads, strict=True)
    ]
    catalog.update_all(
        LayerRow,
        ("sealed", "size_bytes", "map_length", "map_frames", "map_crc"),
        [(row.sealed, row.size_bytes, row.map_length, row.map_frames, row.map_crc, row.id) for row in sealed],
    )
    used = [("sealed", slots, id) for what in heads for id, slots in what.segments if slots]
    catalog.update_all(SegmentRow, ("role", "slots"), used)
    for row, what in zip(old, heads, strict=True):
        for id, slots in what.segments:
            if not slots:
                _drop_empty_segment(store, id, row.wipe)
    return sealed


def _drop_empty_segment(store: OpenStore, id: bytes, wipe: str) -> None:
    """Remove the row of a segment without slots. If it has a file, the file becomes pending work."""
    row = store.catalog.segment_with_id(id)
    if row is None:
        return
    if store.layout.segment_file(id).exists():
        store.catalog.add_work("segment", id, row.lock_byte, wipe)
    store.catalog.remove_segment(id)


class RemoteHead(Protocol):
    """A head that is open in another process, which seals it for this one."""

    store: OpenStore  # here
    row: VolumeRow  # as it was when its process was found
    name: str

    @property
    def process(self) -> "RemoteProcess":
        """The process that has it open."""

    def refuse_half_merged(self) -> None:
        """Do nothing: its process does it, as `OpenHead.refuse_half_merged`."""

    @property
    def sealed(self) -> SealedHead:
        """What its process described."""


class RemoteProcess(Protocol):
    """A process that seals heads for this one. Whatever is raised here or there, it goes on with the heads that the catalog
    has, and sees to it that the catalog changes no more by what it described.
    """

    def enter(self, heads: "Sequence[RemoteHead]", within: float | None) -> None:
        """Have it hold these volumes, for one operation: it does when `entered` or `begun` returns."""

    def entered(self) -> None:
        """Wait until it holds all that it was asked to hold."""

    @property
    def peer(self) -> int:
        """The descriptor of the socket by which it is told to cut."""

    def words(self, *, is_alone: bool) -> tuple[bytes, bytes, bytes, bytes, float]:
        """What is said at the cut, as `kernels.cut_heads` takes it. `is_alone`: no writers wait but those of this process."""

    def ask_to_wait(self) -> None:
        """Have it wait for longer until it is asked to begin. It does not wait for as long as it takes without this."""

    def ask_to_begin(self) -> None:
        """Have it make durable most of what was written."""

    def begun(self) -> None:
        """Wait for that. Then it listens to the words of the cut."""

    def cut_failed(self, number: int) -> StateError:
        """Return the error that says why it did not cut; `number` is an error number."""

    def ask_to_sync(self, lock_bytes: Mapping[bytes, tuple[int, int]]) -> None:
        """Have it make the rest durable, and hold the files of the next head of each volume by these lock bytes."""

    def synced(self) -> None:
        """Wait for that."""

    def give_up(self) -> None:
        """Say that the catalog has not changed, and will not be by what it described, where that is sure."""

    def ask_to_end(self, *, is_named: bool) -> None:
        """Have it look into the catalog for the heads that it goes on with."""

    def ended(self) -> None:
        """Wait for that. What it does wrong now is logged: the catalog has changed."""


@contextmanager
def begin_seals(
    volumes: Sequence[OpenHead],
    remotes: Sequence[RemoteHead] = (),
    when_cut: Check = lambda: None,
    when_ready: Ready | None = None,
) -> Iterator[list[Sealing]]:
    """Cut heads at one instant, and make durable what was written; in the block one transaction writes their rows.

    `when_ready` is called when all is done that can be done beforehand, and before flushes have to wait for this seal. Where
    it raises, nothing was begun. If it takes seconds, it calls what it is given every few of them, so that the other
    processes wait for it. `when_cut` is called when writers go on, before anything is synced.

    At the end of the block each data path here is told which head goes on: the new one, or, where the catalog does not
    have that, the old one. In an operation of each volume. Behind the block, `Sealing.finish` is called.
    """
    sealings = [Sealing(volume, spare) for volume, spare in zip(volumes, spares_for(volumes), strict=True)]
    processes = processes_of(remotes)
    try:
        with ExitStack() as stack:
            for sealing in sealings:
                stack.enter_context(sealing.volume.resolving(sealing.resolve, sealing.go_on))
            lock_bytes = _take_lock_bytes(remotes) if when_ready else None
            if when_ready or sealings or len(processes) > 1:  # no seal begins before all volumes are held
                for process in processes:
                    process.entered()
            if when_ready:
                when_ready(lambda: _ask_to_wait(processes))
            for process in processes:
                process.ask_to_begin()
            begin_each(sealings)
            if lock_bytes is None:  # while the others make durable what was written
                lock_bytes = _take_lock_bytes(remotes)
            for process in processes:
                process.begun()
            _cut(sealings, processes)
            when_cut()
            for process in processes:
                process.ask_to_sync(lock_bytes)
            sync_each(sealings)
            for process in processes:
                process.synced()
            yield sealings
    except BaseException:
        for sealing in sealings:
            sealing.give_back_reclaims()
        raise


def _ask_to_wait(processes: Sequence[RemoteProcess]) -> None:
    for process in processes:
        process.ask_to_wait()


def processes_of(remotes: Sequence[RemoteHead]) -> list[RemoteProcess]:
    """Return the processes that have these heads open, each once."""
    return list({id(remote.process): remote.process for remote in remotes}.values())


def _take_lock_bytes(remotes: Sequence[RemoteHead]) -> dict[bytes, tuple[int, int]]:
    """Take the lock bytes of the next heads of others, which lock them before the transaction that names these heads.

    By themselves: in that transaction nobody could lock them before they are there, and after it too late.
    """
    if not remotes:
        return {}
    store = remotes[0].store
    taken = store.reserve.retry(lambda: store.catalog.draw_lock_bytes(2 * len(remotes)))
    return {remote.row.id: (taken[2 * at], taken[2 * at + 1]) for at, remote in enumerate(remotes)}


def _cut(sealings: Sequence[Sealing], processes: Sequence[RemoteProcess]) -> None:
    volumes = [sealing.volume for sealing in sealings]
    paths, names = _paths(sealings), [volume.row.name for volume in volumes]
    if not processes:
        cut_heads(paths, names)
    elif failed := cut_heads(
        paths,
        names,
        [process.peer for process in processes],
        processes[0].words(is_alone=not volumes and len(processes) == 1),
    ):
        at, number = failed
        raise processes[at].cut_failed(number)


def begin_each(sealings: Sequence[Sealing]) -> None:
    """Begin seals, side by side. A head that has more to make durable than its log has room for is flushed, with writers at
    work.
    """
    if sealings:
        _raise_first(sealings, begin_heads(_paths(sealings), [sealing.next_map for sealing in sealings]))


def sync_each(sealings: Sequence[Sealing]) -> None:
    """Make durable what was cut off, side by side."""
    if not sealings:
        return
    synced = sync_heads(_paths(sealings))
    _raise_first(sealings, synced)
    for sealing, sealed in zip(sealings, synced, strict=True):
        assert not isinstance(sealed, Exception)
        sealing.note_synced(sealed)


def _paths(sealings: Sequence[Sealing]) -> "list[DataPath]":
    return [sealing.volume.path for sealing in sealings]


def _raise_first(sealings: Sequence[Sealing], ended: Sequence[object]) -> None:
    """Raise the first error. Of several seals, it says of which volume it is."""
    for sealing, error in zip(sealings, ended, strict=True):
        if not isinstance(error, Exception):
            continue
        name = sealing.volume.row.name
        if len(sealings) > 1 and isinstance(error, StateError):
            raise StateError(f"volume {name!r}: {error}") from error
        if len(sealings) > 1 and isinstance(error, OSError):
            error.strerror = f"volume {name!r}: {error.strerror}"
        raise error


class Part(NamedTuple):
    """One head of those that are sealed together: `check` and `also` are as for `seal`."""

    head: "OpenHead | RemoteHead"
    check: Check
    also: Also
    is_named: bool = True  # whether the sealed layer gets a name


def seal_together(
    store: OpenStore,
    parts: Sequence[Part],
    then: Check = lambda: None,
    *,
    check: Check = lambda: None,
    when_ready: Ready | None = None,
    when_cut: Check = lambda: None,
) -> list[LayerRow]:
    """Seal heads at one instant and in one transaction, and go on in new ones. Returns the sealed layers.

    In an operation of each volume. `check` is called where each part's is, once for all. `then` is called in the
    transaction, when all rows are written, and `when_cut` before
    it, when what is written from then on is in none of the sealed layers. `when_ready` is as for `begin_seals`.
    """

    def check_all() -> None:
        for part in parts:
            part.check()
        check()

    check_all()
    remotes = [part.head for part in parts if not isinstance(part.head, OpenHead)]
    processes = processes_of(remotes)

    def write_rows() -> list[LayerRow]:
        check_all()
        if remotes:
            refuse_untrue(store, remotes)
        ours = iter(describe_all(store, sealings))
        described = [next(ours) if isinstance(part.head, OpenHead) else part.head.sealed for part in parts]
        written = write_sealed(store, described)
        for part, (row, head) in zip(parts, written, strict=True):
            part.also(row, head)
        for sealing in sealings:
            sealing.share_next()
        then()
        return [row for row, _ in written]

    try:
        here = [part.head for part in parts if isinstance(part.head, OpenHead)]
        # The rows of a group of eight are milliseconds of computing, for which no writer is to wait.
        with ShortTurns(), begin_seals(here, remotes, when_cut, when_ready) as sealings, LongTurns():
            rows = store.change(write_rows)
    except CommitUnknownError:
        raise
    except Exception:
        for process in processes:
            process.give_up()
        raise
    with ExitStack() as finishing:  # an error of one keeps the others from nothing
        for process in processes:
            finishing.callback(process.ended)
        for sealing in sealings:
            finishing.callback(sealing.finish)
        for process in processes:
            process.ask_to_end(is_named=all(part.is_named for part in parts))
    return rows


def seal(volume: OpenHead, *, check: Check = lambda: None, also: Also = lambda sealed, head: None) -> LayerRow:
    """Seal the head and go on in a new one. Returns the sealed layer. The caller is in an operation of the volume.

    `check` is called before anything happens, and again inside the transaction. `also` is called in the same
    transaction, with the rows of the sealed layer and of the new head.
    """
    return seal_together(volume.store, [Part(volume, check, also)])[0]


def spares_for(volumes: Sequence[OpenHead]) -> list[SegmentRow]:
    """Return the spare segment of each head. One whose spare an aborted snapshot used gets a new one."""
    for volume in volumes:
        _need_spare(volume)
    if not volumes:
        return []
    catalog = volumes[0].store.catalog
    found = {row.layer: row for row in catalog.spares_of_all([volume.head for volume in volumes])}
    if len(found) < len(volumes):
        return [catalog.spare_of(volume.head) for volume in volumes]  # which says what is wrong
    return [found[volume.head] for volume in volumes]


def _need_spare(volume: OpenHead) -> None:
    """Give the head a new spare segment if an aborted snapshot used its spare.

    A segment of the head that the data path does not know would stay with the layer that is sealed, and have no file.
    """
    if volume.path.has_spare:
        return
    catalog = volume.store.catalog
    known = {id for _, id, _, _ in volume.path.segments()}

    def register() -> SegmentRow:
        spare = catalog.spare_of(volume.head)
        if spare.id in known:  # else the data path was not told of it: an error or a signal's handler came between
            spare = replace_spare(catalog, volume.head)
        volume.share({spare.lock_byte: spare.id})
        return spare

    volume.path.set_spare(volume.store.change(register).id)
