"""Which layer each part of a disk comes from: read from the block maps of its chain, and no block data.

What must hold: the chain's files are locked while they are read, as an open volume locks them; nothing is opened for
writing, made or changed, so that it can be asked beside whoever holds the volume. The loops over runs are in C
(csrc/owners.h); here are only tables.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from onionskin._maplog import OwnerMap
from onionskin.catalog import SIZE_BYTES_MAX, LayerRow, SnapshotRow, VolumeRow
from onionskin.chain import Chain, check_base, lock_chain, pending_base_merges, read_chain
from onionskin.errors import ChainError, StateError
from onionskin.files import data_ranges
from onionskin.layermaps import lay_map
from onionskin.locks import ByteLocks
from onionskin.snapshots import find_snapshot, when
from onionskin.transfer import covered

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing

    from onionskin.store import Store

    Array = numpy.typing.NDArray[Any]

HOLE, DATA, ZERO = 0, 1, 2
LAYER_EXTENT_DTYPE = numpy.dtype([("offset", "<u8"), ("length", "<u8"), ("state", "u1"), ("depth", "<u4")])


@dataclass(frozen=True, slots=True)
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

    kind: str
    name: str
    created: datetime | None


class Layering(NamedTuple):
    """A disk by layers.

    Attributes
    ----------
    chain : tuple of ChainMember
        By depth: at 0 the head, or the layer of the snapshot that was asked for; the oldest layer; and the base at
        last, where there is one.
    extents : numpy.ndarray
        One-dimensional and structured: offset, length (bytes), state (0 HOLE, 1 DATA, 2 ZERO) and depth. In order, they
        cover the disk without gap or overlap, and no two that touch are alike. What no layer has is at the depth of the
        base, whether there is one or not: DATA where the base file has data, else HOLE.
    """

    chain: tuple[ChainMember, ...]
    extents: "Array"


def layering_of(store: "Store", name: str, snapshot: str | None) -> Layering:
    """Return the layering of a snapshot, or of a volume's head as it is durable."""

    def find() -> bytes:
        volume = store.catalog.volume(name)
        return volume.head if snapshot is None else find_snapshot(store.catalog, volume, snapshot).layer

    return read_layering(store, find)


def read_layering(store: "Store", find: Callable[[], bytes]) -> Layering:
    """Return the layering of the disk whose top layer `find` names; it is asked again where that went meanwhile."""
    while True:
        with _locked_chain(store, find) as chain:
            try:
                return _read(store, chain)
            except ChainError:
                if not _base_is_merged_into(store, chain, find()):
                    raise


def _read(store: "Store", chain: Chain) -> Layering:
    members = _members(store, chain)
    runs, size_bytes = _runs(store, chain)
    return Layering(members, _extents(runs, _base_ranges(store, chain, size_bytes), size_bytes, len(chain.layers)))


def _base_is_merged_into(store: "Store", chain: Chain, top: bytes) -> bool:
    """Whether a merge into the base began or ended since a chain was read: then its file differs from what that says."""
    return read_chain(store.catalog, top).base != chain.base or bool(pending_base_merges(store.catalog, top))


@contextmanager
def _locked_chain(store: "Store", find: Callable[[], bytes]) -> "Iterator[Chain]":
    locks = ByteLocks(store.layout.lock)
    try:
        yield _lock(store, find, locks)
    finally:
        locks.close()
        if any(volume.writable for volume in store.open_volumes()):
            store.work_soon()  # what had to wait for these locks


def _lock(store: "Store", find: Callable[[], bytes], locks: ByteLocks) -> Chain:
    while True:
        layer = find()
        try:
            return lock_chain(store.catalog, layer, locks)
        except StateError:
            if find() == layer:
                raise


def _members(store: "Store", chain: Chain) -> tuple[ChainMember, ...]:
    """Describe the chain, top first."""
    catalog = store.catalog
    with catalog.reading():
        volumes = {row.id: row.name for row in catalog.rows(VolumeRow)}
        heads = {row.head: row.name for row in catalog.rows(VolumeRow)}
        named = {row.layer: row for row in catalog.rows(SnapshotRow)}

    def describe(layer: LayerRow) -> ChainMember:
        if layer.id in named:
            row = named[layer.id]
            return ChainMember("snapshot", f"{volumes[row.volume]}@{row.name}", when(row.created_ns))
        if layer.id in heads:
            return ChainMember("head", heads[layer.id], when(layer.created_ns))
        return ChainMember("layer", layer.id.hex()[:8], when(layer.created_ns))

    layers = [describe(layer) for layer in reversed(chain.layers)]
    return (*layers, *([ChainMember("base", chain.base.path, None)] if chain.base else []))


def _runs(store: "Store", chain: Chain) -> "tuple[Array, int]":
    """Return what the layers have, as extents by depth, and the size of the disk."""
    top, block_size = chain.top, chain.top.block_size
    size_bytes = top.size_bytes
    owners = OwnerMap(block_size=block_size, block_count=SIZE_BYTES_MAX // block_size)
    depth_of_owner = [0]
    try:
        for depth, layer in zip(range(len(chain.layers) - 1, -1, -1), chain.layers, strict=True):
            if layer.sealed and not layer.map_length:
                continue  # an empty layer owns nothing, and needs no number
            head_bytes = lay_map(store, layer, owners)
            depth_of_owner.append(depth)
            if head_bytes is not None:
                size_bytes = head_bytes  # what a resize left that is not in the catalog yet
        runs = owners.runs()
    finally:
        owners.close()
    out = numpy.empty(len(runs), LAYER_EXTENT_DTYPE)
    out["offset"] = runs["block_index"] * block_size
    out["length"] = runs["block_count"] * block_size
    out["state"] = runs["state"]
    out["depth"] = numpy.array(depth_of_owner, numpy.uint32)[runs["owner"]]
    return _clipped(out, size_bytes), size_bytes


def _clipped(extents: "Array", size_bytes: int) -> "Array":
    """Cut off what lies behind the end: a run is of whole blocks, and a layer below may have been longer."""
    extents = extents[extents["offset"] < size_bytes]
    extents["length"] = numpy.minimum(extents["length"], size_bytes - extents["offset"])
    return extents


def _base_ranges(store: "Store", chain: Chain, size_bytes: int) -> "Array":
    """Return where the base file has data below the disk: an (n, 2) array of first and last offsets, the last exclusive."""
    if chain.base is None:
        return numpy.empty((0, 2), numpy.int64)
    # While a merge into the base runs, its file differs from what the catalog knows, and that is no fault.
    if not pending_base_merges(store.catalog, chain.top.id):
        check_base(store.catalog, chain.base)
    with open(chain.base.path, "rb", buffering=0) as file:
        ranges = list(data_ranges(file.fileno(), 0, min(size_bytes, chain.base.size_bytes)))
    return numpy.array(ranges, numpy.int64).reshape(-1, 2)


def _extents(runs: "Array", base: "Array", size_bytes: int, base_depth: int) -> "Array":
    """Cover the disk: the runs of the layers, and between them the base's data and holes."""
    starts = runs["offset"].astype(numpy.int64)
    ends = starts + runs["length"].astype(numpy.int64)
    edges = numpy.concatenate((starts, ends, base[:, 0], base[:, 1], [0, size_bytes]))
    edges.sort(kind="stable")  # made of sorted parts, which it merges
    left = edges[:-1][edges[1:] > edges[:-1]]
    if not len(runs):
        runs = numpy.zeros(1, LAYER_EXTENT_DTYPE)  # for take: no index refers to it
    run = covered(left, starts, ends)
    of_base = covered(left, base[:, 0], base[:, 1]) >= 0
    state = numpy.where(run >= 0, runs["state"][run], numpy.where(of_base, DATA, HOLE))
    depth = numpy.where(run >= 0, runs["depth"][run], base_depth)
    changes = numpy.flatnonzero((state[1:] != state[:-1]) | (depth[1:] != depth[:-1])) + 1
    first = numpy.concatenate(([0], changes))
    out = numpy.empty(len(first), LAYER_EXTENT_DTYPE)
    out["offset"] = left[first]
    out["length"] = numpy.diff(left[first], append=size_bytes)
    out["state"], out["depth"] = state[first], depth[first]
    return out
