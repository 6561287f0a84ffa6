"""What a process that died left of a volume, and who has the volume open: asked before maps are believed or changed."""

from onionskin.errors import StateError
from onionskin.storage.locks import VolumeLock, refuse_file_held, volume_holder
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore


def refuse_open(store: OpenStore, name: str) -> None:
    """Raise what an opening for writing would raise, if somebody has the volume open, or no lock can be where its lock is."""
    id = store.catalog.volume(name).id
    lock = VolumeLock(store.layout, id, name)
    try:
        refuse_file_held(store.layout, id, name)
    finally:
        lock.close()


def refuse_unflushed(store: OpenStore, volume: bytes, name: str) -> None:
    """Raise StateError if a process that died left unflushed writes, which are not in the head's map yet."""
    if has_unflushed(store, volume):
        raise StateError(
            f"a process that died left writes to volume {name!r} unflushed, so its map does not say yet what changed; open "
            "it for writing and close it, which makes them durable"
        )


def refuse_left_unflushed(store: OpenStore, name: str) -> None:
    """Do what `refuse_unflushed` does, unless somebody has the volume open: then a flush is still to come."""
    id = store.catalog.volume(name).id
    lock = store.layout.volume_lock(id)
    # The holder is asked for before and after: a writer that opens the volume in between has not died.
    if volume_holder(lock) is None and has_unflushed(store, id) and volume_holder(lock) is None:
        refuse_unflushed(store, id, name)


def has_unflushed(store: OpenStore, volume: bytes) -> bool:
    """Whether a process that died left data of the volume that is not in the head's map yet."""
    if any(isinstance(handle, OpenHead) and handle.row.id == volume for handle in store.open_handles()):
        return False  # the volume is open here, and the caller flushes it
    try:
        return store.layout.dirty_file(volume).stat().st_size > 0
    except FileNotFoundError:
        return False
