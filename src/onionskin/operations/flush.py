"""Making durable what was written to a head, and what is to be done after that.

What must hold: a flush returns only when all that was written before the call is durable; what it freed in segments that
the head adopted is noted, so that it is freed on the medium; a map that is mostly dead is written anew by the flush
that finds no operation under way, and by the end of the opening.
"""

import logging
from contextlib import suppress

from onionskin.catalog import LayerRow
from onionskin.errors import OnionskinError
from onionskin.operations import reclaim
from onionskin.operations.new_map import compact
from onionskin.storage.open_head import OpenDisk, OpenHead

_log = logging.getLogger(__name__)

DEAD_RATIO_AT_CLOSE = 0.5


def flush(volume: OpenDisk) -> None:
    """Make everything that was written before the call durable. See `Volume.flush`."""
    head = volume if isinstance(volume, OpenHead) else None
    if head:
        head.settle_what_is_left()
    volume.store.reserve.retry(lambda: volume.on_path(lambda path: path.flush()))
    if head:
        scrub_freed(head)
        compact_if_wanted(head)


def scrub_freed(volume: OpenHead) -> None:
    """Free on the medium what durable frames freed in adopted segments: after flushes that did not go through here."""
    path = volume.path
    volume.store.note_unreachable(path.take_unreachable())
    wanted = path.scrub_wanted()
    if not wanted:
        return
    try:
        reclaim.scrub(volume.store, wanted, volume.wipe)
    except BaseException:
        path.want_scrub(wanted)  # a wish is over when it is recorded
        raise


def compact_if_wanted(volume: OpenHead) -> None:
    """Write the head's map log anew where most of it is dead: after flushes, also those that did not go through here.

    Where an operation is under way a later flush asks again.
    """
    if not volume.path.wants_compaction():
        return
    try:
        volume.if_idle(lambda: compact(volume))
    except (OSError, OnionskinError) as error:
        if volume.path.poisoned:
            raise
        _log.warning("%r: its map could not be written anew, and goes on as it is: %s", volume, error)


def finish(volume: OpenHead) -> None:
    """Make durable what was written to a head that is being closed, and leave it as the next opening likes it."""
    flush(volume)
    if volume.path.map_dead_ratio() > DEAD_RATIO_AT_CLOSE:
        compact(volume)
    _note_close(volume)
    reclaim.work_soon(volume.store)
    volume.store.finish_work()


def _note_close(volume: OpenHead) -> None:
    """Write down what the head's log durably holds: from then on, a map that holds less is damaged, not new.

    An opening that changed nothing writes nothing.
    """
    catalog = volume.store.catalog
    length, frames, crc = volume.path.log_state()
    now = {"map_length": length, "map_frames": frames, "map_crc": crc, "size_bytes": volume.size_bytes}
    row = catalog.layer(volume.head)
    if frames and any(getattr(row, column) != value for column, value in now.items()):
        with suppress(OSError):  # a full disk: then the next opening knows no more than this one did
            volume.store.change(lambda: catalog.update(LayerRow, volume.head, **now))
