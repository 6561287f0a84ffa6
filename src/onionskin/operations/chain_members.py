"""What a disk stands on: its layers, top first, and the base below them, with names.

What must hold: all is read in one state of the catalog. No map is read, and nothing is opened.
"""

import stat
from datetime import datetime
from typing import TYPE_CHECKING

from onionskin.base.paths import FilePath
from onionskin.base.records import record
from onionskin.catalog import BaseRow, Catalog, LayerRow
from onionskin.catalog.tree import find_snapshot, when
from onionskin.operations.space import bytes_of_layers
from onionskin.storage.block_maps import read_layers
from onionskin.storage.chain import Chain
from onionskin.storage.layout import allocated_bytes
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from typing import Literal

    from onionskin.base.annotations import LayerKind


@record
class ChainMember:
    """One layer of a chain, or the base below it.

    Attributes
    ----------
    kind : str
        `head`, `snapshot`, `layer` (without a name) or `base`.
    name : str
        As in `Store.tree`: `web` for a head, `web@clean` for a snapshot, the path of a base.
    created : datetime.datetime or None
        In UTC: when the snapshot was taken, or the layer made. None for a base.
    """

    kind: "LayerKind"
    name: str
    created: datetime | None


@record
class ChainLayer:
    """One layer of a chain, or the base below it, and what it holds.

    Attributes
    ----------
    kind : str
        As that of `ChainMember`, and so are the next two.
    name : str
    created : datetime.datetime or None
    size_bytes : int
        Size of the disk in that layer; of a base that of its file when the volume was made, or when it was last merged
        into.
    bytes_held : int or None
        What its data takes on the disk. None: the base is gone.
    format : str or None
        "raw" of a base; None of a layer, which is in the store's own format.
    """

    kind: "LayerKind"
    name: str
    created: datetime | None
    size_bytes: int
    bytes_held: int | None
    format: "Literal['raw'] | None"


def chain_members(catalog: Catalog, chain: Chain) -> tuple[ChainMember, ...]:
    """Describe the chain, top first. Inside `reading`."""
    top = chain.top.id
    named = {row.layer: row for row in catalog.snapshots_in_chain(top)}
    ids = {row.volume for row in named.values()}
    head = catalog.volume_with_head(top)
    volumes = {id: row.name for id in ids if (row := catalog.volume_with_id(id))}

    def describe(layer: LayerRow) -> ChainMember:
        if layer.id in named:
            row = named[layer.id]
            name = volumes.get(row.volume, row.volume.hex())  # it has no row in a damaged catalog
            return ChainMember("snapshot", f"{name}@{row.name}", when(row.created_ns))
        if head and head.head == layer.id:
            return ChainMember("head", head.name, when(layer.created_ns))
        return ChainMember("layer", layer.id.hex()[:8], when(layer.created_ns))

    layers = [describe(layer) for layer in reversed(chain.layers)]
    return (*layers, *([ChainMember("base", chain.base.path, None)] if chain.base else []))


def chain_of(store: OpenStore, name: str, snapshot: str | None) -> list[ChainLayer]:
    """Return what a head or a snapshot stands on, top first."""
    catalog = store.catalog
    with catalog.reading():
        volume = catalog.volume(name)
        top = volume.head if snapshot is None else find_snapshot(catalog, volume, snapshot).layer
        chain = read_layers(catalog, top)
        members = chain_members(catalog, chain)
        held = bytes_of_layers(store, chain.layers)
    found = [
        ChainLayer(member.kind, member.name, member.created, layer.size_bytes, held[layer.id], None)
        for member, layer in zip(members, reversed(chain.layers), strict=False)
    ]
    if chain.base:
        found.append(
            ChainLayer("base", chain.base.path, None, chain.base.size_bytes, _bytes_of_base(chain.base), "raw")
        )
    return found


def _bytes_of_base(base: BaseRow) -> int | None:
    try:
        found = FilePath(base.path).stat()
        return base.size_bytes if stat.S_ISBLK(found.st_mode) else allocated_bytes(found)
    except OSError:
        return None
