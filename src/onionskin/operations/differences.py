"""What two states of disks differ in: snapshots or heads, of one volume or of several, read from their maps.

What must hold: what is not said to differ reads the same in both. A layer that stands under both says nothing, whatever
volumes they are of, and neither does a base that both stand on. Where they share neither, all that either holds
may differ. No block data is read, and the maps are locked while they are (operations/locked_maps.py).
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from onionskin.base.lazy import dtypes
from onionskin.catalog import BaseRow, Catalog, LayerRow, SnapshotRow, VolumeRow
from onionskin.catalog.tree import find_snapshot
from onionskin.kernels._maplog import LayerMap
from onionskin.operations.copy import covered
from onionskin.operations.locked_maps import locked_maps
from onionskin.storage.block_maps import empty_map, open_map, read_layers
from onionskin.storage.chain import Chain
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Array = numpy.typing.NDArray[Any]
else:
    from onionskin.base.lazy import numpy

Ranges = tuple["Array", "Array"]  # first bytes, and the bytes behind the last ones


# ---- which two ----


@dataclass(frozen=True, slots=True)
class State:
    """A snapshot of a volume, or its head where `snapshot` is None."""

    volume: str
    snapshot: str | None = None

    def __str__(self) -> str:
        """Write it as it is named."""
        return self.volume if self.snapshot is None else f"{self.volume}@{self.snapshot}"

    @classmethod
    def named(cls, text: str) -> "State":
        """Read `volume@snapshot`, or the name of a volume, which is its head."""
        if not isinstance(text, str):
            raise TypeError(f"a state of a disk is named by a string, such as 'web@clean', not by {text!r}")
        volume, at, snapshot = text.partition("@")
        if not volume or (at and not snapshot) or "@" in snapshot:
            raise ValueError(f"{text!r} is no name of a state; write VOLUME@SNAPSHOT, or VOLUME for what it holds now")
        return cls(volume, snapshot or None)

    def layer(self, catalog: Catalog) -> tuple[VolumeRow, SnapshotRow | None, bytes]:
        """Look it up: its volume, its row where it is a snapshot, and its layer. Inside `reading`."""
        volume = catalog.volume(self.volume)
        if self.snapshot is None:
            return volume, None, volume.head
        row = find_snapshot(catalog, volume, self.snapshot)
        return volume, row, row.layer


def snapshot_of(volume: str | None, text: str) -> State:
    """Return the snapshot that a text names: one of a volume, or `volume@snapshot` of any."""
    if not isinstance(text, str):
        raise TypeError(f"a snapshot is named by a string, not by {text!r}; take one first where a head is meant")
    if "@" in text:
        return State.named(text)
    if volume is None:
        raise ValueError(
            f"{text!r} does not say which snapshot of which volume is meant; write VOLUME@SNAPSHOT, and take one first where "
            "a head is meant, which changes"
        )
    return State(volume, text)


def ends_of(name: str, a: str | None, b: str | None) -> tuple[State, State]:
    """Return the two states that a call compares.

    They are (volume, snapshot, snapshot or None for the head), where a snapshot may be one of another volume, or
    (volume@snapshot, volume[@snapshot] or None for the head of the same one).
    """
    if isinstance(name, str) and "@" in name:
        if b is not None:
            raise ValueError(f"{name!r}, {a!r} and {b!r} are three states, and two are compared")
        start = State.named(name)
        return start, State(start.volume) if a is None else State.named(a)
    if a is None:
        raise ValueError(f"a snapshot to compare {name!r} with is missing; give its name, or VOLUME@SNAPSHOT")
    return snapshot_of(name, a), State(name) if b is None else snapshot_of(name, b)


# ---- what they differ in ----


def diff(store: OpenStore, name: str, a: str | None = None, b: str | None = None) -> "Array":
    """Return the extents that may differ between two states, as `ends_of` reads them; a head is as it is durable."""
    start, end = ends_of(name, a, b)

    def find() -> tuple[Chain, Chain]:
        chain_a, chain_b = (read_layers(store.catalog, one.layer(store.catalog)[2]) for one in (start, end))
        return chain_a, chain_b

    with locked_maps(store, find, lambda chains: {*chains[0].layers, *chains[1].layers}) as chains:
        return diff_of_chains(store, *chains)


def are_related(chain_a: Chain, chain_b: Chain) -> bool:
    """Whether what neither chain's own layers say reads the same in both: a layer is in both, or the base, or nothing."""
    return bool(_shared(chain_a, chain_b)) or _same_base(chain_a.base, chain_b.base)


def _shared(chain_a: Chain, chain_b: Chain) -> set[bytes]:
    return {layer.id for layer in chain_a.layers} & {layer.id for layer in chain_b.layers}


def _same_base(one: BaseRow | None, other: BaseRow | None) -> bool:
    """Whether two volumes stand on one file, as it was when they were made. Each has a row of its own for it."""
    if one is None or other is None:
        return one is other
    return replace(one, id=b"", digest=None) == replace(other, id=b"", digest=None)


def diff_of_chains(store: OpenStore, chain_a: Chain, chain_b: Chain) -> "Array":
    """Return the extents that may differ between two chains whose files are locked."""
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
            size_b = int(own_b.size_bytes)  # what a resize left that is not in the catalog yet
        if not chain_a.top.sealed and own_a.size_bytes is not None:
            size_a = int(own_a.size_bytes)
        runs = own_b.runs()
        touched = [_touched(own_a, own_b)]
        if own_a.count() != (0, 0) and common:
            # What only a's layers have reads at b as the layers below both say.
            with closing(_laid(store, common, block_b)) as whole_b:
                whole_b.fold(own_b)
                runs = whole_b.runs()
    if not shared:
        touched += _ranges(_unshared(chain_a, chain_b, size_a, size_b))
    return _clip(_split(_union(touched), runs, block_b), size_b)


def _unshared(chain_a: Chain, chain_b: Chain, size_a: int, size_b: int) -> Iterable[tuple[int, int]]:
    """Yield what may differ though no map says so, of two chains without a layer in common."""
    if size_a < size_b:  # the base may show through there
        yield size_a, size_b
    if not _same_base(chain_a.base, chain_b.base):
        yield 0, max(base.size_bytes for base in (chain_a.base, chain_b.base) if base)


def _ranges(pairs: Iterable[tuple[int, int]]) -> list[Ranges]:
    return [(numpy.array([first], numpy.int64), numpy.array([end], numpy.int64)) for first, end in pairs]


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


def _touched(one: LayerMap, other: LayerMap) -> Ranges:
    """Return what one of two maps says anything of. Two volumes over one base may have blocks of two sizes."""
    if one.block_size != other.block_size:
        return _union([_bytes_of(each.runs(), each.block_size) for each in (one, other)])
    stretches = one.touched(other)
    names = stretches.dtype.names
    assert names is not None
    starts = stretches[names[0]].astype(numpy.int64) * one.block_size
    return starts, starts + stretches[names[1]].astype(numpy.int64) * one.block_size


def _bytes_of(runs: "Array", block_size: int) -> Ranges:
    starts = runs["block_index"].astype(numpy.int64) * block_size
    return starts, starts + runs["block_count"].astype(numpy.int64) * block_size


def _union(parts: Sequence[Ranges]) -> Ranges:
    """Join ranges, in whatever order, to those that are apart from each other."""
    starts, ends = (numpy.concatenate(ones) for ones in zip(*parts, strict=True))
    order = numpy.argsort(starts, kind="stable")
    starts, ends = starts[order], numpy.maximum.accumulate(ends[order]) if len(ends) else ends
    begins = numpy.ones(len(starts), bool)
    begins[1:] = starts[1:] > ends[:-1]
    return starts[begins], ends[numpy.append(begins[1:], True)] if len(ends) else ends


def _split(within: Ranges, runs: "Array", block_size: int) -> "Array":
    """Cut ranges of bytes at the borders of runs of blocks, so that each piece has one state (0: the base's)."""
    starts, ends = within
    run_starts, run_ends = _bytes_of(runs, block_size)
    cuts = numpy.unique(numpy.concatenate((starts, ends, run_starts, run_ends)))
    if len(cuts) < 2:
        return numpy.empty(0, dtype=dtypes.EXTENT)
    left, right = cuts[:-1], cuts[1:]
    inside = covered(left, starts, ends) >= 0
    run = covered(left, run_starts, run_ends)
    states = runs["state"] if len(runs) else numpy.zeros(1, dtype=numpy.uint8)
    states = numpy.where(run >= 0, states[numpy.maximum(run, 0)], 0)
    return _joined(left[inside], right[inside], states[inside])


def _joined(left: "Array", right: "Array", states: "Array") -> "Array":
    """Make extents of pieces in order; neighbours of the same state are one."""
    begins = numpy.ones(len(left), bool)
    begins[1:] = (left[1:] != right[:-1]) | (states[1:] != states[:-1])
    out = numpy.empty(int(begins.sum()), dtype=dtypes.EXTENT)
    out["offset"], out["state"] = left[begins], states[begins]
    out["length"] = (right[numpy.append(begins[1:], True)] if len(left) else right) - out["offset"]
    return out


def _clip(extents: "Array", size_bytes: int) -> "Array":
    extents = extents[extents["offset"] < size_bytes]
    extents["length"] = numpy.minimum(extents["length"], size_bytes - extents["offset"])
    return extents
