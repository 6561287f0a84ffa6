"""Makes durable what was written to a head, and does what follows from that.

What must hold: a flush returns only when everything that was written before the call is durable. Slots that it freed in
inherited segments are noted, so that they are freed on the medium. A map log that is mostly dead is written anew by a
flush while no operation is under way, and when the volume is closed.
"""

from contextlib import suppress

from onionskin.base.lazy import logger
from onionskin.catalog import LayerRow
from onionskin.errors import OnionskinError
from onionskin.operations import reclaim
from onionskin.operations.new_map import compact_map
from onionskin.storage.open_head import OpenDisk, OpenHead

_log = logger(__name__)

DEAD_RATIO_AT_CLOSE = 0.5


def flush(volume: OpenDisk) -> None:
    """Make everything that was written before the call durable. See `Volume.flush`."""
    head = volume if isinstance(volume, OpenHead) else None
    if head and head.is_unwritten:
        return  # a write that was answered would have opened it
    if head:
        head.resolve_what_is_left()
    volume.store.reserve.retry(lambda: volume.on_path(lambda path: path.flush()))
    if head:
        reclaim_freed(head)
        compact_map_if_wanted(head)


def reclaim_freed(volume: OpenHead) -> None:
    """Free on the medium the slots of inherited segments that a flush freed. The server calls this after its own flushes."""
    if volume.is_unwritten:
        return  # nothing was freed, and to ask its path would open the head
    path = volume.path
    volume.store.note_unwipeable(path.take_unwipeable())
    wanted = path.reclaim_wanted()
    if not wanted:
        return
    try:
        reclaim.reclaim_slots(volume.store, wanted, volume.wipe)
    except BaseException:
        path.want_reclaim(wanted)  # they are forgotten only once they are recorded
        raise


def compact_map_if_wanted(volume: OpenHead) -> None:
    """Write the head's map log anew if most of it is dead. The server calls this after its own flushes.

    If an operation is under way, a later flush asks again.
    """
    if volume.is_unwritten or not volume.on_path(lambda path: path.wants_compaction()):
        return
    try:
        volume.if_idle(lambda: compact_map(volume))
    except (OSError, OnionskinError) as error:
        if volume.path.poisoned:
            raise
        _log.warning("%r: its map log could not be written anew; the old one stays in use: %s", volume, error)


def finish(volume: OpenHead) -> None:
    """Make durable what was written to a head that is being closed, and leave it so that the next opening is fast."""
    flush(volume)
    if volume.path.map_dead_ratio() > DEAD_RATIO_AT_CLOSE:
        compact_map(volume)
    _note_close(volume)
    reclaim.work_soon(volume.store)
    volume.store.finish_work()


def _note_close(volume: OpenHead) -> None:
    """Write to the catalog how much the head's log durably holds. A map that holds less later is damaged, not new.

    An opening that changed nothing writes nothing.
    """
    catalog = volume.store.catalog
    length, frames, crc = volume.path.log_state()
    now = {"map_length": length, "map_frames": frames, "map_crc": crc, "size_bytes": volume.size_bytes}
    row = catalog.layer(volume.head)
    if frames and any(getattr(row, column) != value for column, value in now.items()):
        with suppress(OSError):  # the disk is full: then the next opening knows only what this one knew
            volume.store.change(lambda: catalog.update(LayerRow, volume.head, **now))
