"""What the verbs of machines do, in a model that is small enough to be read: what some order of two of them may lead to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import permutations

OFF, RUNNING, PAUSED = "off", "running", "paused"
FORK = "lab-1"


@dataclass(frozen=True)
class State:
    """What there is of a machine.

    Attributes
    ----------
    name : str
        "" where it is gone.
    runs : str
        OFF, RUNNING or PAUSED.
    snapshots : dict
        The names, and after which each was taken.
    at : str
        On which it stands, or "".
    resumes : bool
        Whether its next start goes on from RAM.
    fork : str
        What its fork does, or "" where it has none.
    has_pool : bool
    disk : frozenset of str
        The snapshots that its first disk has of its own.
    volumes : frozenset of str
        Those that were made from its disks.
    """

    name: str = "lab"
    runs: str = OFF
    snapshots: tuple[tuple[str, str], ...] = ()
    at: str = ""
    resumes: bool = False
    fork: str = ""
    has_pool: bool = False
    disk: frozenset[str] = frozenset()
    volumes: frozenset[str] = frozenset({"web", "data"})

    @property
    def taken(self) -> dict[str, str]:
        return dict(self.snapshots)

    def with_snapshots(self, taken: dict[str, str]) -> State:
        return replace(self, snapshots=tuple(sorted(taken.items())))


Effect = Callable[[State], list[State]]


@dataclass(frozen=True)
class Verb:
    """A command line, and what it may lead to where it succeeds: nothing where it cannot.

    Attributes
    ----------
    words : tuple of str
        With "{store}" for the store.
    effect : callable
    halves : callable
        What it may have led to besides, where it was killed.
    """

    words: tuple[str, ...]
    effect: Effect
    halves: Effect = field(default=lambda state: [])


def _if(holds: Callable[[State], bool], then: Callable[[State], State]) -> Effect:
    """Of a machine that is there: a verb that found it by its name goes on with it when it is renamed meanwhile."""
    return lambda state: [then(state)] if state.name and holds(state) else []


def _snapshot(name: str, *, mode: str | None) -> Verb:
    def take(state: State) -> State:
        return replace(state.with_snapshots(state.taken | {name: state.at}), at=name, resumes=False)

    def may(state: State) -> bool:
        return name not in state.taken and (state.runs != OFF or not (mode or state.resumes))

    words = ("machine", "snapshot", f"{{store}}/lab@{name}", *(["--mode", mode] if mode else []))
    return Verb(words, _if(may, take))


def _revert(name: str) -> Verb:
    def go(state: State) -> State:
        return replace(state, at=name, runs=RUNNING if state.runs == OFF else state.runs, resumes=False)

    def half(state: State) -> list[State]:  # its disks are put back, and it is not started
        is_off = state.runs == OFF and name in state.taken
        return [replace(state, at=name, resumes=True)] if is_off else []

    return Verb(("machine", "revert", f"{{store}}/lab@{name}", "--yes"), _if(lambda s: name in s.taken, go), half)


def _drop(verb: str, name: str, *more: str) -> Verb:
    def needs(state: State) -> bool:
        is_awaited = state.resumes and state.at == name and verb == "merge"
        is_used = state.has_pool and name == "ready"
        return name in state.taken and not is_awaited and not is_used

    def merge(state: State) -> State:
        above = state.taken[name]
        taken = {one: above if under == name else under for one, under in state.taken.items() if one != name}
        return replace(state.with_snapshots(taken), at=above if state.at == name else state.at)

    def discard(state: State) -> State:
        going = {name}
        while more_going := {one for one, under in state.taken.items() if under in going} - going:
            going |= more_going
        above = state.taken[name]
        taken = {one: under for one, under in state.taken.items() if one not in going}
        is_at = state.at in going
        return replace(
            state.with_snapshots(taken), at=above if is_at else state.at, resumes=state.resumes and not is_at
        )

    def may_go(state: State) -> bool:
        return needs(state) and (state.runs == OFF or state.at in ("", *discard(state).taken))

    words = ("machine", verb, f"{{store}}/lab@{name}", *more)
    return Verb(words, _if(needs, merge) if verb == "merge" else _if(may_go, discard))


def _fork(*more: str, runs: str) -> Verb:
    def needs(state: State) -> bool:
        return "ready" in state.taken and not state.fork

    halves = _if(needs, lambda state: replace(state, fork=OFF))
    words = ("machine", "fork", "{store}/lab@ready", "--name", FORK, *more)
    return Verb(words, _if(needs, lambda state: replace(state, fork=runs)), halves)


def _rename(state: State) -> list[State]:
    return [replace(state, name="other")] if state.name == "lab" and state.runs == OFF else []


def _delete(state: State) -> list[State]:
    if not state.name or state.runs != OFF or state.fork or state.has_pool:
        return []
    return [replace(state, name="", snapshots=(), at="", resumes=False)]


def _run(words: tuple[str, ...], needs: Callable[[State], bool], then: Callable[[State], State]) -> Verb:
    return Verb(("machine", *words), _if(needs, then))


def _is_on(state: State) -> bool:
    return state.runs != OFF


def _same(state: State) -> State:
    return state


def _ended(state: State) -> State:
    return replace(state, runs=OFF, resumes=state.resumes and state.runs == OFF)


VERBS: dict[str, Verb] = {
    "start": _run(("start", "{store}/lab"), lambda s: s.runs == OFF, lambda s: replace(s, runs=RUNNING, resumes=False)),
    "start paused": _run(
        ("start", "{store}/lab", "--paused"),
        lambda s: s.runs == OFF,
        lambda s: replace(s, runs=PAUSED, resumes=False),
    ),
    "start fresh": _run(
        ("start", "{store}/lab", "--fresh", "--yes"),
        lambda s: s.runs == OFF,
        lambda s: replace(s, runs=RUNNING, resumes=False),
    ),
    "stop": _run(("stop", "{store}/lab", "--timeout", "5"), lambda s: True, _ended),
    "stop --force": _run(("stop", "{store}/lab", "--force"), lambda s: True, _ended),
    "pause": _run(("pause", "{store}/lab"), _is_on, lambda s: replace(s, runs=PAUSED)),
    "resume": _run(("resume", "{store}/lab"), _is_on, lambda s: replace(s, runs=RUNNING)),
    "snapshot": _snapshot("taken", mode=None),
    "snapshot live": _snapshot("alive", mode="live"),
    "snapshot pause": _snapshot("still", mode="pause"),
    "revert ready": _revert("ready"),
    "revert first": _revert("first"),
    "merge ready": _drop("merge", "ready"),
    "merge first": _drop("merge", "first"),
    "discard ready": _drop("discard", "ready", "--recursive", "--yes"),
    "fork": _fork(runs=RUNNING),
    "fork --no-start": _fork("--no-start", runs=OFF),
    "pool": _run(
        ("pool", "{store}/lab@ready", "--warm", "1"),
        lambda s: "ready" in s.taken and not s.has_pool,
        lambda s: replace(s, has_pool=True),
    ),
    "pool --stop": _run(
        ("pool", "{store}/lab@ready", "--stop"), lambda s: s.has_pool, lambda s: replace(s, has_pool=False)
    ),
    "rename": Verb(("machine", "rename", "{store}/lab", "other"), _rename),
    "delete": Verb(("machine", "delete", "{store}/lab", "--recursive", "--yes"), _delete),
    "status": _run(("status", "{store}/lab"), lambda s: True, _same),
    "usage": _run(("usage", "{store}/lab"), lambda s: True, _same),
    "tree": _run(("tree", "{store}/lab"), lambda s: True, _same),
    "list": Verb(("machine", "list", "{store}"), lambda s: [s]),
    "expire": Verb(("expire", "{store}"), lambda s: [s]),
    "snapshot of a disk": Verb(
        ("snapshot", "{store}/web@mine"),
        lambda s: [replace(s, disk=s.disk | {"mine"})],
    ),
    "clone of a disk": Verb(
        ("clone", "{store}/web@base", "{store}/cloned"),
        lambda s: [replace(s, volumes=s.volumes | {"cloned"})] if "base" in s.disk else [],
    ),
    "fork of a disk": Verb(
        ("fork", "{store}/web@base", "--name", "forked"),
        lambda s: [replace(s, volumes=s.volumes | {"forked"})] if "base" in s.disk else [],
    ),
    "merge of a disk": Verb(
        ("merge", "{store}/web@base"),
        lambda s: [replace(s, disk=s.disk - {"base"})] if "base" in s.disk else [],
    ),
    "read of a disk": Verb(
        ("compare", "{store}/web@base", "{store}/web@base"), lambda s: [s] if "base" in s.disk else []
    ),
    "delete of a disk": Verb(
        ("delete", "{store}/data", "--recursive", "--yes"),
        lambda s: [] if s.name else [replace(s, volumes=s.volumes - {"data"})],
    ),
    "check": Verb(("check", "{store}"), lambda s: [s]),
}


def ends(begun: State, outcomes: list[tuple[Verb, bool | None]]) -> Iterator[State]:
    """Yield the states to which these verbs may have led, in any order: True: it succeeded; None: it was killed."""
    for order in permutations(outcomes):
        states = [begun]
        for verb, is_done in order:
            after: list[State] = []
            for state in states:
                if is_done is not False:
                    after += verb.effect(state)
                if is_done is None:
                    after += verb.halves(state)
                if not is_done:
                    after.append(state)
            states = after
        yield from states
