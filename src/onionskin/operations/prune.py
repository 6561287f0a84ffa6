"""Retention: this module decides which snapshots of a volume are kept, by the rules of restic, and drops the others.

What must hold: the decision depends on the snapshots and the rules, and not on the time of the call, but for one case that
only keeps more: a newest snapshot that has a time to come, of a clock that was wrong, counts as taken now. The snapshot
that was taken last counts as the newest, even if the clock was set back. A call without any rule is refused, because it
would drop all snapshots. All snapshots that are not kept lose their names by one merge, which is one transaction, so all data
stays that the remaining states need. A snapshot that is held is kept.
"""

import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Protocol

from onionskin.base.records import record, replaced
from onionskin.catalog import VolumeRow
from onionskin.catalog.tree import Snapshot, list_snapshots, when
from onionskin.errors import StateError
from onionskin.storage.open_store import OpenStore


@record
class Rules:
    """The rules that say which snapshots to keep. In each number, -1 means all, and 0 means that there is no such rule.

    Attributes
    ----------
    last : int
        This many of the newest snapshots are kept.
    hourly, daily, weekly, monthly, yearly : int
        Of this many of the last hours, days, ... that have a snapshot, the newest snapshot of each is kept. Weeks are
        those of ISO 8601. If there are fewer periods than that, the oldest snapshot is kept too, so that a long rule
        can grow.
    within : datetime.timedelta or None
        All snapshots are kept that are older than the newest one by at most this time. If the newest one has a time to
        come, that are older than now. A day has 25 hours where clocks are set back, by `zone`.
    zone : datetime.tzinfo
        The time zone that defines where an hour or a day ends.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: timedelta | None = None
    zone: tzinfo = UTC

    def check(self) -> None:
        """Raise ValueError or TypeError if a rule is not valid, or if there is no rule that keeps anything."""
        for name in ("last", *_PERIODS):
            count = getattr(self, name)
            if type(count) is not int:
                raise TypeError(f"how many to keep ({name}) is a number, not {count!r}")
            if count < -1:
                raise ValueError(f"{count} snapshots cannot be kept ({name}); -1 keeps all, 0 is no rule")
        if not isinstance(self.within, timedelta | None):
            raise TypeError(f"a time within which all is kept is a timedelta, not {self.within!r}")
        if self.within is not None and self.within < timedelta(0):
            raise ValueError("a time within which all is kept is not negative")
        if self.within is None and not any(getattr(self, name) for name in ("last", *_PERIODS)):
            raise ValueError("no rule says what to keep, and nothing would be kept; give one, such as keep_last")


@record
class Retention:
    """The result of the rules for one snapshot.

    Attributes
    ----------
    snapshot : str
        The name of the snapshot.
    created : datetime.datetime
        The time at which it was taken, in UTC.
    kept_by : tuple of str
        The rules that keep it, such as "daily", and "held" if somebody holds it. Of a snapshot of a machine also "awaited",
        if the machine, or a fork that never ran, is about to go on from it. If the tuple is empty, the name is dropped.
    """

    snapshot: str
    created: datetime
    kept_by: tuple[str, ...]


_PERIODS: dict[str, Callable[[datetime], Any]] = {
    "hourly": lambda at: (at.year, at.month, at.day, at.hour, at.utcoffset()),  # an hour comes twice in autumn
    "daily": lambda at: (at.year, at.month, at.day),
    "weekly": lambda at: at.isocalendar()[:2],
    "monthly": lambda at: (at.year, at.month),
    "yearly": lambda at: at.year,
}


class Taken(Protocol):
    """A snapshot, of a volume or of a machine, as far as the rules look at it."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def created(self) -> datetime:
        """When it was taken, in UTC."""


def retained(
    snapshots: Sequence[Taken], rules: Rules, *, held: Collection[str] = (), now: datetime | None = None
) -> list[Retention]:
    """Return for each snapshot which rules keep it. The snapshots are in the order in which they were taken.

    The last one counts as the newest. The times say to which hour or day a snapshot belongs and how old it is, but not
    which of two snapshots is newer. The clock may be set back, and a caller of prune relies on the snapshot that was
    taken last. So a time of the newest one that is still to come makes none of the others old.
    """
    rules.check()
    newest = min([one.created for one in snapshots[-1:]] + ([] if now is None else [now]), default=None)
    kept: list[list[str]] = [["held"] if snapshot.name in held else [] for snapshot in snapshots]
    newest_first = range(len(snapshots) - 1, -1, -1)
    for nth, place in enumerate(newest_first):
        if nth < rules.last or rules.last == -1:
            kept[place].append("last")
        if rules.within is not None and newest is not None:
            age = _age(snapshots[place].created, newest, rules.zone)
            if age <= rules.within:
                kept[place].append("within")
    times = [snapshots[place].created.astimezone(rules.zone) for place in newest_first]
    for name, period in _PERIODS.items():
        for nth in _newest_of_each([period(at) for at in times], getattr(rules, name)):
            kept[newest_first[nth]].append(name)
    return [Retention(one.name, one.created, tuple(why)) for one, why in zip(snapshots, kept, strict=True)]


def _age(created: datetime, newest: datetime, zone: tzinfo) -> timedelta:
    """Return how much older a snapshot is, by the clock on the wall or in truth, whichever is less.

    Where clocks are set back in between, a snapshot of the same time of day three days before is 73 hours older, and is
    one that restic keeps within three days.
    """
    on_the_wall = newest.astimezone(zone).replace(tzinfo=None) - created.astimezone(zone).replace(tzinfo=None)
    return min(newest - created, on_the_wall)


def _newest_of_each(periods: list[Any], count: int) -> list[int]:
    """Return the index of the first snapshot of each period, for the first `count` periods.

    If there are fewer periods, the last index is returned too. A `count` of -1 means all periods.
    """
    found: list[int] = []
    seen = set()
    for place, period in enumerate(periods):
        if len(found) == count:
            return found
        if period not in seen or place == len(periods) - 1:
            found.append(place)
        seen.add(period)
    return found


def prune(
    store: OpenStore, volume: VolumeRow, rules: Rules, merge: Callable[[Sequence[Snapshot]], object]
) -> list[Retention]:
    """Drop the names of a volume's snapshots that no rule keeps, all of them at once, and return what became of each.

    `merge` drops the names of snapshots in one transaction, in which it is checked that each still means the same
    snapshot, since somebody may rename them meanwhile, and that nobody holds one: otherwise it raises StateError, and has
    dropped none. What somebody holds by then is kept, and the others go. The volume is open, so it stays, and may get
    another name.
    """
    plan = planned(store, lambda: volume, rules)
    while going := [snapshot for snapshot, one in plan if not one.kept_by]:
        try:
            merge(going)
            break
        except StateError:
            held = _held(store, volume)
            if held.isdisjoint(snapshot.guid for snapshot in going):
                raise
            plan = [
                (snapshot, one if one.kept_by or snapshot.guid not in held else replaced(one, kept_by=("held",)))
                for snapshot, one in plan
            ]
    return [one for _, one in plan]


def planned(store: OpenStore, find: Callable[[], VolumeRow], rules: Rules) -> list[tuple[Snapshot, Retention]]:
    """Return what a prune would do with each snapshot of the volume that `find` finds."""
    with store.catalog.reading():  # who holds what, and what it is called, of one state
        volume = find()
        taken = list_snapshots(store.catalog, volume)
        guids = _held(store, volume)
    held = {one.name for one in taken if one.guid in guids}
    return list(zip(taken, retained(taken, rules, held=held, now=when(time.time_ns())), strict=True))


def _held(store: OpenStore, volume: VolumeRow) -> set[str]:
    """Return the GUIDs of a volume's snapshots that somebody holds, or that a snapshot of a machine binds."""
    catalog = store.catalog
    with catalog.reading():
        guids = {row.layer: row.guid.hex() for row in catalog.snapshots_of(volume.id)}
        held = {hold.layer for hold in catalog.holds_on(list(guids))}
        return {guids[layer] for layer in held.union(catalog.machine_snapshots_of_layers(guids))}
