"""A plain model of a store that three actors use at once, and the search for an order that explains what they did.

A disk is a tuple of numbers, one for each block. The model knows nothing of layers, files and locks, nor when a store says
that it is busy: that it may always say, as long as nothing happened.

What must hold: there is one order of all operations that puts nothing before what had ended before it began, in which each
result is what the model says. What takes the disk at one instant and gives it a name later (a fork of a disk as it is, a
snapshot of a served one) are two steps in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Disk = tuple[int, ...]
Step = Callable[["State", Any], tuple["State", Any]]
NODES_MAX = 400_000


class RefusedError(Exception):
    """What the model says must be refused: `not found`, `exists` or `needed`."""


class WrongResultError(Exception):
    """An operation returned what it cannot have found in this state."""


@dataclass(frozen=True)
class Snap:
    """A name for a disk of the past; `parent` is the snapshot that it was written over."""

    volume: str
    name: str
    disk: Disk
    parent: str | None


@dataclass(frozen=True)
class Volume:
    """A disk, the snapshot it was written over, the volume it was forked from, and whether its lifetime is over."""

    disk: Disk
    parent: str | None = None
    source: str | None = None
    expires: bool = False


@dataclass(frozen=True)
class State:
    """A store and the handles that are open. Volumes and snapshots have keys that never change."""

    names: Mapping[str, str] = field(default_factory=dict)
    volumes: Mapping[str, Volume] = field(default_factory=dict)
    snaps: Mapping[str, Snap] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=dict)
    clients: Mapping[str, str] = field(default_factory=dict)
    lives: Mapping[str, str] = field(default_factory=dict)
    views: Mapping[str, Disk] = field(default_factory=dict)
    calls: Mapping[str, Any] = field(default_factory=dict)
    holds: frozenset[tuple[str, str]] = frozenset()

    def key(self) -> Any:
        tables = (self.names, self.volumes, self.snaps, self.heads, self.clients, self.lives, self.views, self.calls)
        return (*(frozenset(table.items()) for table in tables), self.holds)

    def volume(self, name: str) -> str:
        if name not in self.names:
            raise RefusedError("not found")
        return self.names[name]

    def name_of(self, key: str) -> str:
        return next(name for name, one in self.names.items() if one == key)

    def snap(self, volume: str, name: str) -> str:
        for key, one in self.snaps.items():
            if (one.volume, one.name) == (volume, name):
                return key
        raise RefusedError("not found")

    def snaps_of(self, volume: str) -> list[str]:
        return [key for key, one in self.snaps.items() if one.volume == volume]

    def descends(self, start: str | None, from_: str) -> bool:
        while start is not None:
            if start == from_:
                return True
            start = self.snaps[start].parent if start in self.snaps else None
        return False

    def with_disk(self, key: str, **changes: Any) -> State:
        if key not in self.volumes:
            raise RefusedError("not found")
        return replace(self, volumes={**self.volumes, key: replace(self.volumes[key], **changes)})

    def without_snaps(self, gone: set[str]) -> State:
        return replace(
            self,
            snaps={key: one for key, one in self.snaps.items() if key not in gone},
            holds=frozenset(hold for hold in self.holds if hold[0] not in gone),
        )

    def refuse_held(self, going: set[str]) -> None:
        if any(key in going for key, _ in self.holds):
            raise RefusedError("needed")


@dataclass(frozen=True)
class Event:
    """One operation as it ran. outcome: `done`, what it raised, or `maybe` (its process or its server was killed)."""

    number: int
    op: tuple[Any, ...]
    begun: int
    ended: int
    outcome: str
    result: Any = None
    why: str = ""


def _without(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: one for key, one in table.items() if key not in keys}


def _same(found: Any, wanted: Any) -> None:
    if found != wanted:
        raise WrongResultError(f"{found!r} instead of {wanted!r}")


# ---- what operations do ----


class Rules:
    """The steps of one operation."""

    def __init__(self, event: Event) -> None:
        self.event = event
        self.name, *self.arguments = event.op
        self.is_known = event.outcome == "done"  # whether its result was seen

    def ways(self) -> list[list[Step]]:
        """Return the ways in which it may have been done, each in steps."""
        found = getattr(self, f"of_{self.name}")(*self.arguments)
        return found if isinstance(found, list) else [[lambda state, _: (found(state), None)]]

    def check(self, wanted: Any) -> None:
        if self.is_known:
            _same(self.event.result, wanted)

    # ---- a volume that is open ----

    def _refuse_taken(self, state: State, key: str) -> None:
        if key in state.heads.values() or key in state.clients.values():
            raise RefusedError("needed")

    def of_open(self, handle: str, name: str) -> Any:
        def step(state: State) -> State:
            key = state.volume(name)
            self._refuse_taken(state, key)
            return replace(state, heads={**state.heads, handle: key})

        return step

    def _change(self, table: str, handle: str, block: int, stamp: int) -> Any:
        def step(state: State) -> State:
            key = getattr(state, table)[handle]
            if key not in state.volumes:
                raise RefusedError("not found")
            disk = state.volumes[key].disk
            return state.with_disk(key, disk=(*disk[:block], stamp, *disk[block + 1 :]))

        return step

    def of_write(self, handle: str, block: int, stamp: int) -> Any:
        return self._change("heads", handle, block, stamp)

    def of_trim(self, handle: str, block: int) -> Any:
        return self._change("heads", handle, block, 0)

    def of_nwrite(self, handle: str, block: int, stamp: int) -> Any:
        return self._change("clients", handle, block, stamp)

    def of_ltrim(self, handle: str, block: int) -> Any:
        return self._change("lives", handle, block, 0)

    def of_read(self, handle: str) -> Any:
        def step(state: State) -> State:
            self.check(list(state.volumes[state.heads[handle]].disk))
            return state

        return step

    def of_nread(self, handle: str, block: int) -> Any:
        def step(state: State) -> State:
            self.check(state.volumes[state.clients[handle]].disk[block])
            return state

        return step

    def of_flush(self, handle: str) -> Any:
        return lambda state: state

    of_nflush = of_flush

    def _cut(self, keys: Callable[[State], list[str]], snap: str) -> list[list[Step]]:
        def find(state: State, _: Any) -> tuple[State, Any]:
            return state, tuple(keys(state))  # it is these volumes, whatever they are called when they are cut

        def cut(state: State, found: Any) -> tuple[State, Any]:
            if any(key not in state.volumes for key in found):
                raise RefusedError("not found")
            return state, tuple((key, state.volumes[key].disk, state.volumes[key].parent) for key in found)

        def give_names(state: State, disks: Any) -> tuple[State, Any]:
            for key, disk, parent in disks:
                if any((one.volume, one.name) == (key, snap) for one in state.snaps.values()):
                    raise RefusedError("exists")
                taken = f"{self.event.number} {key}"
                state = replace(state, snaps={**state.snaps, taken: Snap(key, snap, disk, parent)})
                state = state.with_disk(key, parent=taken)
            return state, None

        return [[find, cut, give_names]]

    def of_snapshot(self, handle: str, snap: str) -> Any:
        return self._cut(lambda state: [state.heads[handle]], snap)

    def of_lsnapshot(self, handle: str, snap: str) -> Any:
        return self._cut(lambda state: [state.lives[handle]], snap)

    def of_group(self, names: list[str], snap: str) -> Any:
        return self._cut(lambda state: [state.volume(name) for name in names], snap)

    def _revert(self, table: str, handle: str, snap: str) -> Any:
        def step(state: State) -> State:
            key = getattr(state, table)[handle]
            taken = state.snap(key, snap)
            return state.with_disk(key, disk=state.snaps[taken].disk, parent=taken)

        return step

    def of_revert(self, handle: str, snap: str) -> Any:
        return self._revert("heads", handle, snap)

    def of_lrevert(self, handle: str, snap: str) -> Any:
        return self._revert("lives", handle, snap)

    def _merge(self, table: str, handle: str, snap: str) -> Any:
        def step(state: State) -> State:
            gone = state.snap(getattr(state, table)[handle], snap)
            state.refuse_held({gone})
            below = state.snaps[gone].parent
            state = replace(
                state,
                snaps={k: replace(s, parent=below) if s.parent == gone else s for k, s in state.snaps.items()},
                volumes={k: replace(v, parent=below) if v.parent == gone else v for k, v in state.volumes.items()},
            )
            return state.without_snaps({gone})

        return step

    def of_merge(self, handle: str, snap: str) -> Any:
        return self._merge("heads", handle, snap)

    def of_lmerge(self, handle: str, snap: str) -> Any:
        return self._merge("lives", handle, snap)

    def _discard(self, table: str, handle: str, snap: str) -> Any:
        def step(state: State) -> State:
            key = getattr(state, table)[handle]
            gone = state.snap(key, snap)
            state.refuse_held({gone})
            above = any(other != gone and state.descends(other, gone) for other in state.snaps)
            others = any(k != key and state.descends(v.parent, gone) for k, v in state.volumes.items())
            if above or others:
                raise RefusedError("needed")
            taken = state.snaps[gone]
            if state.descends(state.volumes[key].parent, gone):
                state = state.with_disk(key, disk=taken.disk, parent=taken.parent)
            return state.without_snaps({gone})

        return step

    def of_discard(self, handle: str, snap: str) -> Any:
        return self._discard("heads", handle, snap)

    def of_ldiscard(self, handle: str, snap: str) -> Any:
        return self._discard("lives", handle, snap)

    def of_flatten(self, handle: str) -> Any:
        return lambda state: state.with_disk(state.heads[handle], parent=None)

    def of_merge_base(self, handle: str) -> Any:
        return lambda state: state

    def of_close(self, handle: str) -> Any:
        return lambda state: replace(state, heads=_without(state.heads, handle))

    # ---- views ----

    def of_view(self, handle: str, name: str, snap: str) -> Any:
        def step(state: State) -> State:
            disk = state.snaps[state.snap(state.volume(name), snap)].disk
            self.check(list(disk))
            return replace(state, views={**state.views, handle: disk})

        return step

    def of_look(self, handle: str) -> Any:
        def step(state: State) -> State:
            self.check(list(state.views[handle]))
            return state

        return step

    def of_unview(self, handle: str) -> Any:
        return lambda state: replace(state, views=_without(state.views, handle))

    def of_export(self, name: str, snap: str) -> Any:
        def step(state: State) -> State:
            self.check(list(state.snaps[state.snap(state.volume(name), snap)].disk))
            return state

        return step

    of_nbd_view = of_export

    def of_delta(self, name: str, a: str, b: str) -> Any:
        def step(state: State) -> State:
            volume = state.volume(name)
            disk, disk_b = (state.snaps[state.snap(volume, one)].disk for one in (a, b))
            if self.is_known:
                changed = dict(self.event.result)
                _same([changed.get(at, stamp) for at, stamp in enumerate(disk)], list(disk_b))
            return state

        return step

    # ---- the store ----

    def _insert(
        self, state: State, names: list[str], source: str, disk: Disk, parent: str | None, short: bool
    ) -> State:
        if any(name in state.names for name in names):
            raise RefusedError("exists")
        for name in names:
            key = f"{self.event.number} {name}"
            state = replace(
                state,
                names={**state.names, name: key},
                volumes={**state.volumes, key: Volume(disk, parent, source, short)},
            )
        return state

    def _fork(
        self, name: str, snap: str | None, names: list[str], short: bool, then: Callable[[State], State] = lambda s: s
    ) -> list[Step]:
        def cut(state: State, _: Any) -> tuple[State, Any]:
            key = state.volume(name)
            if snap is None:
                return state, (key, state.volumes[key].disk, state.volumes[key].parent)
            taken = state.snap(key, snap)
            return state, (key, state.snaps[taken].disk, taken)

        def insert(state: State, cut: Any) -> tuple[State, Any]:
            key, disk, parent = cut
            if state.names.get(name) != key:
                raise RefusedError("needed")
            return then(self._insert(state, names, key, disk, parent, short)), None

        def at_once(state: State, _: Any) -> tuple[State, Any]:
            return insert(*cut(state, None))

        return [cut, insert] if snap is None else [at_once]

    def of_fork(self, name: str, snap: str, names: list[str], is_short: bool) -> Any:
        self.check(names)
        return [self._fork(name, snap, names, is_short)]

    def of_fork_head(self, name: str, names: list[str], is_short: bool) -> Any:
        self.check(names)
        return [self._fork(name, None, names, is_short)]

    def of_fork_key(self, name: str, snap: str | None, key: str, names: list[str]) -> Any:
        asked = (name, snap, tuple(names))
        self.check(names)

        def was_done(state: State, _: Any) -> tuple[State, Any]:
            if state.calls.get(key) != asked:
                raise RefusedError("needed")
            return state, None

        def note(state: State) -> State:
            if key in state.calls:
                raise RefusedError("needed")
            return replace(state, calls={**state.calls, key: asked})

        return [[was_done], self._fork(name, snap, names, False, note)]

    def of_fork_group(self, sources: list[list[Any]]) -> Any:
        def find(state: State, _: Any) -> tuple[State, Any]:
            return state, tuple(state.volume(name) for name, _ in sources)

        def cut(state: State, keys: Any) -> tuple[State, Any]:
            found = []
            for (name, snap), key in zip(sources, keys, strict=True):
                if state.names.get(name) != key:
                    raise RefusedError("needed")
                if snap is None:
                    found.append((key, state.volumes[key].disk, state.volumes[key].parent))
                else:
                    taken = state.snap(key, snap)
                    found.append((key, state.snaps[taken].disk, taken))
            return state, tuple(found)

        def insert(state: State, cut: Any) -> tuple[State, Any]:
            first = 1 + max((_number(there, name) for there in state.names for name, _ in sources), default=0)
            for (name, snap), (key, _, parent) in zip(sources, cut, strict=True):
                if state.names.get(name) != key or (snap is not None and parent not in state.snaps):
                    raise RefusedError("needed")
            wanted = [[f"{name}-{first}"] for name, _ in sources]
            self.check(wanted)
            for names, (key, disk, parent) in zip(wanted, cut, strict=True):
                state = self._insert(state, names, key, disk, parent, False)
            return state, None

        return [[find, cut, insert]]

    def of_temporary(self, handle: str, name: str, snap: str | None, new: str) -> Any:
        def open_(state: State, _: Any) -> tuple[State, Any]:
            key = f"{self.event.number} {new}"
            if key not in state.volumes:
                raise RefusedError("not found")
            self._refuse_taken(state, key)
            return replace(state, heads={**state.heads, handle: key}), None

        def take_back(state: State, _: Any) -> tuple[State, Any]:
            return self._gone(state, {f"{self.event.number} {new}"} & set(state.volumes)), None

        way = self._fork(name, snap, [new], False)
        if self.is_known:
            return [[*way, open_]]
        return [way] if self.event.outcome == "maybe" else [[*way, take_back]]

    def of_end_temporary(self, handle: str) -> Any:
        def close(state: State, _: Any) -> tuple[State, Any]:
            key = state.heads[handle]
            return replace(state, heads=_without(state.heads, handle)), key

        def drop(state: State, key: Any) -> tuple[State, Any]:
            if key in state.volumes:
                state = self._delete(state, {key}, recursive=True)
            return state, None

        if self.is_known:
            return [[close, drop]]
        return [[close, drop], [close]] if self.event.outcome == "maybe" else [[close]]

    def _gone(self, state: State, going: set[str]) -> State:
        own = {key for key, one in state.snaps.items() if one.volume in going}
        return replace(
            state.without_snaps(own),
            names={name: key for name, key in state.names.items() if key not in going},
            volumes=_without(state.volumes, *going),
        )

    def _delete(self, state: State, going: set[str], *, recursive: bool) -> State:
        for key in going:
            self._refuse_taken(state, key)
        own = {key for key, one in state.snaps.items() if one.volume in going}
        state.refuse_held(own)
        users = any(
            one.volume not in going and any(state.descends(key, mine) for mine in own)
            for key, one in state.snaps.items()
        ) or any(
            key not in going and any(state.descends(one.parent, mine) for mine in own)
            for key, one in state.volumes.items()
        )
        if users or (own and not recursive):
            raise RefusedError("needed")
        return self._gone(state, going)

    def of_delete(self, names: list[str], recursive: bool) -> Any:
        return lambda state: self._delete(state, {state.volume(name) for name in names}, recursive=recursive)

    def _rename(self, state: State, key: str, new: str) -> State:
        old = state.name_of(key)
        if new in state.names:
            raise RefusedError("exists")
        return replace(state, names={**_without(state.names, old), new: key})

    def of_rename(self, name: str, new: str) -> Any:
        return lambda state: self._rename(state, state.volume(name), new)

    def of_lrename(self, handle: str, new: str) -> Any:
        return lambda state: self._rename(state, state.lives[handle], new)

    def of_expire(self) -> Any:
        def step(state: State) -> State:
            going = {state.volume(name) for name in (self.event.result if self.is_known else [])}
            for key in going:
                self._refuse_taken(state, key)
                sources = {one.source for one in state.volumes.values()}
                if not state.volumes[key].expires or state.snaps_of(key) or key in sources:
                    raise RefusedError("needed")
                if key in state.lives.values():
                    raise RefusedError("needed")
            return self._gone(state, going)

        return step

    def of_renew(self, name: str) -> Any:
        return lambda state: state.with_disk(state.volume(name), expires=False)

    def of_hold(self, name: str, snap: str, holder: str) -> Any:
        def step(state: State) -> State:
            hold = state.snap(state.volume(name), snap), holder
            if hold in state.holds:
                raise RefusedError("needed")
            return replace(state, holds=state.holds | {hold})

        return step

    def of_unhold(self, name: str, snap: str, holder: str) -> Any:
        def step(state: State) -> State:
            hold = state.snap(state.volume(name), snap), holder
            if hold not in state.holds:
                raise RefusedError("needed")
            return replace(state, holds=state.holds - {hold})

        return step

    def of_forks_of(self, name: str) -> Any:
        def step(state: State) -> State:
            key = state.volume(name)
            self.check(sorted(one for one, k in state.names.items() if state.volumes[k].source == key))
            return state

        return step

    def of_list(self) -> Any:
        def step(state: State) -> State:
            self.check(sorted(state.names))
            return state

        return step

    def of_check(self) -> Any:
        def step(state: State) -> State:
            self.check([])
            return state

        return step

    # ---- a served volume ----

    def _reach(self, table: str, handle: str, name: str) -> Any:
        def step(state: State) -> State:
            key = state.volume(name)
            if key in state.heads.values():
                raise RefusedError("needed")
            return replace(state, **{table: {**getattr(state, table), handle: key}})

        return step

    def of_nbd(self, handle: str, name: str) -> Any:
        return self._reach("clients", handle, name)

    def of_live(self, handle: str, name: str) -> Any:
        return self._reach("lives", handle, name)

    def of_nclose(self, handle: str) -> Any:
        return lambda state: replace(state, clients=_without(state.clients, handle))

    def of_lclose(self, handle: str) -> Any:
        return lambda state: replace(state, lives=_without(state.lives, handle))

    def of_died(self, prefix: str) -> Any:
        def step(state: State) -> State:
            tables = {
                table: {handle: one for handle, one in getattr(state, table).items() if not handle.startswith(prefix)}
                for table in ("heads", "clients", "lives", "views")
            }
            return replace(state, **tables)

        return step

    def of_server_died(self) -> Any:
        return lambda state: replace(state, clients={}, lives={})

    # ---- what is found at the end ----

    def of_found(self, name: str) -> Any:
        def step(state: State) -> State:
            key = state.volume(name)
            snaps = {one.name: list(one.disk) for one in state.snaps.values() if one.volume == key}
            self.check([list(state.volumes[key].disk), snaps])
            return state

        return step


def _number(there: str, source: str) -> int:
    behind = there.removeprefix(f"{source}-")
    return int(behind) if there.startswith(f"{source}-") and behind.isdigit() and behind.isascii() else 0


# ---- the search ----


class Search:
    """Looks for an order of the events of several actors."""

    def __init__(self, actors: list[list[Event]]) -> None:
        self.actors = actors
        self.left = NODES_MAX
        self.reached = -1
        self.notes: dict[str, None] = {}

    def explain(self, initial: State) -> str | None:
        """Return None if there is an order; else what stood in the way where most had been explained."""
        first = tuple((0, None) for _ in self.actors)  # how many events are done, and what one is in the middle of
        stack = [self._next(initial, first)]
        seen: set[Any] = set()
        while stack:
            reached = next(stack[-1], None)
            if reached is None:
                stack.pop()
                continue
            state, at = reached
            if all(position == len(events) for (position, _), events in zip(at, self.actors, strict=True)):
                return None
            key = (at, state.key())
            if key in seen:
                continue
            seen.add(key)
            self.left -= 1
            if self.left <= 0:
                return None  # there are too many orders to try them all, so nothing is known
            stack.append(self._next(state, at))
        return "\n".join(self.notes)

    def _next(self, state: State, at: Any) -> Iterator[tuple[State, Any]]:
        """Yield what comes of one step of one actor, what ended first first."""
        ready = [w for w in range(len(self.actors)) if at[w][0] < len(self.actors[w])]
        for which in sorted(ready, key=lambda w: self.actors[w][at[w][0]].ended):
            event = self.actors[which][at[which][0]]
            others = (self.actors[w][at[w][0]] for w in ready if w != which)
            if any(other.ended < event.begun for other in others):
                continue
            for reached, place in self._after(state, event, at[which], at):
                yield reached, (*at[:which], place, *at[which + 1 :])

    def _after(self, state: State, event: Event, place: Any, at: Any) -> Iterator[tuple[State, Any]]:
        position, middle = place
        done = (position + 1, None)
        rules = Rules(event)
        if event.outcome in ("done", "maybe") or middle is not None or event.op[0] in ("temporary", "end_temporary"):
            try:
                ways = rules.ways()
            except WrongResultError as wrong:
                self._note(at, f"{_said(event)}: {wrong}")
                return
            for number, steps in enumerate(ways):
                if middle is not None and middle[0] != number:
                    continue
                step = 0 if middle is None else middle[1]
                try:
                    reached, known = steps[step](state, None if middle is None else middle[2])
                except (RefusedError, WrongResultError, KeyError) as error:
                    self._note(at, f"{_said(event)}: {type(error).__name__} {error}")
                    continue
                yield reached, done if step + 1 == len(steps) else (position, (number, step + 1, known))
        if event.outcome == "done" or middle is not None:
            return
        if event.outcome in ("busy", "maybe", "value"):
            yield state, done
            return
        try:
            self._all_at_once(state, rules)
        except RefusedError as refusal:
            if str(refusal) == event.outcome:
                yield state, done
            else:
                self._note(at, f"{_said(event)}: would be refused with {refusal}")
        except KeyError:
            yield state, done
        else:
            self._note(at, f"{_said(event)}: nothing stands in its way")

    @staticmethod
    def _all_at_once(state: State, rules: Rules) -> None:
        known: Any = None
        for step in rules.ways()[-1]:
            state, known = step(state, known)

    def _note(self, at: Any, what: str) -> None:
        reached = sum(position for position, _ in at)
        if reached > self.reached:
            self.reached, self.notes = reached, {}
        if reached == self.reached and len(self.notes) < 30:
            self.notes[what] = None


def _said(event: Event) -> str:
    return f"#{event.number} {event.op} -> {event.outcome} {event.result!r} {event.why}"
