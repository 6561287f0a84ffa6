"""Forks of several disks together: of each disk as many, all in one transaction.

What must hold: all forks of a call are there, or none. Those disks of which the state now is asked for are cut at one
instant, whoever holds them (group_snapshot.py). The forks that belong together have one number.
"""

from collections.abc import Mapping
from datetime import timedelta
from functools import partial

from onionskin.base.naming import some_of
from onionskin.base.records import record
from onionskin.catalog import LayerRow, SnapshotRow, VolumeRow
from onionskin.catalog.sqlite_errors import damaged
from onionskin.catalog.tree import find_snapshot
from onionskin.errors import StateError
from onionskin.operations import forks
from onionskin.operations.fold import fold_where_unnamed
from onionskin.operations.forks import DoneBeforeError, Wanted
from onionskin.operations.group_snapshot import Finder, Opener, open_heads
from onionskin.operations.seal import Part, RemoteHead, seal_together
from onionskin.operations.snapshots import in_operations
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore

Forks = dict[str, list[str]]


@record
class GroupWanted:
    """A call of `Store.fork_group`, checked as far as that goes without the store: what is wanted of each source."""

    sources: Mapping[str, Wanted]
    key: str | None

    def digest(self) -> bytes:
        """Return what tells the call from another one under the same key."""
        import json
        from hashlib import sha256

        asked = [self.sources[source].digest().hex() for source in self.in_order()]
        return sha256(json.dumps(["group", asked]).encode()).digest()

    def in_order(self) -> list[str]:
        """Return the sources by their volumes: a mapping is the same in whatever order it was made."""
        return sorted(self.sources, key=lambda source: self.sources[source].volume)


def check_group(
    sources: Mapping[str, str | None],
    count: int | None,
    pattern: str | None,
    key: str | None,
    lifetime: "str | float | timedelta | None",
    labels: Mapping[str, str] | None,
    wipe: str | None,
) -> GroupWanted:
    """Check the arguments of a fork of several disks."""
    if not isinstance(sources, Mapping):
        raise TypeError(
            f"what is forked together is a mapping, such as {{'web': 'clean', 'db': None}}, not {sources!r}"
        )
    wanted = {
        source: forks.check_wanted(source, snapshot, None, count, pattern, None, lifetime, labels, wipe)
        for source, snapshot in sources.items()
    }
    if len({one.volume for one in wanted.values()}) < len(wanted):  # no pattern tells their names apart
        raise ValueError("a disk is named twice; fork it by two calls, each with names of its own")
    patterns = {(one.pattern.prefix, one.pattern.suffix) for one in wanted.values()}
    if len(patterns) < len(wanted):
        raise ValueError("forks of different disks would have the same names; put {source} into the pattern")
    if sum(one.count for one in wanted.values()) > forks.FORKS_MAX:
        raise ValueError(f"one call makes at most {forks.FORKS_MAX:,} forks, of all disks together")
    return GroupWanted(wanted, None if key is None else forks.check_key(key))


def fork_group(store: OpenStore, wanted: GroupWanted, opener: Opener, finder: Finder) -> Forks:
    """Make the forks. See `Store.fork_group`; `opener` and `finder` are as for `group_snapshot.Heads`."""
    cut = [one.volume for one in wanted.sources.values() if one.snapshot is None]
    try:
        if not wanted.sources:
            return {}
        if not cut:
            return store.change(lambda: _insert_all(store, wanted, {}))
        while True:
            with store.catalog.reading():  # before anything is sealed: a seal that is taken back leaves a segment more
                _refuse_done(store, wanted)
                _free_names(store, wanted)
            with open_heads(store, cut, opener, finder) as found:
                try:
                    return _cut_and_fork(store, wanted, found.heads)
                except StateError:
                    if not found.lost_one:
                        raise
    except DoneBeforeError as done:
        return _by_source(store, wanted, done.names)


def _cut_and_fork(store: OpenStore, wanted: GroupWanted, heads: "Mapping[str, OpenHead | RemoteHead]") -> Forks:
    """Seal the heads without names, and fork what was sealed."""
    sealed: dict[str, tuple[VolumeRow, LayerRow]] = {}
    made: Forks = {}

    def keep(volume: str, head: "OpenHead | RemoteHead", layer: LayerRow, _: LayerRow) -> None:
        sealed[volume] = (head.row, layer)

    def insert() -> None:
        made.update(_insert_all(store, wanted, sealed))

    with in_operations(list(heads.values())):
        parts = [
            Part(head, head.refuse_half_merged, partial(keep, volume, head), is_named=False)
            for volume, head in heads.items()
        ]
        layers = seal_together(store, parts, insert)
        for head, layer in zip(heads.values(), layers, strict=True):
            if isinstance(head, OpenHead):  # the cut before this one, where nothing else stands on it any more
                fold_where_unnamed(head, [layer.parent])
    return made


def _insert_all(store: OpenStore, wanted: GroupWanted, sealed: Mapping[str, tuple[VolumeRow, LayerRow]]) -> Forks:
    """Write the rows of all forks. Inside the transaction, which may run twice."""
    _refuse_done(store, wanted)
    names = _free_names(store, wanted)
    for source, one in wanted.sources.items():
        forks.insert_named(store, one, names[source], *_origin(store, one, sealed))
    if wanted.key is not None:
        every = [name for source in wanted.in_order() for name in names[source]]
        forks.note_call(store, wanted.key, wanted.digest(), every)
    return names


def _origin(
    store: OpenStore, wanted: Wanted, sealed: Mapping[str, tuple[VolumeRow, LayerRow]]
) -> tuple[VolumeRow, SnapshotRow | None, LayerRow]:
    """Return what forks begin as: the volume, the snapshot if it is one, and the layer."""
    volume = store.catalog.volume(wanted.volume)
    if wanted.snapshot is not None:
        row = find_snapshot(store.catalog, volume, wanted.snapshot)
        return volume, row, store.catalog.layer(row.layer)
    held, layer = sealed[wanted.volume]
    if volume.id != held.id:
        raise StateError(f"volume {wanted.volume!r} was renamed meanwhile; try again")
    return volume, None, layer


def _free_names(store: OpenStore, wanted: GroupWanted) -> Forks:
    """Return the names with the next numbers that no disk of the group has yet; none of them is taken."""
    patterns = {source: one.pattern for source, one in wanted.sources.items()}
    count = max(one.count for one in wanted.sources.values())  # of each disk as many
    numbers = forks.next_numbers(store, list(patterns.values()), count)
    names = {source: pattern.names(numbers) for source, pattern in patterns.items()}
    every = [name for found in names.values() for name in found]
    if len(set(every)) < len(every):
        twice = sorted({name for name in every if every.count(name) > 1})
        raise ValueError(
            f"forks of different disks would have the same names: {some_of(twice)}; choose another pattern"
        )
    forks.refuse_taken(store, every)
    return names


def _refuse_done(store: OpenStore, wanted: GroupWanted) -> None:
    """Raise DoneBeforeError if a call with the same key made the forks."""
    if wanted.key is not None and (made := forks.made_under(store, wanted.key, wanted.digest())) is not None:
        raise DoneBeforeError(made)


def _by_source(store: OpenStore, wanted: GroupWanted, names: list[str]) -> Forks:
    """Give the names of an earlier call back to the disks that they are of."""
    if len(names) != sum(one.count for one in wanted.sources.values()):
        raise damaged(
            store.catalog.path, f"what was forked under the key {wanted.key!r} are other names than were asked for"
        )
    rest = iter(names)
    made = {source: [next(rest) for _ in range(wanted.sources[source].count)] for source in wanted.in_order()}
    return {source: made[source] for source in wanted.sources}
