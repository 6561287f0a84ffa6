"""Retention: which snapshots of a volume are kept, by rules as restic has them, and what becomes of the others.

What must hold: what is decided depends on the snapshots and the rules alone, and not on when it is asked. Without a rule
nothing is decided, as it would drop all. What is not kept loses its name by a merge, so no data goes that a state which
is left needs, and what is held is kept.
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
    """What to keep: of the last so many hours, days, ... that have a snapshot, the newest one each; -1 is all of them.

    Attributes
    ----------
    last : int
        So many of the newest.
    hourly, daily, weekly, monthly, yearly : int
        Weeks are those of ISO 8601. While there are fewer than so many, the oldest snapshot is kept too, so that a
        long rule can grow.
    within : datetime.timedelta or None
        All that are at most so much older than the newest snapshot.
    zone : datetime.tzinfo
        Whose clock says where an hour or a day ends.
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
        """Raise ValueError where they keep nothing, or are none."""
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
    """What the rules say of one snapshot.

    Attributes
    ----------
    snapshot : str
        Its name.
    created : datetime.datetime
        In UTC.
    kept_by : tuple of str
        The rules that keep it, such as "daily"; "held" where somebody holds it. Empty: its name is dropped.
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
    """Say of each snapshot which rules keep it, in the order given. Of two of one time the later in it is the newer."""
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
    """Return the places of the first of each period, for so many periods; and the last place where they are fewer."""
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
        if not one.kept_by:  # by its GUID too: anybody may rename snapshots meanwhile
            of_volume.merge(volume, one.snapshot, guid=snapshot.guid)
    return found
