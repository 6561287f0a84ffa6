"""Retention: this module decides which snapshots of a volume are kept, by the rules of restic, and drops the others.

What must hold: the decision depends on the snapshots and the rules alone, and not on the time of the call. A call
without any rule is refused, because it would drop all snapshots. A snapshot that is not kept loses its name by a merge,
so all data stays that the remaining states need. A snapshot that is held is kept.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

from onionskin.catalog.tree import Snapshot, list_snapshots
from onionskin.operations import snapshots as of_volume
from onionskin.storage.open_head import OpenHead


@dataclass(frozen=True, slots=True)
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
        All snapshots are kept that are older than the newest one by at most this time.
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
        if self.within is not None and self.within < timedelta(0):
            raise ValueError("a time within which all is kept is not negative")
        if self.within is None and not any(getattr(self, name) for name in ("last", *_PERIODS)):
            raise ValueError("no rule says what to keep, and nothing would be kept; give one, such as keep_last")


@dataclass(frozen=True, slots=True)
class Retention:
    """The result of the rules for one snapshot.

    Attributes
    ----------
    snapshot : str
        The name of the snapshot.
    created : datetime.datetime
        The time at which it was taken, in UTC.
    kept_by : tuple of str
        The rules that keep it, such as "daily", and "held" if somebody holds it. If the tuple is empty, the name is
        dropped.
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


def retained(snapshots: Sequence[Snapshot], rules: Rules, *, held: Collection[str] = ()) -> list[Retention]:
    """Return for each snapshot, in the given order, which rules keep it.

    Of two snapshots that were taken at the same time, the later one in this order is the newer.
    """
    rules.check()
    if not snapshots:
        return []
    newest_first = sorted(range(len(snapshots)), key=lambda place: (snapshots[place].created, place), reverse=True)
    kept: list[list[str]] = [["held"] if snapshot.name in held else [] for snapshot in snapshots]
    latest = snapshots[newest_first[0]].created
    for nth, place in enumerate(newest_first):
        if nth < rules.last or rules.last == -1:
            kept[place].append("last")
        if rules.within is not None and latest - snapshots[place].created <= rules.within:
            kept[place].append("within")
    times = [snapshots[place].created.astimezone(rules.zone) for place in newest_first]
    for name, period in _PERIODS.items():
        for nth in _newest_of_each([period(at) for at in times], getattr(rules, name)):
            kept[newest_first[nth]].append(name)
    return [Retention(one.name, one.created, tuple(why)) for one, why in zip(snapshots, kept, strict=True)]


def _newest_of_each(periods: list[Any], count: int) -> list[int]:
    """Return the index of the first snapshot of each period, for the first `count` periods.

    If there are fewer periods, the last index is returned too. A `count` of -1 means all periods.
    """
    found: list[int] = []
    for place, period in enumerate(periods):
        if len(found) == count:
            return found
        if place == 0 or period != periods[place - 1] or place == len(periods) - 1:
            found.append(place)
    return found


def prune(volume: OpenHead, rules: Rules, held: Collection[str]) -> list[Retention]:
    """Drop the names of the snapshots of an open volume that no rule keeps, oldest first."""
    taken = list_snapshots(volume.store.catalog, volume.row)
    found = retained(taken, rules, held=held)
    for snapshot, one in zip(taken, found, strict=True):
        if not one.kept_by:  # the GUID is checked too, because somebody may rename snapshots meanwhile
            of_volume.merge(volume, one.snapshot, guid=snapshot.guid)
    return found
