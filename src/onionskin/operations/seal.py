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

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from onionskin.catalog import CommitUnknownError, LayerRow, SegmentRow, VolumeRow, new_id
from onionskin.errors import StateError
from onionskin.kernels._volume import cut_heads
from onionskin.operations import reclaim
from onionskin.storage.chain import NewHead, replace_spare
from onionskin.storage.open_head import OpenHead, if_begun
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.kernels._volume import Sealed


Check = Callable[[], None]
Also = Callable[[LayerRow, LayerRow], None]

_THREADS_MAX = 16  # that wait for disks at the same time


@dataclass(frozen=True, slots=True)
class NextHead:
    """The ids of the new head and its spare segment after a seal, and the lock bytes of its map and of the spare."""

    head: bytes
    spare: bytes
    map_byte: int
    spare_byte: int


@dataclass(frozen=True, slots=True)
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
    """

    def __init__(self, volume: OpenHead) -> None:
        _need_spare(volume)
        self.volume = volume
        # The first segment of the next head; its id is also the id of that head's map.
        self._spare: SegmentRow = volume.store.catalog.spare_of(volume.head)
        self._sealed: Sealed | None = None
        self.to_reclaim: list[bytes] = []
        self.next_head: NextHead | None = None

    def begin(self) -> None:
        """Make durable most of what was written, with writers at work."""
        spare = self._spare.id
        self.volume.path.seal_begin(map_path=str(self.volume.store.layout.map_file(spare)), map_id=spare)

    def sync(self) -> None:
        """Make durable what was written between that and the cut."""
        self._sealed = self.volume.path.seal_sync()
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

    def write_rows(self, also: Also) -> LayerRow:
        """Write the rows of the sealed layer and the new head, and return the sealed layer.

        This is called inside a transaction, which may run twice. `also` is called with the rows of the sealed layer and
        of the new head.
        """
        self.next_head = None
        what = self.describe(*self.volume.store.catalog.take_lock_bytes(2))
        row = write_sealed(self.volume.store, what, also)
        self.share_next()
        return row

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


def write_sealed(store: OpenStore, what: SealedHead, also: Also) -> LayerRow:
    """Write the rows of a layer that was sealed and of the head over it, and return the sealed layer. In a transaction.

    Raises
    ------
    StateError
        The volume does not stand any more as it is described: whoever holds it has gone on with its old head.
    """
    catalog = store.catalog
    _refuse_changed(store, what)
    # The size comes from the map, because a crash after a resize may have left the old size in the row.
    old = catalog.layer(what.head)._replace(size_bytes=what.size_bytes)
    # The map has the id of the spare. So if the map is made beforehand, the catalog names it before the head exists.
    head = NewHead.on(
        old, base=None, block_size=what.block_size, wipe=what.wipe, size_bytes=old.size_bytes, map_id=what.spare
    )
    layer = head.layer._replace(id=what.next.head, map_lock_byte=what.next.map_byte)
    _write_next_head(store, layer, what)
    reclaim.add_slot_work(store, what.to_reclaim, what.wipe)
    row = _write_layer(store, old, what)
    also(row, layer)
    return row


def _refuse_changed(store: OpenStore, what: SealedHead) -> None:
    catalog = store.catalog
    volume = catalog.volume_with_id(what.volume)
    spares = [row.id for row in catalog.spares_of(what.head)]
    if volume is None or volume.head != what.head or spares != [what.spare]:
        called = repr(volume.name) if volume else what.volume.hex()
        raise StateError(
            f"volume {called} went on with its old head meanwhile, because its process waited too long; nothing was taken"
        )


def _write_next_head(store: OpenStore, layer: LayerRow, what: SealedHead) -> None:
    """Write the row of the new head, make the old head's spare its segment, and give it to the volume."""
    catalog = store.catalog
    catalog.insert(layer)
    catalog.update(SegmentRow, what.spare, role="own", layer=layer.id)
    catalog.insert(SegmentRow(what.next.spare, layer.id, "spare", 0, what.next.spare_byte))
    catalog.update(VolumeRow, what.volume, head=layer.id)


def _write_layer(store: OpenStore, old: LayerRow, what: SealedHead) -> LayerRow:
    """Write the rows of the layer that was sealed and of its segments, and return the row of the layer.

    Segments without slots are dropped.
    """
    catalog = store.catalog
    columns: dict[str, Any] = {
        "sealed": 1,
        "size_bytes": what.size_bytes,
        "map_length": what.map_length,
        "map_frames": what.map_frames,
        "map_crc": what.map_crc,
    }
    catalog.update(LayerRow, old.id, **columns)
    for id, slots in what.segments:
        if slots:
            catalog.update(SegmentRow, id, role="sealed", slots=slots)
        else:
            _drop_empty_segment(store, id, old.wipe)
    return old._replace(**columns)


def _drop_empty_segment(store: OpenStore, id: bytes, wipe: str) -> None:
    """Remove the row of a segment without slots. If it has a file, the file becomes pending work."""
    row = store.catalog.segment_with_id(id)
    if row is None:
        return
    if store.layout.segment_file(id).exists():
        store.catalog.add_work("segment", id, row.lock_byte, wipe)
    store.catalog.remove_segment(id)


class RemoteHead(Protocol):
    """A head that another process holds and seals, by the steps of a `Sealing`. What it does not answer in time, it refuses.

    From the begin of its operation to the end its process waits for the next step, for a while. Then it goes on with the
    head that the catalog has, and sees to it that the catalog changes no more by what it described.
    """

    store: OpenStore  # here
    row: VolumeRow  # as it was when its process was found
    name: str
    process: str  # which one it is, once the operation has begun

    def operation(self, *, during_merge: bool, within: float | None) -> AbstractContextManager[None]:
        """Hold the volume for one operation, as `OpenHead.operation` does."""

    def refuse_half_merged(self) -> None:
        """Do nothing: its process does it, as `OpenHead.refuse_half_merged`."""

    def close(self) -> None:
        """Leave it alone from now on."""

    @property
    def peer(self) -> int:
        """The descriptor of the socket by which it is told to cut."""

    @property
    def words(self) -> tuple[bytes, bytes, bytes, bytes, float]:
        """What is said at the cut, as `kernels._volume.cut_heads` takes it."""

    @property
    def sealed(self) -> SealedHead:
        """What it described."""

    def ask_to_begin(self) -> None:
        """Have it make durable most of what was written."""

    def begun(self) -> None:
        """Wait for that."""

    def ask_to_lead(self, heads: "Sequence[RemoteHead]") -> None:
        """Have its connection cut all of these, which are of one process, when it is told."""

    def leads(self) -> None:
        """Wait until it listens to that."""

    def cut_failed(self, number: int) -> StateError:
        """Return the error that says why it was not cut; `number` is an error number."""

    def ask_to_sync(self, map_byte: int, spare_byte: int) -> None:
        """Have it make the rest durable, and hold the files of its next head by these lock bytes."""

    def synced(self) -> None:
        """Wait for that."""

    def give_up(self) -> None:
        """Say that the catalog has not changed, and will not be by what it described, where that is sure."""

    def ask_to_end(self, *, is_named: bool) -> None:
        """Have it look into the catalog for the head that it goes on with."""

    def ended(self) -> None:
        """Wait for that. What it does wrong now is logged: the catalog has changed."""


@contextmanager
def begin_seals(
    volumes: Sequence[OpenHead], remotes: Sequence[RemoteHead] = (), when_cut: Check = lambda: None
) -> Iterator[list[Sealing]]:
    """Cut heads at one instant, and make durable what was written; in the block one transaction writes their rows.

    `when_cut` is called when writers go on, before anything is synced.

    At the end of the block each data path here is told which head goes on: the new one, or, where the catalog does not
    have that, the old one. In an operation of each volume. Behind the block, `Sealing.finish` is called.
    """
    sealings = [Sealing(volume) for volume in volumes]
    try:
        with ExitStack() as stack:
            for sealing in sealings:
                stack.enter_context(sealing.volume.resolving(sealing.resolve, sealing.go_on))
            with _side_by_side(sealings) as run:
                for remote in remotes:
                    remote.ask_to_begin()
                run(Sealing.begin)
                lock_bytes = iter(_take_lock_bytes(remotes))
                for remote in remotes:
                    remote.begun()
                _cut(sealings, remotes)
                when_cut()
                for remote in remotes:
                    remote.ask_to_sync(next(lock_bytes), next(lock_bytes))
                run(Sealing.sync)
                for remote in remotes:
                    remote.synced()
            yield sealings
    except BaseException:
        for sealing in sealings:
            sealing.give_back_reclaims()
        raise


def _take_lock_bytes(remotes: Sequence[RemoteHead]) -> Sequence[int]:
    """Take the lock bytes of the next heads of others, which lock them before the transaction that names these heads.

    A transaction of its own: in the other one nobody could lock them before they are there, and after it too late.
    """
    if not remotes:
        return ()
    store = remotes[0].store
    return store.change(lambda: store.catalog.take_lock_bytes(2 * len(remotes)))


def _cut(sealings: Sequence[Sealing], remotes: Sequence[RemoteHead]) -> None:
    volumes = [sealing.volume for sealing in sealings]
    paths, names = [volume.path for volume in volumes], [volume.row.name for volume in volumes]
    leaders = _have_led(remotes)
    if not leaders:
        cut_heads(paths, names)
    elif failed := cut_heads(paths, names, [leader.peer for leader in leaders], leaders[0].words):
        at, number = failed
        raise leaders[at].cut_failed(number)


def _have_led(remotes: Sequence[RemoteHead]) -> list[RemoteHead]:
    """Have one connection of each other process ready to cut all that the process has, and return those."""
    of_process: dict[str, list[RemoteHead]] = {}
    for remote in remotes:
        of_process.setdefault(remote.process, []).append(remote)
    leaders = [heads[0] for heads in of_process.values()]
    for leader in leaders:
        leader.ask_to_lead(of_process[leader.process])
    for leader in leaders:
        leader.leads()
    return leaders


@contextmanager
def _side_by_side(sealings: list[Sealing]) -> Iterator[Callable[[Callable[[Sealing], None]], None]]:
    """Give what runs a step of each seal, at the same time: each waits for the disk. It raises when all have ended."""
    if len(sealings) <= 1:
        yield lambda step: list(map(step, sealings)).clear()
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(len(sealings), _THREADS_MAX), "onionskin seal") as threads:

        def run(step: Callable[[Sealing], None]) -> None:
            begun = [threads.submit(_run_named, sealing, step) for sealing in sealings]
            failed = [error for future in begun if (error := future.exception())]
            if failed:
                raise failed[0]

        yield run


def _run_named(sealing: Sealing, step: Callable[[Sealing], None]) -> None:
    """Run a step of one of several seals; its error says of which volume it is."""
    name = sealing.volume.row.name
    try:
        step(sealing)
    except StateError as error:
        raise StateError(f"volume {name!r}: {error}") from error
    except OSError as error:
        error.strerror = f"volume {name!r}: {error.strerror}"
        raise


@contextmanager
def begin_seal(volume: OpenHead) -> Iterator[Sealing]:
    """Seal one head: see `begin_seals`."""
    with begin_seals([volume]) as sealings:
        yield sealings[0]


class Part(NamedTuple):
    """One head of those that are sealed together: `check` and `also` are as for `seal`."""

    head: "OpenHead | RemoteHead"
    check: Check
    also: Also
    is_named: bool = True  # whether the sealed layer gets a name


def seal_together(
    store: OpenStore, parts: Sequence[Part], then: Check = lambda: None, *, when_cut: Check = lambda: None
) -> list[LayerRow]:
    """Seal heads at one instant and in one transaction, and go on in new ones. Returns the sealed layers.

    In an operation of each volume. `then` is called in the transaction, when all rows are written, and `when_cut` before
    it, when what is written from then on is in none of the sealed layers.
    """
    for part in parts:
        part.check()
    remotes = [part.head for part in parts if not isinstance(part.head, OpenHead)]

    def write_rows() -> list[LayerRow]:
        for part in parts:
            part.check()
        begun = iter(sealings)
        rows = [
            next(begun).write_rows(part.also)
            if isinstance(part.head, OpenHead)
            else write_sealed(store, part.head.sealed, part.also)
            for part in parts
        ]
        then()
        return rows

    try:
        here = [part.head for part in parts if isinstance(part.head, OpenHead)]
        with begin_seals(here, remotes, when_cut) as sealings:
            rows = store.change(write_rows)
    except CommitUnknownError:
        raise
    except Exception:
        for remote in remotes:
            remote.give_up()
        raise
    with ExitStack() as finishing:  # an error of one keeps the others from nothing
        for remote in remotes:
            finishing.callback(remote.ended)
        for sealing in sealings:
            finishing.callback(sealing.finish)
        for part in parts:
            if not isinstance(part.head, OpenHead):
                part.head.ask_to_end(is_named=part.is_named)
    return rows


def seal(volume: OpenHead, *, check: Check = lambda: None, also: Also = lambda sealed, head: None) -> LayerRow:
    """Seal the head and go on in a new one. Returns the sealed layer. The caller is in an operation of the volume.

    `check` is called before anything happens, and again inside the transaction. `also` is called in the same
    transaction, with the rows of the sealed layer and of the new head.
    """
    return seal_together(volume.store, [Part(volume, check, also)])[0]


def _need_spare(volume: OpenHead) -> None:
    """Give the head a new spare segment if an aborted snapshot used its spare."""
    if volume.path.has_spare:
        return
    catalog = volume.store.catalog

    def register() -> SegmentRow:
        spare = replace_spare(catalog, volume.head)
        volume.share({spare.lock_byte: spare.id})
        return spare

    volume.path.set_spare(volume.store.change(register).id)
