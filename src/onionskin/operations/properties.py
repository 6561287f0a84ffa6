"""Changes what a volume was made with: its wipe policy.

What must hold: the volume's lock is held, so that no data path goes on with what was before. A stricter policy holds for all
that the volume holds, also for what waits to be freed; a laxer one for what is written from then on.
"""

from onionskin.catalog import LayerRow, VolumeRow, WorkRow
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
