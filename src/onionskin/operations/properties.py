"""Changes what a volume was made with, its wipe policy, and what a store makes volumes with for which nothing is said.

What must hold for a volume: its lock is held, so that no data path goes on with what was before. A stricter policy holds
for all that the volume holds, also for what waits to be freed; a laxer one for what is written from then on.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from onionskin.base.durations import end_of
from onionskin.base.naming import refuse_no_mapping
from onionskin.catalog import Defaults, LayerRow, VolumeRow, WorkRow
from onionskin.operations.ownership import refuse_owned
from onionskin.operations.space import own_layers
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.base.annotations import WipePolicy


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


def set_lifetime(store: OpenStore, volume: str, lifetime_ns: int | None) -> None:
    """Have a volume expire a time from now, or never. See `Store.set_lifetime`."""
    catalog = store.catalog

    def change() -> None:
        row = catalog.volume(volume)
        refuse_owned(catalog, [row.id], "given a lifetime", "machines have lifetimes of their own")
        catalog.update(
            VolumeRow, row.id, expires_ns=None if lifetime_ns is None else end_of(time.time_ns(), lifetime_ns)
        )

    store.change(change)


def set_labels(store: OpenStore, volume: str, labels: Mapping[str, str | None]) -> dict[str, str]:
    """Put labels on a volume and take others away, and return those that it has then. See `Store.set_labels`."""
    from onionskin.operations.forks import check_labels  # imported late: making a volume does not need it

    catalog = store.catalog
    refuse_no_mapping(labels)
    check_labels({key: "" if value is None else value for key, value in labels.items()})

    def change() -> dict[str, str]:
        row = catalog.volume(volume)
        refuse_owned(catalog, [row.id], "labelled", "machines have labels of their own")
        found = {key: value for key, value in {**catalog.labels_of(row.id), **labels}.items() if value is not None}
        catalog.set_labels(row.id, check_labels(found))
        return found

    return store.change(change)


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
        chosen = old.wipe if wipe is None else cast("WipePolicy", wipe)  # the catalog refuses any other
        new = Defaults(chosen, old.block_size if block_size is None else block_size)
        catalog.set_defaults(new)
        return new

    return store.change(change)
