"""A plain model of a store for operations that run at the same time, and the search for an order that explains them.

A disk is a tuple of numbers, one for each unit of 2 KiB: 0 is a unit of zeros, any other number is a unit that was
written with it (units.py). An operation is a tuple: its name and its arguments. The model knows nothing of layers and
files. It does not know either when a store says that it is busy: that it may always say, as long as nothing happened.

What must hold of a run: there is one order of all operations, which keeps each actor's own order and puts nothing
before what had ended before it began, in which every result is what the model says, and at whose end the store is as
it was found. An operation that raised did nothing. One that was killed, or that met an injected error, was done or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

Disk = tuple[int, ...]
Operation = tuple[Any, ...]
Key = str  # names a volume for good, whatever its name is
NODES_MAX = 20000
NOTHING: Mapping[int, frozenset[int]] = {}


class RefusedError(Exception):
    """What the model says must be refused: `kind` is `not found`, `exists` or `needed`."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class WrongResultError(Exception):
    """An operation returned what it cannot have found in this state."""


@dataclass(frozen=True)
class Snap:
    """A name for a disk of the past; `parent` is the snapshot that it was written over."""

    disk: Disk
    parent: tuple[Key, str] | None


@dataclass(frozen=True)
class Volume:
    """A disk. `unflushed` has what else a unit may hold where the process dies.

    `source` is the volume that it was cloned or forked from. `expires`: its lifetime is over.
    """

    key: Key
    disk: Disk
    parent: tuple[Key, str] | None = None
    base: str | None = None
    unflushed: Mapping[int, frozenset[int]] = field(default_factory=dict)
    changed: bool = False  # since `parent`
    source: Key | None = None
    expires: bool = False

    def flushed(self) -> Volume:
        return replace(self, unflushed=NOTHING)


@dataclass(frozen=True)
class State:
    """A store, the images beside it, and the handles that are open: on a volume (its key), or on a snapshot's disk.

    `calls` has what was forked under a key: what was asked for, and the names.
    """

    volumes: Mapping[str, Volume] = field(default_factory=dict)
    snaps: Mapping[tuple[Key, str], Snap] = field(default_factory=dict)
    images: Mapping[str, Disk] = field(default_factory=dict)
    handles: Mapping[str, Key | Disk] = field(default_factory=dict)
    calls: Mapping[str, tuple[Any, tuple[str, ...]]] = field(default_factory=dict)
    holds: frozenset[tuple[Key, str, str]] = frozenset()  # the snapshot, and who holds it

    # ---- finding ----

    def volume(self, name: str) -> Volume:
        if name not in self.volumes:
            raise RefusedError("not found")
        return self.volumes[name]

    def named(self, handle: str) -> tuple[str, Volume]:
        key = self.handles.get(handle)
        for name, volume in self.volumes.items():
            if volume.key == key:
                return name, volume
        raise RefusedError("not found")  # deleted under its handle

    def snap(self, key: Key, name: str) -> Snap:
        if (key, name) not in self.snaps:
            raise RefusedError("not found")
        return self.snaps[key, name]

    def of(self, key: Key) -> set[str]:
        return {name for owner, name in self.snaps if owner == key}

    def descends(self, start: tuple[Key, str] | None, from_: tuple[Key, str]) -> bool:
        while start is not None:
            if start == from_:
                return True
            start = self.snaps[start].parent if start in self.snaps else None
        return False

    def refuse_held(self, going: set[tuple[Key, str]]) -> None:
        if any((key, snap) in going for key, snap, _ in self.holds):
            raise RefusedError("needed")

    def above(self, at: tuple[Key, str]) -> set[tuple[Key, str]]:
        return {other for other in self.snaps if other != at and self.descends(other, at)}

    # ---- changing ----

    def with_volume(self, name: str, volume: Volume) -> State:
        return replace(self, volumes={**self.volumes, name: volume})

    def with_image(self, path: str, disk: Disk) -> State:
        return replace(self, images={**self.images, path: disk})

    def with_handle(self, handle: str, what: Key | Disk) -> State:
        return replace(self, handles={**self.handles, handle: what})

    def without_snaps(self, gone: set[tuple[Key, str]]) -> State:
        return replace(self, snaps={at: snap for at, snap in self.snaps.items() if at not in gone})


# ---- what operations do: each returns the state after it, and checks the result where there is one ----


def _written(state: State, handle: str, first: int, units: Disk) -> State:
    name, volume = state.named(handle)
    if first + len(units) > len(volume.disk):
        raise RefusedError("bounds")
    disk = volume.disk[:first] + units + volume.disk[first + len(units) :]
    unflushed = dict(volume.unflushed)
    for unit in range(first, first + len(units)):
        unflushed[unit] = unflushed.get(unit, frozenset()) | {volume.disk[unit]}
    return state.with_volume(name, replace(volume, disk=disk, unflushed=unflushed, changed=True))


def write(state: State, result: Any, handle: str, first: int, stamp: int, count: int) -> State:
    return _written(state, handle, first, (stamp,) * count)


def trim(state: State, result: Any, handle: str, first: int, count: int) -> State:
    return _written(state, handle, first, (0,) * count)


def flush(state: State, result: Any, handle: str) -> State:
    name, volume = state.named(handle)
    return state.with_volume(name, volume.flushed())


def resize(state: State, result: Any, handle: str, units: int) -> State:
    name, volume = state.named(handle)
    disk = volume.disk[:units] + (0,) * (units - len(volume.disk))
    kept = {unit: values for unit, values in volume.unflushed.items() if unit < units}
    return state.with_volume(name, replace(volume, disk=disk, unflushed=kept, changed=True).flushed())


def snapshot(state: State, result: Any, handle: str, snap: str) -> State:
    return _with_snapshot(state, state.named(handle)[0], snap)


def snapshot_group(state: State, result: Any, names: tuple[str, ...], snap: str) -> State:
    for name in names:
        state.volume(name)  # all are looked up before any is cut
    for name in names:
        state = _with_snapshot(state, name, snap)
    return state


def _with_snapshot(state: State, name: str, snap: str) -> State:
    volume = state.volume(name)
    if (volume.key, snap) in state.snaps:
        raise RefusedError("exists")
    taken = {**state.snaps, (volume.key, snap): Snap(volume.disk, volume.parent)}
    after = replace(volume, parent=(volume.key, snap), changed=False).flushed()
    return replace(state, snaps=taken).with_volume(name, after)


def revert(state: State, result: Any, handle: str, snap: str) -> State:
    name, volume = state.named(handle)
    disk = state.snap(volume.key, snap).disk
    return state.with_volume(name, replace(volume, disk=disk, parent=(volume.key, snap), changed=False).flushed())


def discard(state: State, result: Any, handle: str, snap: str, recursive: bool) -> State:
    name, volume = state.named(handle)
    at = (volume.key, snap)
    taken = state.snap(*at)
    above = state.above(at)
    others = any(key != volume.key for key, _ in above) or any(
        other.key != volume.key and state.descends(other.parent, at) for other in state.volumes.values()
    )
    if others or (above and not recursive):
        raise RefusedError("needed")
    state.refuse_held(above | {at})
    after = state.without_snaps(above | {at})
    if state.descends(volume.parent, at):
        volume = replace(volume, disk=taken.disk, parent=taken.parent, changed=False).flushed()
    return after.with_volume(name, volume)


def merge(state: State, result: Any, handle: str, snap: str) -> State:
    _, volume = state.named(handle)
    at = (volume.key, snap)
    below = state.snap(*at).parent
    state.refuse_held({at})
    snaps = {
        key: replace(other, parent=below) if other.parent == at else other
        for key, other in state.snaps.items()
        if key != at
    }
    volumes = {
        name: replace(other, parent=below, changed=True) if other.parent == at else other
        for name, other in state.volumes.items()
    }
    return replace(state, snaps=snaps, volumes=volumes)


def merge_base(state: State, result: Any, handle: str, snap: str | None) -> State:
    _, volume = state.named(handle)
    if volume.base is None:
        raise RefusedError("needed")
    disk = volume.disk if snap is None else state.snap(volume.key, snap).disk
    return state.with_image(volume.base, disk)


def flatten(state: State, result: Any, handle: str) -> State:
    name, volume = state.named(handle)
    # The disk stands on nothing from then on, so a discard of a snapshot that it stood on leaves it alone.
    return state.with_volume(name, replace(volume, parent=None, base=None))


def export(state: State, result: Any, handle: str, path: str) -> State:
    what = state.handles.get(handle)
    disk = what if isinstance(what, tuple) else state.named(handle)[1].disk
    return state.with_image(path, disk)


def apply(state: State, result: Any, handle: str, snap: str, disk: Disk, start: Disk) -> State:
    name, volume = state.named(handle)
    if (volume.key, snap) in state.snaps:
        raise RefusedError("exists")
    if volume.disk != start:
        raise RefusedError("needed")
    taken = {**state.snaps, (volume.key, snap): Snap(disk, volume.parent)}
    after = replace(volume, disk=disk, parent=(volume.key, snap), changed=False).flushed()
    return replace(state, snaps=taken).with_volume(name, after)


def close(state: State, result: Any, handle: str) -> State:
    if not isinstance(state.handles.get(handle), tuple):
        with suppress(RefusedError):  # it is deleted: `held` says whether it may be
            state = flush(state, None, handle)
    return replace(state, handles={other: what for other, what in state.handles.items() if other != handle})


def open_(state: State, result: Any, handle: str, name: str) -> State:
    return state.with_handle(handle, state.volume(name).key)


def view(state: State, result: Any, handle: str, name: str, snap: str) -> State:
    return state.with_handle(handle, state.snap(state.volume(name).key, snap).disk)


def create(state: State, result: Any, handle: str, name: str, units: int, base: str | None, key: Key) -> State:
    if name in state.volumes:
        raise RefusedError("exists")
    disk = (state.images[base] if base else ())[:units]
    state = state.with_volume(name, Volume(key, disk + (0,) * (units - len(disk)), base=base))
    return state.with_handle(handle, key)


def take_back(state: State, result: Any, made: Operation) -> State:
    """Remove the volume that a failed operation made, if it is there: others may have seen it."""
    handle, name, key = made[1], made[2], made[-1]
    if made[0] == "temporary":
        name, key = made[4], f"{key} {made[4]}"
    if name not in state.volumes or state.volumes[name].key != key:
        raise RefusedError("not found")
    return delete(gone(state, None, (handle,)), None, name)


def import_(state: State, result: Any, path: str, name: str, key: Key) -> State:
    if name in state.volumes:
        raise RefusedError("exists")
    return state.with_volume(name, Volume(key, state.images[path]))


def clone(state: State, result: Any, name: str, snap: str, new: str, key: Key) -> State:
    source = state.volume(name)
    disk = state.snap(source.key, snap).disk
    if new in state.volumes:
        raise RefusedError("exists")
    return state.with_volume(new, Volume(key, disk, (source.key, snap), source.base, source=source.key))


def fork(state: State, result: Any, name: str, snap: str | None, new: tuple[str, ...], key: Key) -> State:
    """All of them, or none. What was written to a disk that is forked as it is, is flushed."""
    source = state.volume(name)
    if snap is None:
        state = state.with_volume(name, source.flushed())
    disk = source.disk if snap is None else state.snap(source.key, snap).disk
    parent = source.parent if snap is None else (source.key, snap)
    if any(one in state.volumes for one in new):
        raise RefusedError("exists")
    for one in new:
        state = state.with_volume(one, Volume(f"{key} {one}", disk, parent, source.base, source=source.key))
    return state if result is None else _same(state, result, list(new))


def fork_numbered(state: State, result: Any, name: str, snap: str, count: int, key: Key) -> State:
    return fork(state, result, name, snap, _next_numbers(state, name, count), key)


def _next_numbers(state: State, name: str, count: int) -> tuple[str, ...]:
    """They go on from the greatest that there is."""
    used = [int(there.removeprefix(f"{name}-")) for there in state.volumes if there.startswith(f"{name}-")]
    first = max(used, default=0) + 1
    return tuple(f"{name}-{number}" for number in range(first, first + count))


def fork_with_key(
    state: State, result: Any, name: str, snap: str | None, call: str, asked: int | tuple[str, ...], key: Key
) -> State:
    """The same call again makes nothing; another one is refused. `asked`: the names, or how many with numbers."""
    if call not in state.calls:
        new = _next_numbers(state, name, asked) if isinstance(asked, int) else asked
        state = fork(state, result, name, snap, new, key)
        return replace(state, calls={**state.calls, call: ((name, snap, asked), new)})
    before, new = state.calls[call]
    if before != (name, snap, asked):
        raise RefusedError("needed")
    return state if result is None else _same(state, result, list(new))


def temporary(state: State, result: Any, handle: str, name: str, snap: str | None, new: str, key: Key) -> State:
    return open_(fork(state, None, name, snap, (new,), key), None, handle, new)


def end_temporary(state: State, result: Any, handle: str) -> State:
    name, _ = state.named(handle)
    return delete(close(state, None, handle), None, name)


def expire(state: State, result: Any) -> State:
    """None goes that is open, has snapshots, or that another one comes from; somebody may look at one just now."""
    sources = {volume.source for volume in state.volumes.values()}
    going = {
        name
        for name, volume in state.volumes.items()
        if volume.expires
        and not (state.of(volume.key) or volume.key in sources or volume.key in state.handles.values())
    }
    if result is not None:
        if not set(result) <= going:
            raise WrongResultError(f"{result} expired, and only {sorted(going)} may")
        going = set(result)
    return replace(state, volumes={name: found for name, found in state.volumes.items() if name not in going})


def delete(state: State, result: Any, name: str) -> State:
    return delete_several(state, result, (name,))


def delete_several(state: State, result: Any, names: tuple[str, ...]) -> State:
    going = {state.volume(name).key for name in names}
    own = {(key, snap) for key, snap in state.snaps if key in going}
    for at in own:
        users = {key for key, _ in state.above(at) if key not in going}
        heads = [v for v in state.volumes.values() if v.key not in going and state.descends(v.parent, at)]
        if users or heads:
            raise RefusedError("needed")
    state.refuse_held(own)
    if going & {what for what in state.handles.values() if isinstance(what, str)}:
        raise RefusedError("needed")
    left = {other: found for other, found in state.volumes.items() if other not in names}
    return replace(state, volumes=left).without_snaps(own)


def rename(state: State, result: Any, name: str, new: str) -> State:
    volume = state.volume(name)
    if new in state.volumes and new != name:
        raise RefusedError("exists")
    left = {other: found for other, found in state.volumes.items() if other != name}
    return replace(state, volumes={**left, new: volume})


def relocate(state: State, result: Any, name: str, path: str) -> State:
    old = state.volume(name).base
    if old is None or state.images[path] != state.images[old]:
        raise RefusedError("needed")  # its time of modification tells that it is another image
    volumes = {n: replace(v, base=path) if v.base == old else v for n, v in state.volumes.items()}
    return replace(state, volumes=volumes)


def hold(state: State, result: Any, name: str, snap: str, holder: str) -> State:
    key = state.volume(name).key
    state.snap(key, snap)
    if (key, snap, holder) in state.holds:
        raise RefusedError("needed")
    return replace(state, holds=state.holds | {(key, snap, holder)})


def unhold(state: State, result: Any, name: str, snap: str, holder: str) -> State:
    key = state.volume(name).key
    state.snap(key, snap)
    if (key, snap, holder) not in state.holds:
        raise RefusedError("needed")
    return replace(state, holds=state.holds - {(key, snap, holder)})


def holds(state: State, result: Any, name: str) -> State:
    key = state.volume(name).key
    return _same(state, result, {(snap, holder) for owner, snap, holder in state.holds if owner == key})


def rename_snapshot(state: State, result: Any, name: str, old: str, new: str) -> State:
    key = state.volume(name).key
    state.snap(key, old)
    if (key, new) in state.snaps:
        raise RefusedError("exists")
    return _renamed(state, (key, old), (key, new))


def _renamed(state: State, old: tuple[Key, str], new: tuple[Key, str]) -> State:
    def now(at: tuple[Key, str] | None) -> tuple[Key, str] | None:
        return new if at == old else at

    snaps = {now(at): replace(snap, parent=now(snap.parent)) for at, snap in state.snaps.items()}
    volumes = {name: replace(volume, parent=now(volume.parent)) for name, volume in state.volumes.items()}
    held = frozenset((*(new if (key, snap) == old else (key, snap)), holder) for key, snap, holder in state.holds)
    return replace(state, snaps=snaps, volumes=volumes, holds=held)


def set_note(state: State, result: Any, name: str, snap: str, note: str) -> State:
    state.snap(state.volume(name).key, snap)
    return state


def prune(state: State, result: Any, name: str) -> State:
    """What somebody holds is kept too."""
    volume = state.volume(name)
    held = {snap for key, snap, _ in state.holds if key == volume.key}
    if result is None:
        result = [snap for key, snap in state.snaps if key == volume.key][:-1]  # the newest is the last
        result = [snap for snap in result if snap not in held]
    elif not held and state.of(volume.key) and len(state.of(volume.key) - set(result)) != 1:
        raise WrongResultError(f"prune dropped {result} of {sorted(state.of(volume.key))}")
    state = state.with_handle("prunes", volume.key)
    for snap in result:
        state = merge(state, None, "prunes", snap)
    return replace(state, handles={handle: what for handle, what in state.handles.items() if handle != "prunes"})


def prune_open(state: State, result: Any, handle: str) -> State:
    return prune(state, result, state.named(handle)[0])


def set_wipe(state: State, result: Any, name: str) -> State:
    state.volume(name)
    return state


def fork_group(state: State, result: Any, sources: tuple[tuple[str, str | None], ...], key: str) -> State:
    for index, (name, snap) in enumerate(sources):
        names = result[index] if result else (f"{name}g1",)
        state = fork(state, None, name, snap, names, f"{key} {index}")
    return state


def _disk_of(state: State, at: tuple[str, str]) -> Disk:
    return state.snap(state.volume(at[0]).key, at[1]).disk


def compare(state: State, result: Any, a: tuple[str, str], b: tuple[str, str]) -> State:
    pairs = enumerate(zip(_disk_of(state, a), _disk_of(state, b), strict=False))
    return _same(state, result, next((unit for unit, (one, other) in pairs if one != other), None))


def delta_across(state: State, result: Any, a: tuple[str, str], b: tuple[str, str]) -> State:
    disk, disk_b = list(_disk_of(state, a)), _disk_of(state, b)
    header, units = result
    for unit, value in units.items():
        disk[unit] = value
    _same(state, header, b[1])
    return _same(state, tuple(disk), disk_b)


def volumes(state: State, result: Any) -> State:
    wanted = {name: len(state.of(volume.key)) for name, volume in state.volumes.items()}
    return _same(state, result, wanted)


def tree(state: State, result: Any) -> State:
    names = {volume.key: name for name, volume in state.volumes.items()}
    return _same(state, result, set(names.values()) | {f"{names[key]}@{snap}" for key, snap in state.snaps})


def usage(state: State, result: Any, name: str) -> State:
    return _same(state, result, state.of(state.volume(name).key))


def usage_of_forks(state: State, result: Any, name: str) -> State:
    key = state.volume(name).key
    return _same(state, result, {fork for fork, volume in state.volumes.items() if volume.source == key})


def parent(state: State, result: Any, handle: str) -> State:
    _, volume = state.named(handle)
    at = volume.parent
    while at is not None and at[0] != volume.key:
        at = state.snaps[at].parent if at in state.snaps else None
    return _same(state, result, at[1] if at else None)


def changed(state: State, result: Any, handle: str) -> State:
    """What was written is a change; what was only folded or flattened may be taken for one."""
    if state.named(handle)[1].changed and not result:
        raise WrongResultError("the disk was changed, and is said to be as its snapshot")
    return state


def own_diff(state: State, result: Any, handle: str, snap: str) -> State:
    return diff(state, result, state.named(handle)[0], snap, None)


def own_usage(state: State, result: Any, handle: str) -> State:
    return usage(state, result, state.named(handle)[0])


def own_layering(state: State, result: Any, handle: str) -> State:
    return layering(state, result, state.named(handle)[0], None)


def layering(state: State, result: Any, name: str, snap: str | None) -> State:
    volume = state.volume(name)
    disk = volume.disk if snap is None else state.snap(volume.key, snap).disk
    return _same(state, result, len(disk))


def diff(state: State, result: Any, name: str, a: str, b: str | None) -> State:
    """What differs must be listed; what was not flushed may be."""
    volume = state.volume(name)
    disk_a = state.snap(volume.key, a).disk
    disk_b = volume.disk if b is None else state.snap(volume.key, b).disk
    unsure = set(volume.unflushed) if b is None else set()
    differs = {u for u in range(min(len(disk_a), len(disk_b))) if disk_a[u] != disk_b[u]} - unsure
    if not differs <= result:
        raise WrongResultError(f"units {sorted(differs - result)} differ and are not listed")
    return state


def delta(state: State, result: Any, name: str, a: str | None, b: str) -> State:
    volume = state.volume(name)
    disk_b = state.snap(volume.key, b).disk
    disk = list(state.snap(volume.key, a).disk if a else (0,) * len(disk_b))
    header, units = result
    for unit, value in units.items():
        disk[unit] = value
    _same(state, header, b)
    return _same(state, tuple(disk), disk_b)


def nothing(state: State, result: Any, *arguments: Any) -> State:
    return state


def sound(state: State, result: Any) -> State:
    return _same(state, result, [])


def held(state: State, result: Any, handle: str) -> State:
    return _same(state, result, True)


def gone(state: State, result: Any, handles: tuple[str, ...]) -> State:
    """A process died: its handles went with it."""
    return replace(state, handles={h: what for h, what in state.handles.items() if h not in handles})


def _same(state: State, found: Any, wanted: Any) -> State:
    if found != wanted:
        raise WrongResultError(f"{found!r} instead of {wanted!r}")
    return state


RULES: dict[str, Callable[..., State]] = {
    "write": write, "trim": trim, "flush": flush, "resize": resize, "snapshot": snapshot, "revert": revert,
    "discard": discard, "merge": merge, "merge_base": merge_base, "flatten": flatten, "export": export, "apply": apply,
    "close": close, "open": open_, "view": view, "create": create, "import": import_, "clone": clone, "delete": delete,
    "delete_several": delete_several, "fork": fork, "fork_numbered": fork_numbered, "fork_with_key": fork_with_key,
    "temporary": temporary, "end_temporary": end_temporary, "snapshot_group": snapshot_group, "expire": expire,
    "rename": rename, "relocate": relocate, "volumes": volumes, "tree": tree, "usage": usage, "layering": layering,
    "diff": diff, "delta": delta, "check": sound, "repair": sound, "held": held, "gone": gone, "store": nothing,
    "read": nothing, "take_back": take_back, "usage_of_forks": usage_of_forks, "parent": parent, "changed": changed,
    "hold": hold, "unhold": unhold, "holds": holds, "rename_snapshot": rename_snapshot, "set_note": set_note,
    "prune": prune, "prune_open": prune_open, "set_wipe": set_wipe, "set_defaults": nothing, "fork_group": fork_group,
    "import_stream": import_, "compare": compare, "delta_across": delta_across,
    "extents": nothing, "own_diff": own_diff, "own_usage": own_usage, "own_layering": own_layering,
}  # fmt: skip


# ---- the search ----


@dataclass(frozen=True)
class Event:
    """One operation as it ran. status: `done`, `raised`, `maybe` (killed in it, or raised by an injected error).

    `begun` and `ended` order it among the events of others.
    """

    operation: Operation
    status: str
    result: Any
    begun: int
    ended: int


@dataclass(frozen=True)
class Found:
    """A store as it was found at the end: what each volume, each snapshot (volume name, name) and each image reads."""

    volumes: Mapping[str, Disk]
    snaps: Mapping[tuple[str, str], Disk]
    images: Mapping[str, Disk]
    passed: frozenset[str] = frozenset()  # volumes that are there, and were not read


@dataclass
class Explanation:
    """Whether an order was found; if not, what was nearest to one. `late`: an operation that raised had been done."""

    found: bool = False
    unknown: bool = False  # there were too many orders to try them all
    late: str | None = None
    nearest: str = "no order of the operations gives their results"
    distance: int = 1 << 30


def explain(initial: State, actors: list[list[Event]], found: Found, *, faulty: bool, torn: set[str]) -> Explanation:
    """Look for an order. `faulty`: what was not flushed may be lost. `torn`: images that may be half merged."""
    best = Explanation()
    for late_allowed in (False, True):
        search = _Search(actors, late_allowed, best)
        for state, late in search.orders(initial, tuple(0 for _ in actors), None):
            why = _differences(state, found, faulty, torn)
            if not why:
                return Explanation(found=True, late=late)
            if len(why) < best.distance:
                best.distance, best.nearest = len(why), "; ".join(why[:4])
        best.unknown |= search.left <= 0
    return best


class _Search:
    """Goes through the orders of events; each state is gone on from once at each place in them."""

    def __init__(self, actors: list[list[Event]], late_allowed: bool, best: Explanation) -> None:
        self.actors, self.late_allowed, self.best = actors, late_allowed, best
        self.seen: set[object] = set()
        self.left = NODES_MAX

    def orders(self, state: State, at: tuple[int, ...], late: str | None) -> Iterator[tuple[State, str | None]]:
        key = (at, late, repr(state))
        self.left -= 1
        if key in self.seen or self.left <= 0:
            return
        self.seen.add(key)
        if all(position == len(events) for position, events in zip(at, self.actors, strict=True)):
            yield state, late
            return
        for which, events in enumerate(self.actors):
            if at[which] == len(events) or self._comes_later(events[at[which]], at, which):
                continue
            after = tuple(position + (w == which) for w, position in enumerate(at))
            for reached, now_late in self.after(state, events[at[which]], at, which):
                yield from self.orders(reached, after, late or now_late)

    def _comes_later(self, event: Event, at: tuple[int, ...], which: int) -> bool:
        """Whether something that has not had its turn ended before the event began."""
        return any(
            w != which and position < len(events) and events[position].ended < event.begun
            for w, (position, events) in enumerate(zip(at, self.actors, strict=True))
        )

    def _beside_a_failure(self, event: Event) -> bool:
        """Whether it ran beside an operation that failed: what that had done already, and took back, may have been seen."""
        return any(
            other.status == "maybe" and other.begun < event.ended and event.begun < other.ended
            for events in self.actors
            for other in events
        )

    def after(self, state: State, event: Event, at: tuple[int, ...], which: int) -> Iterator[tuple[State, str | None]]:
        """Return the states in which an operation may leave a state."""
        name, *arguments = event.operation
        if event.status != "done":
            try:
                done = _done_unseen(state, name, arguments)
            except RefusedError as refusal:
                if event.status == "maybe" or event.result in ("busy", str(refusal)):
                    yield state, None
                return
            if event.status == "maybe" or event.result == "busy" or self._beside_a_failure(event):
                yield state, None
            if name not in _LOOK and (event.status == "maybe" or self.late_allowed):
                yield done, f"{name} raised and was done" if event.status == "raised" else None
            return
        try:
            if name == "read":
                _check_read(state, event, self.actors, at, which)
            yield RULES[name](state, event.result, *arguments), None
        except RefusedError as refusal:
            _note(self.best, f"{name} was done, and had to be refused ({refusal})")
        except WrongResultError as wrong:
            _note(self.best, f"{name}{tuple(arguments)}: {wrong}")


def _done_unseen(state: State, name: str, arguments: list[Any]) -> State:
    """Do an operation whose result nobody saw."""
    if name not in _LOOK:
        return RULES[name](state, None, *arguments)
    with suppress(WrongResultError, TypeError):
        RULES[name](state, None, *arguments)  # for what it refuses
    return state


_LOOK = {
    "volumes", "tree", "usage", "layering", "diff", "delta", "check", "repair", "held", "store", "read",
    "usage_of_forks", "parent", "changed", "extents", "own_diff", "own_usage", "own_layering", "holds", "compare",
    "delta_across",
}  # fmt: skip


def _note(best: Explanation, what: str) -> None:
    if best.distance > 1 << 20:
        best.nearest = what


def _check_read(state: State, event: Event, actors: list[list[Event]], at: tuple[int, ...], which: int) -> None:
    """A unit of a read has one of the values that it had while the read ran."""
    _, handle, first = event.operation
    allowed = [set() for _ in event.result]
    for reached in (state, *_meanwhile(state, event, actors, at, which)):
        what = reached.handles.get(handle)
        try:
            disk = what if isinstance(what, tuple) else reached.named(handle)[1].disk
        except RefusedError:
            continue
        for index in range(len(event.result)):
            if first + index < len(disk):
                allowed[index].add(disk[first + index])
    for index, values in enumerate(event.result):
        if not values <= allowed[index]:
            raise WrongResultError(f"unit {first + index} reads {sorted(values)}, and had {sorted(allowed[index])}")


def _meanwhile(
    state: State, event: Event, actors: list[list[Event]], at: tuple[int, ...], which: int
) -> Iterator[State]:
    """Return states that others lead to while an operation runs."""
    for other, events in enumerate(actors):
        reached = state
        for step in events[at[other] :] if other != which else ():
            if step.begun > event.ended:
                break
            with suppress(RefusedError):
                reached = _done_unseen(reached, step.operation[0], list(step.operation[1:]))
                yield reached


def _differences(state: State, found: Found, faulty: bool, torn: set[str]) -> list[str]:
    why = []
    names = {volume.key: name for name, volume in state.volumes.items()}
    there = set(found.volumes) | found.passed
    if there != set(state.volumes):
        why.append(f"volumes {sorted(there)} instead of {sorted(state.volumes)}")
    snaps = {(names[key], snap): taken.disk for (key, snap), taken in state.snaps.items() if key in names}
    snaps = {at: disk for at, disk in snaps.items() if at[0] not in found.passed}
    if set(found.snaps) != set(snaps):
        why.append(f"snapshots {sorted(found.snaps)} instead of {sorted(snaps)}")
    for name, volume in state.volumes.items():
        if name in found.volumes:
            unsure = volume.unflushed if faulty else NOTHING
            why += _compare(f"head of {name}", found.volumes[name], volume.disk, unsure)
    for at, disk in snaps.items():
        if at in found.snaps:
            why += _compare("@".join(at), found.snaps[at], disk, NOTHING)
    for path, disk in state.images.items():
        if path in torn:
            continue
        if path not in found.images:
            why.append(f"{path} is not there")
        else:
            why += _compare(path, found.images[path], disk, NOTHING)
    return why


def _compare(what: str, found: Disk, wanted: Disk, unsure: Mapping[int, frozenset[int]]) -> list[str]:
    if len(found) != len(wanted):
        return [f"{what} has {len(found)} units instead of {len(wanted)}"]
    wrong = [u for u in range(len(found)) if found[u] != wanted[u] and found[u] not in unsure.get(u, ())]
    shown = [f"{u}: {found[u]} for {wanted[u]}" for u in wrong[:6]]
    return [f"{what} reads wrong in {len(wrong)} units ({', '.join(shown)})"] if wrong else []
