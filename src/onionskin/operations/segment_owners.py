"""Whose a segment is by the maps: asked before all that it holds is freed, because its owner's map names none of it.

Each segment has one owner, which the catalog says. Where that is wrong, no block of the segment is in the map of the layer
that its row names, so all of it would seem to be free. Files say nothing of their owners; but the map of the true one
names it.

What must hold: only what an opening finds is asked about. What an operation of this process moved or hid, it knows itself. A
segment without data is not asked about either, so a look at all maps follows a crash, or damage.
"""

import os
from collections.abc import Iterable
from contextlib import closing
from errno import EIO, ENXIO

from onionskin.base.files import CANNOT_LOOK
from onionskin.base.lazy import logger
from onionskin.base.limits import HEADER_BYTES
from onionskin.catalog import SegmentRow
from onionskin.catalog.sqlite_errors import damaged
from onionskin.errors import FormatError, OnionskinError
from onionskin.storage.block_maps import open_map
from onionskin.storage.open_store import OpenStore

_log = logger(__name__)


def refuse_of_another(store: OpenStore, segment: SegmentRow) -> None:
    """Raise FormatError where the map of another layer names a segment that holds data, and that its owner's map does not."""
    if segment.id in store.doubted_segments or (_has_data(store, segment.id) and _is_named_by_another(store, segment)):
        store.doubted_segments.add(segment.id)
        raise damaged(
            store.catalog.path,
            f"the row {segment.id.hex()} of segments says that it is layer {segment.layer.hex()}'s, and the map of another "
            "layer names it; nothing of it is freed",
        )


def without_others(store: OpenStore, segments: Iterable[SegmentRow]) -> list[bytes]:
    """Return the ids of those of the segments that may be of the layers that they are said to be of; log which are not."""
    found = []
    for row in segments:
        try:
            refuse_of_another(store, row)
        except FormatError as error:
            _log.warning("%s", error)
        else:
            found.append(row.id)
    return found


def _has_data(store: OpenStore, segment: bytes) -> bool:
    try:
        descriptor = os.open(
            store.layout.segment_path(segment), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
    except OSError as error:
        if error.errno in CANNOT_LOOK - {EIO}:
            raise
        return False  # then nothing can be freed in it either
    try:
        os.lseek(descriptor, HEADER_BYTES, os.SEEK_DATA)
    except OSError as error:
        return error.errno != ENXIO
    finally:
        os.close(descriptor)
    return True


def _is_named_by_another(store: OpenStore, segment: SegmentRow) -> bool:
    """Whether the map of any layer but the owner has a block in a segment. A map that cannot be read names none."""
    for id in store.catalog.layers_with_maps():
        if id == segment.layer:
            continue
        try:
            layer = store.catalog.layer_with_id(id)
            if layer is None:
                continue
            with closing(open_map(store, layer)) as layer_map:
                if segment.id in layer_map.segment_use():
                    return True
        except (OnionskinError, OSError):  # it may have been folded meanwhile; `check` reports what is damaged
            continue
    return False
