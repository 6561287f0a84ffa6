"""The differences between two states of disks, found from their maps. A state is a snapshot or a head of any volume.

What must hold: everything outside the reported extents reads the same in both states. A layer or a base that both
states stand on makes no difference. If they share neither, everything that either of them holds may differ. No block
data is read. The maps are locked while they are read (operations/locked_maps.py).
"""

from collections.abc import Iterable, Sequence
from contextlib import closing

from onionskin.base.records import record
from onionskin.catalog import BaseRow, Catalog, LayerRow, SnapshotRow, VolumeRow
from onionskin.catalog.tree import find_snapshot
from onionskin.kernels._extents import Extents
from onionskin.kernels._maplog import LayerMap
from onionskin.operations.locked_maps import locked_maps
from onionskin.storage.block_maps import empty_map, open_map, read_layers
from onionskin.storage.chain import Chain
from onionskin.storage.open_store import OpenStore

# ---- the two states ----


@record
class State:
    """A snapshot of a volume, or the head of the volume if `snapshot` is None.

    `id`: the volume with this id is meant, whatever it is called by now.
    """

    volume: str
    snapshot: str | None = None
    id: bytes | None = None

    def __str__(self) -> str:
        """Return the text that `named` reads."""
        return self.volume if self.snapshot is None else f"{self.volume}@{self.snapshot}"

    @classmethod
    def named(cls, text: str) -> "State":
        """Parse `volume@snapshot`, or the name of a volume, which stands for its head."""
        if not isinstance(text, str):
            raise TypeError(f"a state of a disk is named by a string, such as 'web@clean', not by {text!r}")
        volume, at, snapshot = text.partition("@")
        if not volume or (at and not snapshot) or "@" in snapshot:
            raise ValueError(f"{text!r} is no name of a state; write VOLUME@SNAPSHOT, or VOLUME for what it holds now")
        return cls(volume, snapshot or None)

    def layer(self, catalog: Catalog) -> tuple[VolumeRow, SnapshotRow | None, bytes]:
        """Look up the volume, the row of the snapshot (None for a head), and the id of the layer. Inside `reading`."""
        volume = catalog.volume(self.volume) if self.id is None else catalog.volume_that_is(self.id)
        if self.snapshot is None:
            return volume, None, volume.head
        row = find_snapshot(catalog, volume, self.snapshot)
        return volume, row, row.layer


def snapshot_of(volume: str | None, text: str, *, id: bytes | None = None) -> State:
    """Return the snapshot that a text names: a snapshot of `volume`, or `volume@snapshot` of any volume.

    `id`: that of the volume which `volume` stands for.
    """
    if not isinstance(text, str):
        raise TypeError(f"a snapshot is named by a string, not by {text!r}; take one first where a head is meant")
    if "@" in text:
        return State.named(text)
    if volume is None:
        raise ValueError(
            f"{text!r} does not say which snapshot of which volume is meant; write VOLUME@SNAPSHOT, and take one first where "
            "a head is meant, which changes"
        )
    return State(volume, text, id)


def ends_of(name: str, a: str | None, b: str | None, *, id: bytes | None = None) -> tuple[State, State]:
    """Return the two states that a call compares.

    The arguments have one of two forms. In (volume, snapshot, snapshot), a snapshot may also be `volume@snapshot` of
    another volume, and None as the last one stands for the head. In (volume@snapshot, volume[@snapshot]), None as the
    second one stands for the head of the first volume.

    `id`: that of the volume which a name without a snapshot stands for.
    """
    if isinstance(name, str) and "@" in name:
        if b is not None:
            raise ValueError(f"{name!r}, {a!r} and {b!r} are three states, and two are compared")
        start = State.named(name)
        return start, State(start.volume) if a is None else State.named(a)
    if a is None:
        raise ValueError(f"a snapshot to compare {name!r} with is missing; give its name, or VOLUME@SNAPSHOT")
    return snapshot_of(name, a, id=id), State(name, id=id) if b is None else snapshot_of(name, b, id=id)


# ---- their differences ----


def diff(
    store: OpenStore, name: str, a: str | None = None, b: str | None = None, *, id: bytes | None = None
) -> Extents:
    """Return the extents that may differ between two states, which `ends_of` parses. A head counts as it is durable."""
    start, end = ends_of(name, a, b, id=id)

    def find() -> tuple[Chain, Chain]:
        chain_a, chain_b = (read_layers(store.catalog, one.layer(store.catalog)[2]) for one in (start, end))
        return chain_a, chain_b

    with locked_maps(store, find, lambda chains: {*chains[0].layers, *chains[1].layers}) as chains:
        return diff_of_chains(store, *chains)


def are_related(chain_a: Chain, chain_b: Chain) -> bool:
    """Whether blocks that are not in the chains' own layers read the same in both chains.

    They do if the chains share a layer, stand on the same base, or both have no base.
    """
    return bool(_shared(chain_a, chain_b)) or _same_base(chain_a.base, chain_b.base)


def _shared(chain_a: Chain, chain_b: Chain) -> set[bytes]:
    return {layer.id for layer in chain_a.layers} & {layer.id for layer in chain_b.layers}


def _same_base(one: BaseRow | None, other: BaseRow | None) -> bool:
    """Whether two rows describe one base file in the same state. Each volume has a row of its own for its base."""
    if one is None or other is None:
        return one is other
    return one._replace(id=b"", digest=None) == other._replace(id=b"", digest=None)


def diff_of_chains(store: OpenStore, chain_a: Chain, chain_b: Chain) -> Extents:
    """Return the extents that may differ between two chains whose files are locked. Neighbours differ in state."""
    shared = _shared(chain_a, chain_b)
    size_a, size_b = chain_a.top.size_bytes, chain_b.top.size_bytes
    block_b = chain_b.top.block_size
    common = [layer for layer in chain_b.layers if layer.id in shared]
    with (
        closing(
            _laid(store, [layer for layer in chain_a.layers if layer.id not in shared], chain_a.top.block_size)
        ) as own_a,
        closing(_laid(store, [layer for layer in chain_b.layers if layer.id not in shared], block_b)) as own_b,
    ):
        if not chain_b.top.sealed and own_b.size_bytes is not None:
            size_b = int(own_b.size_bytes)  # a resize may have changed the size, and is not in the catalog yet
        if not chain_a.top.sealed and own_a.size_bytes is not None:
            size_a = int(own_a.size_bytes)
        held = own_b.extents()
        touched = own_a.extents().over(held)
        if own_a.count() != (0, 0) and common:
            # Where only a's own layers have a block, b reads as the layers that both share.
            with closing(_laid(store, common, block_b)) as whole_b:
                whole_b.fold(own_b)
                held = whole_b.extents()
    if not shared:
        touched = touched.over(Extents(sorted(_unshared(chain_a, chain_b, size_a, size_b))))
    everything = Extents([(0, size_b)])
    return held.over(everything).within(touched.ranges()).within(everything).joined()


def _unshared(chain_a: Chain, chain_b: Chain, size_a: int, size_b: int) -> Iterable[tuple[int, int]]:
    """Yield the ranges that may differ though no map names them. The two chains have no layer in common."""
    if size_a < size_b:  # behind the end of a, the base may be visible in b
        yield size_a, size_b
    if not _same_base(chain_a.base, chain_b.base):
        yield 0, max(base.size_bytes for base in (chain_a.base, chain_b.base) if base)


def _laid(store: OpenStore, layers: Sequence[LayerRow], block_size: int) -> LayerMap:
    """Load layers, bottom first, and lay them over each other."""
    union = empty_map(block_size)
    try:
        for layer in layers:
            with closing(open_map(store, layer)) as loaded:
                union.fold(loaded)
    except BaseException:
        union.close()
        raise
    return union
