"""Sealing a head: the head becomes a layer that never changes again, and writers go on in a new head.

What must hold: the sealed data is durable before the transaction that makes it a sealed layer and gives the volume its
new head. Whatever error is raised, the data path goes on with the head that the catalog has. Writers go on all the
time, except while the heads are swapped. No data is synced inside the transaction, so a slow disk under one volume does
not delay others.

A seal has two parts, so that several heads can be sealed in one transaction. The rows are written in the with block of
`begin_seals`, and `Sealing.finish` is called after the block. Heads that are sealed together are cut at one instant: all
seals are begun, then the writers of all are held while all heads are swapped, in one call of the data path. Nobody waits
for the disk meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onionskin.catalog import LayerRow, SegmentRow, VolumeRow, new_id
from onionskin.errors import StateError
from onionskin.kernels._volume import cut_heads
from onionskin.operations import reclaim
from onionskin.storage.chain import NewHead, replace_spare
from onionskin.storage.open_head import OpenHead, if_begun

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
        self._unused: set[int] = set()

    def begin(self) -> None:
        """Make durable most of what was written, with writers at work."""
        spare = self._spare.id
        self.volume.path.seal_begin(map_path=str(self.volume.store.layout.map_file(spare)), map_id=spare)

    def sync(self) -> None:
        """Make durable what was written between that and the cut."""
        self._sealed = self.volume.path.seal_sync()
        # The last flush of this head may have freed slots in inherited segments. The new head does not know of them.
        self.to_reclaim = self.volume.path.reclaim_wanted()

    def write_rows(self, also: Also) -> LayerRow:
        """Write the rows of the sealed layer and the new head, and return the sealed layer.

        This is called inside a transaction, which may run twice. `also` is called with the rows of the sealed layer and
        of the new head.
        """
        self.next_head, self._unused = None, set()
        volume, catalog = self.volume, self.volume.store.catalog
        assert self._sealed is not None
        # The size comes from the map, because a crash after a resize may have left the old size in the row.
        old = catalog.layer(volume.head)._replace(size_bytes=self._sealed.size_bytes)
        # The map has the id of the spare. So if the map is made beforehand, the catalog names it before the head
        # exists.
        head = NewHead.on(
            old,
            base=None,
            block_size=volume.block_size,
            wipe=volume.wipe,
            size_bytes=old.size_bytes,
            map_id=self._spare.id,
        )
        self.next_head = new = NextHead(head.layer.id, new_id(), *catalog.take_lock_bytes(2))
        layer = head.layer._replace(map_lock_byte=new.map_byte)
        self._write_next_head(layer, new)
        reclaim.add_slot_work(volume.store, self.to_reclaim, volume.wipe)
        row = self._write_sealed(old)
        also(row, layer)
        volume.share({new.spare_byte: new.spare}, new.map_byte)
        return row

    def _write_next_head(self, layer: LayerRow, new: NextHead) -> None:
        """Write the row of the new head, make the old head's spare its segment, and give it to the volume."""
        catalog = self.volume.store.catalog
        catalog.insert(layer)
        catalog.update(SegmentRow, self._spare.id, role="own", layer=layer.id)
        catalog.insert(SegmentRow(new.spare, layer.id, "spare", 0, new.spare_byte))
        catalog.update(VolumeRow, self.volume.row.id, head=layer.id)

    def _write_sealed(self, old: LayerRow) -> LayerRow:
        """Write the rows of the layer that was sealed and of its segments, and return the row of the layer.

        Segments without slots are dropped.
        """
        catalog, sealed = self.volume.store.catalog, self._sealed
        assert sealed is not None
        what: dict[str, Any] = {
            "sealed": 1,
            "size_bytes": sealed.size_bytes,
            "map_length": sealed.map_length,
            "map_frames": sealed.map_frames,
            "map_crc": sealed.map_crc,
        }
        catalog.update(LayerRow, old.id, **what)
        for id, slots in sealed.segments:
            if slots:
                catalog.update(SegmentRow, id, role="sealed", slots=slots)
            else:
                self._drop_empty_segment(id, old.wipe)
        return old._replace(**what)

    def _drop_empty_segment(self, id: bytes, wipe: str) -> None:
        """Remove the row of a segment without slots. If it has a file, the file becomes pending work."""
        store = self.volume.store
        row = store.catalog.segment_with_id(id)
        if row is None:
            return
        if store.layout.segment_file(id).exists():
            store.catalog.add_work("segment", id, row.lock_byte, wipe)
            self._unused.add(row.lock_byte)
        store.catalog.remove_segment(id)

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
        self.volume.locks.drop_shared(self._unused)
        if self.to_reclaim or self._unused:
            reclaim.work_soon(self.volume.store)
        self.volume.note_seal()


@contextmanager
def begin_seals(volumes: Sequence[OpenHead]) -> Iterator[list[Sealing]]:
    """Cut heads at one instant, and make durable what was written; in the block one transaction calls each `write_rows`.

    At the end of the block each data path is told which head goes on: the new one, or, where the catalog does not have
    that, the old one. In an operation of each volume. Behind the block, `Sealing.finish` is called.
    """
    sealings = [Sealing(volume) for volume in volumes]
    try:
        with ExitStack() as stack:
            for sealing in sealings:
                stack.enter_context(sealing.volume.resolving(sealing.resolve, sealing.go_on))
            with _side_by_side(sealings) as run:
                run(Sealing.begin)
                cut_heads([volume.path for volume in volumes], [volume.row.name for volume in volumes])
                run(Sealing.sync)
            yield sealings
    except BaseException:
        for sealing in sealings:
            sealing.give_back_reclaims()
        raise


@contextmanager
def _side_by_side(sealings: list[Sealing]) -> Iterator[Callable[[Callable[[Sealing], None]], None]]:
    """Give what runs a step of each seal, at the same time: each waits for the disk. It raises when all have ended."""
    if len(sealings) == 1:
        yield lambda step: step(sealings[0])
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


def seal_together(parts: Sequence[tuple[OpenHead, Check, Also]]) -> list[LayerRow]:
    """Seal heads at one instant and in one transaction, and go on in new ones. Returns the sealed layers.

    In an operation of each volume. Each volume comes with its `check` and `also`, as for `seal`.
    """
    for _, check, _ in parts:
        check()

    def write_rows() -> list[LayerRow]:
        for _, check, _ in parts:
            check()
        return [sealing.write_rows(also) for sealing, (_, _, also) in zip(sealings, parts, strict=True)]

    with begin_seals([volume for volume, _, _ in parts]) as sealings:
        rows = parts[0][0].store.change(write_rows)
    with ExitStack() as finishing:  # an error of one keeps the others from nothing
        for sealing in sealings:
            finishing.callback(sealing.finish)
    return rows


def seal(volume: OpenHead, *, check: Check = lambda: None, also: Also = lambda sealed, head: None) -> LayerRow:
    """Seal the head and go on in a new one. Returns the sealed layer. The caller is in an operation of the volume.

    `check` is called before anything happens, and again inside the transaction. `also` is called in the same
    transaction, with the rows of the sealed layer and of the new head.
    """
    return seal_together([(volume, check, also)])[0]


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
