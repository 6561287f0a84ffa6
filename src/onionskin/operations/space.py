"""What volumes take on the disk: found from the sizes of files, and no map is read.

What must hold: of a whole store nothing is asked once for each volume, layer or segment, as in listing.py. What counts is
what the segments take on the disk without their headers, so what was freed and could not be given back yet is among it.

A layer with a name counts to the volume that the snapshot is of, also where clones stand on it; one without a name to the
volume of what stands on it, and to none if that is more than one.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import islice

from onionskin.base.limits import HEADER_BYTES
from onionskin.base.named_tuples import NamedTuple
from onionskin.base.paths import FilePath
from onionskin.catalog import Catalog, LayerRow, VolumeRow
from onionskin.storage.layout import allocated_bytes, allocated_files, listed
from onionskin.storage.open_store import OpenStore

_NOBODY = b""  # the id of no volume
_FILES_QUICK = 20_000  # to look at so many takes 0.3 s


class Space(NamedTuple):
    """What a volume takes."""

    used_bytes: int  # what it and its snapshots hold
    written_bytes: int  # what of that was written since its last snapshot


class _Owners:
    """Tells which volume each layer counts to, among those that have a name or have children."""

    def __init__(self, named: Mapping[bytes, bytes], parents: Mapping[bytes, bytes | None]) -> None:
        """Begin with names: `named` has the volume of each, by its layer. `parents` has the layers that are looked at."""
        self._parents = parents
        self._named = named
        self._of = dict(named)
        for layer, volume in named.items():
            self.note_user(parents.get(layer), volume)

    def note_user(self, layer: bytes | None, volume: bytes) -> None:
        """Note that something of a volume stands on a layer."""
        while layer is not None and layer not in self._named:
            owner = self._of.get(layer)
            if owner in (volume, _NOBODY):
                return
            # One volume, then nobody: so this ends, also where the layers of a damaged catalog stand in a circle.
            self._of[layer] = volume if owner is None else _NOBODY
            layer = self._parents.get(layer)

    def of(self, layer: bytes) -> bytes:
        """Return the volume that a layer counts to."""
        return self._of.get(layer, _NOBODY)

    def written_below(self, held: Mapping[bytes, int], layer: bytes | None, volume: bytes) -> int:
        """Return what the layers without a name hold that count to a volume, from one layer downwards."""
        written = 0
        seen: set[bytes] = set()
        while layer is not None and layer not in self._named and layer not in seen and self.of(layer) == volume:
            written += held.get(layer, 0)
            seen.add(layer)
            layer = self._parents.get(layer)
        return written


# ---- of all volumes ----


def is_quick(store: OpenStore) -> bool:
    """Whether a store has so few files that nobody minds looking at all of them."""
    with listed(store.layout.segments) as entries:
        return sum(1 for _ in islice(entries, _FILES_QUICK + 1)) <= _FILES_QUICK


class SpaceOfAll:
    """What each volume of a store takes. Inside `reading`, as long as it is asked."""

    def __init__(self, store: OpenStore, parents: Mapping[bytes, bytes | None]) -> None:
        """Look at the files, and at whose each layer is. `parents` has each layer that another one stands on."""
        catalog = store.catalog
        self._held = _held_by_layers(store)
        self._owners = _Owners(catalog.volumes_of_names(), parents)
        for layer, least, greatest in catalog.volumes_over_layers():
            self._owners.note_user(layer, least)
            self._owners.note_user(layer, greatest)
        self._used: dict[bytes, int] = {}
        for layer, data_bytes in self._held.items():
            owner = self._owners.of(layer)  # nobody for a head
            self._used[owner] = self._used.get(owner, 0) + data_bytes

    def of(self, volume: bytes, head: bytes, parent: bytes | None) -> Space:
        """Return what a volume takes, given its head and what that stands on."""
        of_head = self._held.get(head, 0)
        below = self._owners.written_below(self._held, parent, volume)
        return Space(self._used.get(volume, 0) + of_head, of_head + below)


def _held_by_layers(store: OpenStore) -> dict[bytes, int]:
    """Return the bytes of data that each layer holds. Of layers that never got a file nothing is asked."""
    files = _segment_files(store.layout.segments)
    held: dict[bytes, int] = {}
    for id, layer in store.catalog.layers_of_segments(files):
        held[layer] = held.get(layer, 0) + files[id]
    return held


def _segment_files(directory: FilePath) -> dict[bytes, int]:
    """Return the bytes of data that each segment takes; those without any are left out."""
    return {id: taken - HEADER_BYTES for id, taken in allocated_files(directory, ".seg") if taken > HEADER_BYTES}


# ---- of one volume ----


def space_of(store: OpenStore, volume: VolumeRow) -> Space:
    """Return what one volume takes. Inside `reading`."""
    own, owners = _own_layers(store.catalog, volume)
    held = bytes_of_layers(store, own)
    of_head = held.get(volume.head, 0)
    below = next((layer.parent for layer in own if layer.id == volume.head), None)
    return Space(sum(held.values()), of_head + owners.written_below(held, below, volume.id))


def own_layers(catalog: Catalog, volume: VolumeRow) -> list[LayerRow]:
    """Return the layers that count to one volume, its head among them, in no order. Inside `reading`."""
    return _own_layers(catalog, volume)[0]


def _own_layers(catalog: Catalog, volume: VolumeRow) -> tuple[list[LayerRow], _Owners]:
    layers = {layer.id: layer for layer in catalog.layers_of_volume(volume.id)}
    parents = {layer.id: layer.parent for layer in layers.values()}
    owners = _Owners({row.layer: row.volume for row in catalog.snapshots_of_layers(parents)}, parents)
    for fork in catalog.forks_of_volume(volume.id):
        owners.note_user(fork, _NOBODY)
    owners.note_user(parents.get(volume.head), volume.id)
    return [layer for id, layer in layers.items() if id == volume.head or owners.of(id) == volume.id], owners


def bytes_of_layers(store: OpenStore, layers: Sequence[LayerRow]) -> dict[bytes, int]:
    """Return the bytes of data that each of some layers holds. Inside `reading`."""
    return {
        id: sum(_bytes_of(store.layout.segment_path(row.id)) for row in rows)
        for id, rows in store.catalog.segments_of(list(layers)).items()
    }


def _bytes_of(segment_path: str) -> int:
    try:
        return max(allocated_bytes(os.stat(segment_path)) - HEADER_BYTES, 0)  # noqa: PTH116 - of ten thousand
    except FileNotFoundError:  # nothing was written to it yet
        return 0
