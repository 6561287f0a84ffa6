"""Sealing a head: what was written until then is a layer that never changes again, and writers go on in a new head.

What must hold: what is sealed is durable before the transaction that makes it a layer and the new head the volume's; the
data path goes on with the head that the catalog has, whatever was raised between; writers go on during all but the swap
of the heads. No data is synced inside the transaction: a slow disk under one volume holds no other one up.

A seal has two parts, so that several heads can be sealed in one transaction: `begin_seal`, in whose block the rows are
written, and `Sealing.finish` behind it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onionskin.catalog import LayerRow, SegmentRow, VolumeRow, new_id
from onionskin.operations import reclaim
from onionskin.storage.chain import NewHead, replace_spare
from onionskin.storage.open_head import OpenHead, if_begun

if TYPE_CHECKING:
    from onionskin.kernels._volume import Sealed


@dataclass(frozen=True, slots=True)
class NextHead:
    """What is new after a seal: the head, its spare, and the lock bytes of the head's map and of the spare."""

    head: bytes
    spare: bytes
    map_byte: int
    spare_byte: int


class Sealing:
    """A seal that was begun: the data path has its new head, and waits to be told whether that is the volume's.

    Made by `begin_seal`.
    """

    def __init__(self, volume: OpenHead, spare: SegmentRow, sealed: "Sealed") -> None:
        self._volume = volume
        self._spare = spare  # what the next head begins with; its id is the id of that head's map too
        self._sealed = sealed
        # Slots that the last flush of this head freed in segments it had inherited: the new head never asks.
        self.to_reclaim: list[bytes] = volume.path.reclaim_wanted()
        self.next_head: NextHead | None = None
        self._unused: set[int] = set()

    def write_rows(self, also: Callable[[LayerRow, LayerRow], None]) -> LayerRow:
        """Write the sealed layer and the new head, and return the sealed layer. Inside a transaction, which may run twice.

        `also` is called with the rows of the sealed layer and of the new head.
        """
        self.next_head, self._unused = None, set()
        volume, catalog = self._volume, self._volume.store.catalog
        # The size as the map has it: a crash behind a resize may have left the row with the old one.
        old = catalog.layer(volume.head)._replace(size_bytes=self._sealed.size_bytes)
        # Its id is the spare's: so the catalog names the file before there is such a layer, if it is made beforehand.
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
        """Write the new head, which begins with the old one's spare, and make it the volume's."""
        catalog = self._volume.store.catalog
        catalog.insert(layer)
        catalog.update(SegmentRow, self._spare.id, role="own", layer=layer.id)
        catalog.insert(SegmentRow(new.spare, layer.id, "spare", 0, new.spare_byte))
        catalog.update(VolumeRow, self._volume.row.id, head=layer.id)

    def _write_sealed(self, old: LayerRow) -> LayerRow:
        """Write how the files of the old head are now, note the lock bytes of those made for nothing, and return its row."""
        catalog, sealed = self._volume.store.catalog, self._sealed
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
        """Remove the row of a segment without slots. If it has a file, that becomes pending work."""
        store = self._volume.store
        row = store.catalog.segment_with_id(id)
        if row is None:
            return
        if store.layout.segment_file(id).exists():
            store.catalog.add_work("segment", id, row.lock_byte, wipe)
            self._unused.add(row.lock_byte)
        store.catalog.remove_segment(id)

    def go_on(self) -> None:
        """Tell the data path that the new head is the volume's."""
        assert self.next_head is not None
        self._volume.head = self.next_head.head
        spare = self.next_head.spare
        if_begun(lambda: self._volume.path.seal_commit(spare))

    def finish(self) -> None:
        """Give up files that were made for nothing, and free what is to be freed. Once the data path was told."""
        self._volume.locks.drop_shared(self._unused)
        if self.to_reclaim or self._unused:
            reclaim.work_soon(self._volume.store)
        self._volume.note_seal()


@contextmanager
def begin_seal(volume: OpenHead) -> Iterator[Sealing]:
    """Make durable what was written, and swap the heads; in the block one transaction calls `Sealing.write_rows`.

    At the end of the block the data path is told which head goes on: the new one, or, where the catalog does not have
    that, the old one. In an operation of the volume. Behind the block, `Sealing.finish` is called.
    """
    _need_spare(volume)
    spare = volume.store.catalog.spare_of(volume.head)
    begun: list[Sealing] = []
    try:
        with volume.resolving(lambda: _resolve(volume, begun), lambda: begun[0].go_on()):
            map_path = str(volume.store.layout.map_file(spare.id))
            begun.append(Sealing(volume, spare, volume.path.seal(map_path=map_path, map_id=spare.id)))
            yield begun[0]
    except BaseException:
        if begun and begun[0].to_reclaim and not volume.path.closed:
            volume.path.want_reclaim(begun[0].to_reclaim)
        raise


def _resolve(volume: OpenHead, begun: list[Sealing]) -> None:
    """Go on with the new head if the catalog has it, with the old one if not."""
    new = begun[0].next_head if begun else None
    if new is None or volume.path.poisoned or volume.store.catalog.head_of(volume.row) != new.head:
        if_begun(volume.path.seal_abort)
    else:
        begun[0].go_on()


def seal(
    volume: OpenHead,
    *,
    check: Callable[[], None] = lambda: None,
    also: Callable[[LayerRow, LayerRow], None] = lambda sealed, head: None,
) -> LayerRow:
    """Seal the head and go on in a new one. Returns the sealed layer. In an operation of the volume.

    `also` runs in the same transaction, with the rows of the sealed layer and of the new head.
    `check` is asked before anything happens, and again inside the transaction.
    """
    check()

    def write_rows() -> LayerRow:
        check()
        return sealing.write_rows(also)

    with begin_seal(volume) as sealing:
        row = volume.store.change(write_rows)
    sealing.finish()
    return row


def _need_spare(volume: OpenHead) -> None:
    """Register a spare segment where an aborted snapshot used it up."""
    if volume.path.has_spare:
        return
    catalog = volume.store.catalog

    def register() -> SegmentRow:
        spare = replace_spare(catalog, volume.head)
        volume.share({spare.lock_byte: spare.id})
        return spare

    volume.path.set_spare(volume.store.change(register).id)
