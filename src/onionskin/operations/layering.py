"""The layering of a disk: which layer each part of it comes from. It is read from the block maps alone.

What must hold: the chain and the names on it are read in one state of the catalog. The map files of the chain are
locked while they are read, and the base is one open file. Nothing is opened for writing, made or changed, so that the
layering can be read while another handle holds the volume. The loops over runs are in C (csrc/layer/provenance.h); this
module only works on tables. NumPy is loaded for who asks for an array, and not for the pictures.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from onionskin.base.files import data_ranges
from onionskin.base.lazy import dtypes
from onionskin.base.limits import VOLUME_BYTES_MAX
from onionskin.base.named_tuples import NamedTuple
from onionskin.base.records import record
from onionskin.base.states import DATA
from onionskin.catalog import BaseRow
from onionskin.catalog.tree import find_snapshot
from onionskin.errors import ChainError
from onionskin.kernels._extents import Extents
from onionskin.kernels._maplog import ProvenanceMap
from onionskin.operations.chain_members import ChainMember, chain_members
from onionskin.operations.locked_maps import locked_maps
from onionskin.storage.base_looks import looks_in, looks_of, what_differs
from onionskin.storage.block_maps import lay_map, read_layers
from onionskin.storage.chain import Chain, refuse_gone, unfinished_base_merges
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]

_BASE_ADVICE = "put it back, or name the right one with 'onionskin relocate'"


class Layering(NamedTuple):
    """A disk by layers.

    Attributes
    ----------
    chain : tuple of ChainMember
        The layers by depth. Depth 0 is the head, or the layer of the snapshot that was asked for. The oldest layer
        comes last, and after it the base, if there is one.
    extents : numpy.ndarray
        A one-dimensional structured array with offset, length (bytes), state (0 HOLE, 1 DATA, 2 ZERO) and depth. The
        extents are in order and cover the disk without gap or overlap. Neighbours differ in state or depth. Blocks that
        no layer has are at the depth of the base, even if there is no base: DATA where the base file has data, and
        otherwise HOLE.
    """

    chain: tuple[ChainMember, ...]
    extents: "Array"


class LayerTable(NamedTuple):
    """A layering whose extents are a table: their sources are the depths."""

    chain: tuple[ChainMember, ...]
    extents: Extents

    def layering(self) -> Layering:
        """Return it with an array of the extents."""
        rows = self.extents.array(dtypes.LAYER_EXTENT_ROW)
        return Layering(self.chain, rows.view(dtypes.LAYER_EXTENT))  # the source is the depth


def layer_table(store: OpenStore, name: str, snapshot: str | None) -> LayerTable:
    """Return the layering of a snapshot, or of the durable part of a volume's head."""

    def find() -> bytes:
        volume = store.catalog.volume(name)
        return volume.head if snapshot is None else find_snapshot(store.catalog, volume, snapshot).layer

    return read_layer_table(store, find)


def read_layer_table(store: OpenStore, find: Callable[[], bytes]) -> LayerTable:
    """Return the layering of the disk whose top layer `find` names.

    If the tree or the base changes meanwhile, `find` is called again.
    """
    while True:
        with locked_maps(store, lambda: _find(store, find), lambda found: found.chain.layers) as found:
            try:
                return _read(store, found)
            except ChainError:
                if not _base_is_merged_into(store, found.chain):
                    raise


@record
class _Found:
    """A chain, its members from the top, and whether a merge into its base is unfinished: one state of the catalog."""

    chain: Chain
    members: tuple[ChainMember, ...]
    is_merging: bool


def _find(store: OpenStore, find: Callable[[], bytes]) -> _Found:
    """Read the chain that `find` names. Inside `reading`."""
    top = find()
    chain = read_layers(store.catalog, top)
    return _Found(chain, chain_members(store.catalog, chain), bool(unfinished_base_merges(store.catalog, top)))


def _read(store: OpenStore, found: _Found) -> LayerTable:
    chain = found.chain
    held, size_bytes = _held(store, chain)
    below = len(chain.layers)  # the depth of the base, if there is one
    base = Extents(_base_ranges(chain.base, found.is_merging, size_bytes), state=DATA, source=below)
    # Blocks are whole, and a layer below may be longer than the disk.
    everything = Extents([(0, size_bytes)], source=below)
    return LayerTable(found.members, held.within(everything).over(base).over(everything).joined())


def _base_is_merged_into(store: OpenStore, chain: Chain) -> bool:
    """Whether a merge into the base began or ended since a chain was read, so that the base differs from its row."""
    catalog = store.catalog
    with catalog.reading():
        base = catalog.base_with_id(chain.base.id) if chain.base else None
        merged = {work.target for work in catalog.base_merges()}
        return base != chain.base or any(layer.id in merged for layer in chain.layers)


def _held(store: OpenStore, chain: Chain) -> tuple[Extents, int]:
    """Return what the layers have, with depths as sources, and the size of the disk."""
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
                size_bytes = head_bytes  # a resize may have changed the size, and is not in the catalog yet
        return provenance.extents(depth_of), size_bytes
    finally:
        provenance.close()


def _base_ranges(base: BaseRow | None, is_merging: bool, size_bytes: int) -> list[tuple[int, int]]:
    """Return the ranges of the base that have data and lie within the disk."""
    if base is None:
        return []
    try:
        descriptor = os.open(base.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        refuse_gone(base, error)
        raise
    try:
        # While a merge into the base runs, the file differs from its row in the catalog. That is no fault, because the
        # layers hide everything that the merge writes.
        if not is_merging and looks_of(descriptor) != looks_in(base):
            raise ChainError(
                f"the base {base.path} has changed since the volume was made ({what_differs(base)}): {_BASE_ADVICE} "
                "(--trust if its contents are the same)"
            )
        return list(data_ranges(descriptor, 0, min(size_bytes, base.size_bytes)))
    finally:
        os.close(descriptor)
