"""Changes the size of a disk.

What must hold: the size that counts is the one in the head's map, which is durable on return; the catalog only shows it.
"""

from onionskin.base.lazy import logger
from onionskin.base.limits import VOLUME_BYTES_MAX
from onionskin.catalog import LayerRow
from onionskin.errors import StateError
from onionskin.storage.open_head import OpenHead

_log = logger(__name__)


def refuse_size(size_bytes: int) -> None:
    """Refuse a size that no disk can have."""
    if size_bytes < 1:
        raise ValueError("a volume has at least one byte; delete it if it is not needed")
    if size_bytes > VOLUME_BYTES_MAX:
        raise ValueError(f"a volume has at most {VOLUME_BYTES_MAX} bytes (64 TiB), not {size_bytes}")


def refuse_cut(name: str, before_bytes: int, size_bytes: int, *, force: bool) -> None:
    """Refuse a smaller size without `force`."""
    if size_bytes < before_bytes and not force:
        raise StateError(
            f"resize would cut {name!r} from {before_bytes} to {size_bytes} bytes and lose what lies behind; pass force if "
            "that is meant"
        )


def resize(volume: OpenHead, size_bytes: int, *, force: bool) -> None:
    """Grow or, with `force`, shrink the disk. See `Volume.resize`."""
    refuse_size(size_bytes)
    with volume.operation():
        refuse_cut(volume.name, volume.size_bytes, size_bytes, force=force)
        volume.path.resize(size_bytes)
        _note_size(volume)


def _note_size(volume: OpenHead) -> None:
    """Write the size to the catalog, so that lists can show it without opening the disk. The one in the map counts."""
    store = volume.store
    try:
        store.change(lambda: store.catalog.update(LayerRow, volume.head, size_bytes=volume.size_bytes))
    except OSError as error:
        _log.warning("%r: lists show the old size until the volume is closed: %s", volume, error)
