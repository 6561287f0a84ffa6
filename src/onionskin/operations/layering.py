"""Which layer each part of a disk comes from: read from the block maps of its chain, and no block data.

What must hold: the chain and the names on it are read in one state of the catalog, and its map files are locked while they
are read; the base that is looked at is one open file. Nothing is opened for writing, made or changed, so that it can be asked
beside whoever holds the volume. The loops over runs are in C (csrc/layer/provenance.h); here are only tables.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from onionskin.base.files import data_ranges
from onionskin.base.limits import VOLUME_BYTES_MAX
from onionskin.base.states import DATA, HOLE
from onionskin.catalog import BaseRow, Catalog, LayerRow
from onionskin.catalog.tree import find_snapshot, when
from onionskin.errors import ChainError
from onionskin.kernels._maplog import ProvenanceMap
from onionskin.operations.copy import covered
from onionskin.operations.locked_maps import locked_maps
from onionskin.storage.block_maps import lay_map, read_layers
from onionskin.storage.chain import Chain, unfinished_base_merges
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]

_BASE_ADVICE = "put the file back, or name the right one with 'onionskin relocate'"
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


def layering_of(store: OpenStore, name: str, snapshot: str | None) -> Layering:
    """Return the layering of a snapshot, or of a volume's head as it is durable."""

    def find() -> bytes:
        volume = store.catalog.volume(name)
        return volume.head if snapshot is None else find_snapshot(store.catalog, volume, snapshot).layer

    return read_layering(store, find)


def read_layering(store: OpenStore, find: Callable[[], bytes]) -> Layering:
    """Return the layering of the disk whose top layer `find` names; it is asked again where that went meanwhile."""
    while True:
        with locked_maps(store, lambda: _find(store, find), lambda found: found.chain.layers) as found:
            try:
                return _read(store, found)
            except ChainError:
                if not _base_is_merged_into(store, found.chain):
                    raise


@dataclass(frozen=True, slots=True)
class _Found:
    """A chain, described top first, and whether a merge into its base was under way: all in one state of the catalog."""

    chain: Chain
    members: tuple[ChainMember, ...]
    is_merging: bool


def _find(store: OpenStore, find: Callable[[], bytes]) -> _Found:
    """Inside `reading`."""
    top = find()
    chain = read_layers(store.catalog, top)
    return _Found(chain, _members(store.catalog, chain), bool(unfinished_base_merges(store.catalog, top)))


def _read(store: OpenStore, found: _Found) -> Layering:
    chain = found.chain
    runs, size_bytes = _runs(store, chain)
    base = _base_ranges(chain.base, found.is_merging, size_bytes)
    return Layering(found.members, _extents(runs, base, size_bytes, len(chain.layers)))


def _base_is_merged_into(store: OpenStore, chain: Chain) -> bool:
    """Whether a merge into the base began or ended since a chain was read: then its file differs from what that says."""
    catalog = store.catalog
    with catalog.reading():
        base = catalog.base_with_id(chain.base.id) if chain.base else None
        merged = {work.target for work in catalog.base_merges()}
        return base != chain.base or any(layer.id in merged for layer in chain.layers)


def _members(catalog: Catalog, chain: Chain) -> tuple[ChainMember, ...]:
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


def _runs(store: OpenStore, chain: Chain) -> "tuple[Array, int]":
    """Return what the layers have, as extents by depth, and the size of the disk."""
    top, block_size = chain.top, chain.top.block_size
    size_bytes = top.size_bytes
    provenance = ProvenanceMap(block_size=block_size, block_count=VOLUME_BYTES_MAX // block_size)
    depth_of = [0]
    try:
        for depth, layer in zip(range(len(chain.layers) - 1, -1, -1), chain.layers, strict=True):
            if layer.sealed and not layer.map_length:
                continue  # an empty layer owns nothing, and needs no number
            head_bytes = lay_map(store, layer, provenance)
            depth_of.append(depth)
            if head_bytes is not None:
                size_bytes = head_bytes  # what a resize left that is not in the catalog yet
        runs = provenance.runs()
    finally:
        provenance.close()
    out = numpy.empty(len(runs), LAYER_EXTENT_DTYPE)
    out["offset"] = runs["block_index"] * block_size
    out["length"] = runs["block_count"] * block_size
    out["state"] = runs["state"]
    out["depth"] = numpy.array(depth_of, numpy.uint32)[runs["layer"]]
    return _clipped(out, size_bytes), size_bytes


def _clipped(extents: "Array", size_bytes: int) -> "Array":
    """Cut off what lies behind the end: a run is of whole blocks, and a layer below may have been longer."""
    extents = extents[extents["offset"] < size_bytes]
    extents["length"] = numpy.minimum(extents["length"], size_bytes - extents["offset"])
    return extents


def _base_ranges(base: BaseRow | None, is_merging: bool, size_bytes: int) -> "Array":
    """Return where the base file has data below the disk: an (n, 2) array of first and last offsets, the last exclusive."""
    if base is None:
        return numpy.empty((0, 2), numpy.int64)
    try:
        descriptor = os.open(base.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ChainError(f"the base {base.path} is gone: {_BASE_ADVICE}") from None
    try:
        found = os.fstat(descriptor)
        # While a merge into the base runs, its file differs from what the catalog knows, and that is no fault: all that it
        # writes is hidden by the layers.
        looks = (found.st_ino, found.st_size, found.st_mtime_ns)
        if not is_merging and looks != (base.inode, base.size_bytes, base.mtime_ns):
            raise ChainError(
                f"the base {base.path} has changed since the volume was made (inode, size or time differ): {_BASE_ADVICE} "
                "(--trust if its contents are the same)"
            )
        ranges = list(data_ranges(descriptor, 0, min(size_bytes, base.size_bytes)))
    finally:
        os.close(descriptor)
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
