"""Lists of what a store has: its volumes and its tree. Each is made in one pass over the rows of one catalog state.

What must hold: there is no query of the catalog for each volume, layer or segment, and no look-up of a file that need
not exist, because a store may have a hundred thousand of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, cast

from onionskin.base.naming import refuse_no_mapping
from onionskin.base.records import field, record
from onionskin.catalog import LayerRow, LineageRow, SegmentRow, SnapshotRow, VolumeRow
from onionskin.catalog.rows import STAGED_PREFIX
from onionskin.catalog.tree import when
from onionskin.errors import FormatError, StateError
from onionskin.operations import lineage
from onionskin.operations.lineage import Ancestor
from onionskin.operations.space import SpaceOfAll, space_of
from onionskin.storage.layout import listed
from onionskin.storage.locks import volume_holder
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.base.annotations import LayerKind, WipePolicy


@record
class VolumeInfo:
    """The description of a volume.

    `base` is the path of the base, or None. `holder` is the id of the process that has the volume open for writing.
    `used_bytes` is what the volume and its snapshots hold on the disk, without what it shares with the snapshot that it
    was cloned from. `written_bytes` is the part of it that was written since the last snapshot. Both are None if nobody
    asked for them, or if a row of the catalog is damaged.
    From `expires` on `Store.expire` may drop the volume; None: never.
    """

    name: str
    size_bytes: int
    block_size: int
    wipe: "WipePolicy"
    base: str | None
    created: datetime
    snapshots: int
    holder: int | None
    used_bytes: int | None
    written_bytes: int | None
    expires: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@record(frozen=False)
class TreeNode:
    """A node of the tree of a store. Its `kind` is `base`, `snapshot`, `layer` (without a name) or `head`.

    `origins` of a head says what its volume was forked or cloned from. If that was dropped, what that came from follows, up
    to one that is there.
    """

    kind: "LayerKind"
    name: str
    size_bytes: int
    created: datetime | None
    note: str = ""
    bytes_held: int = 0
    children: list["TreeNode"] = field(default_factory=list)
    origins: Sequence[Ancestor] = ()


def list_volumes(
    store: OpenStore, wanted: Mapping[str, str], *, space: bool = True, owned: bool = False
) -> list[VolumeInfo]:
    """Return the volumes that have all these labels, by name; without `space` no segment is looked at.

    Those that go with a machine are among them only if `owned`.
    """
    refuse_no_mapping(wanted)
    catalog = store.catalog
    held = _lock_files_in_use(store)
    with catalog.reading():
        # Only the layers that have children are read for their parents: under a hundred thousand clones, these are few.
        below, paths, counts = catalog.parents(), catalog.base_paths(), catalog.snapshot_counts()
        bases: dict[bytes, bytes | None] = {}
        taken = SpaceOfAll(store, {layer: parent for layer, (parent, _) in below.items()}) if space else None
        labels = catalog.labels()
        hidden = set() if owned else catalog.owned_volumes()
        infos = []
        for row in catalog.listed_heads():
            id, name, created_ns, expires_ns, head, parent, base, size_bytes, block_size, wipe = row
            if id in hidden:
                continue
            if wanted and not wanted.items() <= labels.get(id, {}).items():
                continue
            under = base if parent is None else _base_of(below, parent, bases)
            path = paths.get(under) if under else None
            holder = _holder(store, id) if held and f"{id.hex()}.lock" in held else None
            used, written = taken.of(id, head, parent) if taken else (None, None)
            made, expires, has = when(created_ns), _expires(expires_ns), labels.get(id, {})
            of_disk = (name, size_bytes, block_size, wipe, path, made, counts.get(id, 0))
            infos.append(VolumeInfo(*of_disk, holder, used, written, expires, has))
    return infos


def volume_info(store: OpenStore, name: str) -> VolumeInfo:
    """Return one volume."""
    catalog = store.catalog
    with catalog.reading():
        row = catalog.volume(name)
        chain = catalog.chain(row.head)
        if not chain:
            raise StateError(f"the head of volume {name!r} is gone: another process changed the tree; try again")
        base = catalog.base_of(chain[0])
        snapshots = catalog.snapshot_count(row.id)
        used, written = _space_of(store, row)
        labels = catalog.labels_of(row.id)
    return VolumeInfo(
        row.name,
        chain[-1].size_bytes,
        chain[-1].block_size,
        cast("WipePolicy", chain[-1].wipe),
        base=base.path if base else None,
        created=when(row.created_ns),
        snapshots=snapshots,
        holder=_holder(store, row.id),
        used_bytes=used,
        written_bytes=written,
        expires=_expires(row.expires_ns),
        labels=labels,
    )


def _space_of(store: OpenStore, row: VolumeRow) -> tuple[int | None, int | None]:
    try:
        return space_of(store, row)
    except FormatError:  # of a row that is asked for nothing else: the volume is there all the same
        return None, None


def _expires(expires_ns: int | None) -> datetime | None:
    return None if expires_ns is None else when(expires_ns)


def _holder(store: OpenStore, volume: bytes) -> int | None:
    holder = volume_holder(store.layout.volume_lock(volume))
    return holder.pid if holder else None


def _lock_files_in_use(store: OpenStore) -> set[str]:
    """Return the names of the lock files that are not empty. The file of a volume that nobody holds is empty."""
    names = set()
    with listed(store.layout.volumes) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.name.endswith(".lock") and entry.stat(follow_symlinks=False).st_size:
                    names.add(entry.name)
    return names


def _base_of(
    below: dict[bytes, tuple[bytes | None, bytes | None]], top: bytes, known: dict[bytes, bytes | None]
) -> bytes | None:
    """Return the base under a layer. `below` has (parent, base) of each layer that has children.

    `known` keeps the result for each layer on the way.
    """
    layer: bytes | None = top
    way: list[bytes] = []
    base: bytes | None = None
    while layer is not None and layer not in known and len(way) <= len(below):  # a damaged catalog may have circles
        way.append(layer)
        layer, base = below.get(layer, (None, None))
    base = known.get(layer, base) if layer is not None else base
    known.update(dict.fromkeys(way, base))
    return base


def read_tree(store: OpenStore) -> list[TreeNode]:
    """Return the bases, and the layers that stand on nothing. Each node has the layers that stand on it."""
    catalog = store.catalog
    with catalog.reading():
        layers = catalog.all_sound(LayerRow)
        volumes = {row.id: row for row in catalog.all_sound(VolumeRow)}
        names = {row.layer: row for row in catalog.all_sound(SnapshotRow) if row.volume in volumes}
        bases = catalog.bases_by_path()
        segments = catalog.all_sound(SegmentRow)
        lineages = {row.volume: row for row in catalog.all_sound(LineageRow)}
    # The layers are sorted by number, because the clock may have gone back. Both kinds of numbers come from one
    # counter.
    layers.sort(key=lambda layer: names[layer.id].number if layer.id in names else layer.map_lock_byte)
    held = _bytes_of_layers(store, layers, segments)
    heads = {row.head: row.name for row in volumes.values() if not row.name.startswith(STAGED_PREFIX)}
    nodes = {layer.id: _node(layer, names, heads, volumes, held[layer.id]) for layer in layers}
    for row in volumes.values():
        if row.head in nodes and row.id in lineages:
            nodes[row.head].origins = lineage.origins(lineages, row.id)
    roots = [TreeNode("base", base.path, base.size_bytes, None) for base in bases]
    by_base = {base.id: root for base, root in zip(bases, roots, strict=True)}
    for layer in layers:
        below = nodes.get(layer.parent) if layer.parent else by_base.get(layer.base) if layer.base else None
        (below.children if below else roots).append(nodes[layer.id])
    return roots


def _bytes_of_layers(store: OpenStore, layers: Iterable[LayerRow], segments: Iterable[SegmentRow]) -> dict[bytes, int]:
    """Return the bytes that the segments of each layer take on the disk."""
    owners = {f"{segment.id.hex()}.seg": segment.layer for segment in segments}
    held = {layer.id: 0 for layer in layers}
    with listed(store.layout.segments) as entries:
        for entry in entries:
            owner = owners.get(entry.name)
            if owner in held:
                with suppress(FileNotFoundError):
                    held[owner] += entry.stat(follow_symlinks=False).st_blocks * 512
    return held


def _node(
    layer: LayerRow,
    names: dict[bytes, SnapshotRow],
    heads: dict[bytes, str],
    volumes: dict[bytes, VolumeRow],
    held: int,
) -> TreeNode:
    created = when(layer.created_ns)
    if layer.id in heads:
        return TreeNode("head", heads[layer.id], layer.size_bytes, created, "", held)
    if layer.id in names:
        row = names[layer.id]
        name = f"{volumes[row.volume].name}@{row.name}"
        return TreeNode("snapshot", name, layer.size_bytes, when(row.created_ns), row.note, held)
    return TreeNode("layer", layer.id.hex()[:8], layer.size_bytes, created, "", held)
