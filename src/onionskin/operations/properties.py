"""Changes what a volume was made with, its wipe policy, and what a store makes volumes with for which nothing is said.

What must hold for a volume: its lock is held, so that no data path goes on with what was before. A stricter policy holds
for all that the volume holds, also for what waits to be freed; a laxer one for what is written from then on.
"""

from onionskin.catalog import Defaults, LayerRow, VolumeRow, WorkRow
from onionskin.operations.space import own_layers
from onionskin.storage.open_store import OpenStore


def set_wipe(store: OpenStore, volume: VolumeRow, wipe: str) -> None:
    """Change the policy of a volume whose lock is held, so that nobody else changes its head. See `Store.set_wipe`."""
    catalog = store.catalog

    def change() -> None:
        catalog.update(LayerRow, volume.head, wipe=wipe)
        if wipe != "zero":
            return
        own = own_layers(catalog, volume)
        for layer in own:
            catalog.update(LayerRow, layer.id, wipe=wipe)
        segments = [segment.id for rows in catalog.segments_of(own).values() for segment in rows]
        for work in catalog.slot_work_of(segments):
            catalog.update(WorkRow, work.id, wipe=wipe)

    store.change(change)


def with_defaults(store: OpenStore, block_size: int | None, wipe: str | None) -> tuple[int, str]:
    """Return the block size and the wipe policy of a volume that is to be made: those that were said, or the store's."""
    if block_size is not None and wipe is not None:
        return block_size, wipe
    defaults = store.catalog.defaults()
    return (
        defaults.block_size if block_size is None else block_size,
        defaults.wipe if wipe is None else wipe,
    )


def set_defaults(store: OpenStore, wipe: str | None, block_size: int | None) -> Defaults:
    """Change the defaults of a store where a value is given, and return all of them. See `Store.set_defaults`."""
    catalog = store.catalog

    def change() -> Defaults:
        old = catalog.defaults()
        new = Defaults(old.wipe if wipe is None else wipe, old.block_size if block_size is None else block_size)
        catalog.set_defaults(new)
        return new

    return store.change(change)
