"""The usage of forks: what each of them holds alone, what it shares, and what all of them hold together.

What must hold: the answer comes from one state of the catalog, whose map files are locked while they are read. What a fork
holds alone is what comes back if it alone is deleted, with its snapshots: its layers, and what only it still read of layers
without a name, which are folded into the one layer that stands on them then. Each layer is looked at a bounded number of
times, however many forks stand on it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain

from onionskin.catalog import LayerRow, SnapshotRow, VolumeRow
from onionskin.catalog.sqlite_errors import damaged
from onionskin.catalog.tree import find_snapshot
from onionskin.operations.fold_policy import lay, run_around
from onionskin.operations.locked_maps import locked_maps
from onionskin.operations.usage import parents_first
from onionskin.storage.block_maps import open_map
from onionskin.storage.open_store import OpenStore

_SEVERAL = b"several"  # in place of an id, which has 16 bytes: several of the forks need the layer
_OTHERS = b"others"  # something that is none of the forks needs the layer


@dataclass(frozen=True, slots=True)
class ForkUsage:
    """The space that one fork takes, or that all of them take together.

    Attributes
    ----------
    fork : str or None
        The name of the fork. None stands for all of them together.
    private_bytes : int
        The data that comes back if that fork alone is deleted, with its snapshots; or all of them.
    shared_bytes : int
        The data of the layers that it stands on and that others need too: what stays then.
    """

    fork: str | None
    private_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class _Going:
    """The layers that go with some forks, from their heads down to `stops`, which stay, as do the layers below them."""

    fork: str | None
    layers: list[bytes]
    stops: list[bytes]
    runs: list[list[LayerRow]]  # those of layers without a name that are folded then


@dataclass(frozen=True, slots=True)
class _Found:
    """The layers that forks stand on, parents first, and what goes with each fork, and with all of them."""

    layers: list[LayerRow]
    going: list[_Going]

    def all_layers(self) -> list[LayerRow]:
        """Return all layers whose maps are read."""
        of_runs = (layer for one in self.going for run in one.runs for layer in run)
        return list({layer.id: layer for layer in (*self.layers, *of_runs)}.values())


@dataclass(slots=True)
class _Forest:
    """The layers that forks stand on, and who needs them."""

    store: OpenStore
    layers: list[LayerRow]  # parents first
    heads: dict[bytes, bytes]  # the fork whose head a layer is
    names: dict[bytes, bytes]  # the volume that a snapshot of the layer is of
    outside: set[bytes] = field(default_factory=set)  # layers that one stands on which is none of `layers`
    by_id: dict[bytes, LayerRow] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_id = {layer.id: layer for layer in self.layers}

    def needed_by(self) -> dict[bytes, bytes]:
        """Return for each layer the one fork that needs it, or _SEVERAL or _OTHERS."""
        forks = set(self.heads.values())
        found: dict[bytes, bytes] = {}

        def note(layer: bytes, user: bytes) -> None:
            before = found.get(layer, user)
            found[layer] = user if before == user else _OTHERS if _OTHERS in (user, before) else _SEVERAL

        for layer in reversed(self.layers):
            if layer.id in self.heads:
                note(layer.id, self.heads[layer.id])
            if layer.id in self.names:
                name = self.names[layer.id]
                note(layer.id, name if name in forks else _OTHERS)
            if layer.id in self.outside:
                note(layer.id, _OTHERS)
            if layer.parent is not None:
                note(layer.parent, found[layer.id])
        return found

    def going(self, fork: str | None, layers: Collection[bytes], named: Collection[bytes]) -> _Going:
        """Say what goes with these layers; `named` are all that have names of the forks that go."""
        gone = set(layers)
        below = [self.by_id[id].parent for id in layers]
        stops = dict.fromkeys(id for id in (*below, *named) if id is not None and id not in gone)
        return _Going(fork, list(layers), list(stops), list(self._runs(stops, gone)))

    def _runs(self, stops: Collection[bytes], gone: set[bytes]) -> Iterator[list[LayerRow]]:
        """Yield the runs of layers without a name that the layers `stops` are in when the layers `gone` are gone."""
        seen: set[bytes] = set()
        for id in stops:
            if id in self.names or id in seen:
                continue
            run = run_around(
                self.store.catalog, None, id, gone=gone
            )  # with a head, whose volume folds it when it is opened
            if run:
                seen.update(layer.id for layer in run)
                yield run


def usage_of_forks(store: OpenStore, name: str, snapshot: str | None) -> list[ForkUsage]:
    """Return what each fork of a volume, or of one of its snapshots, takes; what all of them take comes last."""
    with locked_maps(store, lambda: _find(store, name, snapshot), _Found.all_layers) as found:
        held = {layer.id: _held(store, layer) for layer in found.layers}
        freed = [
            sum(held[id] for id in one.layers) + sum(_freed(store, run, one.stops) for run in one.runs)
            for one in found.going
        ]
    parents = {layer.id: layer.parent for layer in found.layers}
    down: dict[bytes, int] = {}  # what a layer and all below it hold
    for layer in found.layers:
        down[layer.id] = held[layer.id] + (0 if layer.parent is None else down[layer.parent])
    folded = [private - sum(held[id] for id in one.layers) for private, one in zip(freed, found.going, strict=True)]
    return [
        ForkUsage(one.fork, private, _stays(one.stops, parents, held, down) - given_up)
        for one, private, given_up in zip(found.going, freed, folded, strict=True)
    ]


def _find(store: OpenStore, name: str, snapshot: str | None) -> _Found:
    """Find the layers of the forks, and what goes with each of them. Inside `reading`."""
    catalog = store.catalog
    source = catalog.volume(name)
    guid = None if snapshot is None else find_snapshot(catalog, source, snapshot).guid
    forks = catalog.forks_of(source.id) if guid is None else catalog.forks_of_snapshot(source.id, guid)
    named = catalog.snapshots_of_volumes([row.id for row in forks])
    forest = _forest(store, forks, parents_first(catalog.layers_of_forks(source.id, guid)))
    _refuse_missing(store, forest, forks, named)
    first = forest.needed_by()
    ours = {id for id, user in first.items() if user != _OTHERS}
    children = catalog.children_of_layers(ours)
    forest.outside = {row.parent for row in children if row.parent is not None and row.id not in forest.by_id}
    needed_by = forest.needed_by()
    layers_of: dict[bytes, list[bytes]] = {row.id: [] for row in forks}
    all_of_them: list[bytes] = []
    for layer in forest.layers:
        user = needed_by[layer.id]
        if user in layers_of:
            layers_of[user].append(layer.id)
        if user != _OTHERS:
            all_of_them.append(layer.id)
    names = {id: [one.layer for one in rows] for id, rows in named.items()}
    going = [forest.going(row.name, layers_of[row.id], names.get(row.id, [])) for row in forks]
    return _Found(forest.layers, [*going, forest.going(None, all_of_them, list(chain(*names.values())))])


def _forest(store: OpenStore, forks: Sequence[VolumeRow], layers: list[LayerRow]) -> _Forest:
    names = {row.layer: row.volume for row in store.catalog.snapshots_of_layers(layer.id for layer in layers)}
    return _Forest(store, layers, {row.head: row.id for row in forks}, names)


def _refuse_missing(
    store: OpenStore, forest: _Forest, forks: Sequence[VolumeRow], named: Mapping[bytes, Sequence[SnapshotRow]]
) -> None:
    tops = {row.head for row in forks} | {row.layer for rows in named.values() for row in rows}
    if missing := tops - forest.by_id.keys():
        raise damaged(
            store.catalog.path,
            f"layer {min(missing).hex()} is missing, or one below it, or they stand on each other in a circle",
        )


def _held(store: OpenStore, layer: LayerRow) -> int:
    """Return the bytes of data that a layer holds. A head that nothing was written to has no file, as in most forks."""
    if not layer.sealed and not store.layout.map_file(layer.map_id).exists():
        return 0
    with closing(open_map(store, layer)) as layer_map:
        return int(layer_map.count()[0]) * layer.block_size


def _freed(store: OpenStore, run: Sequence[LayerRow], stops: Collection[bytes]) -> int:
    """Return what folding a run gives back that was kept because something else stood on one of the layers `stops`."""
    pieces: list[list[LayerRow]] = [[]]
    for layer in run:
        pieces[-1].append(layer)
        if layer.id in stops:
            pieces.append([])
    return _hidden_in(store, run) - sum(_hidden_in(store, piece) for piece in pieces)


def _hidden_in(store: OpenStore, layers: Sequence[LayerRow]) -> int:
    if len(layers) < 2:
        return 0
    with closing(lay(store, layers)) as laid:
        return sum(laid.freed.values()) * layers[-1].block_size


def _stays(
    stops: Sequence[bytes],
    parents: Mapping[bytes, bytes | None],
    held: Mapping[bytes, int],
    down: Mapping[bytes, int],
) -> int:
    """Return what the layers `stops` and all below them hold. It is one layer, where no clone stands on a fork's snapshot."""
    if len(stops) == 1:
        return down[stops[0]]
    seen: set[bytes] = set()
    for id in stops:
        at: bytes | None = id
        while at is not None and at not in seen:
            seen.add(at)
            at = parents[at]
    return sum(held[id] for id in seen)


__all__ = ["ForkUsage", "usage_of_forks"]
