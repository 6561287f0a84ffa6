"""The verbs that say which snapshots stay: hold, unhold, holds, prune, and note, which says why."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from onionskin.base.paths import FilePath
from onionskin.cli import output
from onionskin.cli.arguments import (
    SNAPSHOT,
    SNAPSHOT_OR_RANGE,
    VOLUME,
    VOLUME_SNAPSHOT_OR_STORE,
    Name,
    live,
    open_store,
    parse_name,
    trust_option,
)
from onionskin.cli.chosen import SNAPSHOTS, chosen_snapshots, find_snapshot, guids_of, listed
from onionskin.cli.output import json_option
from onionskin.cli.values import snapshot_value
from onionskin.errors import OnionskinError

if TYPE_CHECKING:
    from datetime import tzinfo

    from click.shell_completion import CompletionItem

    from onionskin.operations.prune import Retention, Rules

Verb = TypeVar("Verb", bound=Callable[..., Any])

# A month and a year are as long as they can be, so that nothing goes that restic or borg would keep.
_DAYS = {"y": 366, "m": 31, "w": 7, "d": 1}
_PARTS = r"(?:(\d{1,6})y)?(?:(\d{1,6})m)?(?:(\d{1,6})w)?(?:(\d{1,6})d)?(?:(\d{1,6})h)?"


class DurationType(click.ParamType):  # type: ignore[type-arg]
    """A time such as 36h, 14d, 8w or, as restic writes it, 1y6m."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Parse the text, or fail as a usage error."""
        if isinstance(value, timedelta):
            return value
        found = re.fullmatch(_PARTS, value, re.ASCII)
        if not found or not value:
            self.fail(
                f"{value!r} is no time; write numbers of years, months, weeks, days and hours, such as 36h, 14d, 8w or 1y6m",
                param,
                ctx,
            )
        *counts, hours = (int(count or 0) for count in found.groups())
        days = sum(count * length for count, length in zip(counts, _DAYS.values(), strict=True))
        return timedelta(days=days, hours=hours)


@click.command()
@click.argument("names", type=SNAPSHOT_OR_RANGE, nargs=-1, metavar=SNAPSHOTS)
@click.argument("holder")
@trust_option
@json_option
def hold(names: tuple[Name, ...], holder: str, as_json: bool) -> None:
    """Keep snapshots from being discarded, merged or deleted.

    HOLDER says who needs them, and lets them go with unhold. Several snapshots of a volume, and ranges as vms/web@a..@c, are
    held together, or none is.
    """
    _refuse_no_holder("hold", names, holder)
    with names[0].open_store() as store:
        found = store.snapshots(names[0].volume)
        chosen = chosen_snapshots(found, names)
        store.hold(names[0].volume, chosen, holder, guid=guids_of(found, chosen))
    is_are = "are" if len(chosen) > 1 else "is"
    output.tell(
        as_json, _hold_value(names, chosen, holder), lambda: f"{listed(names, chosen)} {is_are} held by {holder}"
    )


def complete_held(ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Offer snapshots and, behind the first one, who holds any of them."""
    from click.shell_completion import CompletionItem

    words = [*(ctx.params.get("names") or ()), ctx.params.get("holder")]  # behind one word, that is the holder to click
    named = [parse_name(word) if isinstance(word, str) else word for word in words if word and "/" not in incomplete]
    if not named:
        return SNAPSHOT_OR_RANGE.shell_complete(ctx, param, incomplete)
    try:
        with named[0].open_store() as store:
            holders = {one.holder for name in named for one in store.holds(name.volume, name.snapshot)}
    except (OnionskinError, OSError, ValueError):
        return []
    return [CompletionItem(one) for one in sorted(holders) if one.startswith(incomplete)]


@click.command()
@click.argument("names", type=SNAPSHOT_OR_RANGE, nargs=-1, metavar=SNAPSHOTS, shell_complete=complete_held)
@click.argument("holder")
@trust_option
@json_option
def unhold(names: tuple[Name, ...], holder: str, as_json: bool) -> None:
    """Let snapshots go that HOLDER held.

    Several snapshots of a volume, and ranges as vms/web@a..@c, are let go together, or none is.
    """
    _refuse_no_holder("unhold", names, holder)
    with names[0].open_store() as store:
        found = store.snapshots(names[0].volume)
        chosen = chosen_snapshots(found, names)
        store.unhold(names[0].volume, chosen, holder, guid=guids_of(found, chosen))
    is_are = "are" if len(chosen) > 1 else "is"
    value = _hold_value(names, chosen, holder)
    output.tell(as_json, value, lambda: f"{listed(names, chosen)} {is_are} not held by {holder} any more")


def _refuse_no_holder(verb: str, names: tuple[Name, ...], holder: str) -> None:
    """Refuse a call of one word, which is the snapshot, as it seems, and not its holder."""
    if not names:
        raise click.UsageError(
            f"{verb} wants snapshots, and behind them who holds them, as 'onionskin {verb} {holder} backup'"
            if "@" in holder
            else f"{verb} wants snapshots before {holder!r}, as 'onionskin {verb} STORE/VOLUME@SNAPSHOT {holder}'"
        )


def _hold_value(names: tuple[Name, ...], chosen: list[str], holder: str) -> dict[str, Any]:
    only = chosen[0] if len(chosen) == 1 else None
    return {"volume": names[0].volume, "snapshot": only, "snapshots": chosen, "holder": holder}


@click.command()
@click.argument("name", type=VOLUME_SNAPSHOT_OR_STORE, metavar="STORE[/VOLUME[@SNAPSHOT]]")
@trust_option
@json_option
def holds(name: Name | FilePath, as_json: bool) -> None:
    """List who holds a snapshot, any of a volume, or any of a store."""
    of_store = isinstance(name, FilePath)
    with open_store(name) if isinstance(name, FilePath) else name.open_store() as store:
        found = store.holds() if isinstance(name, FilePath) else store.holds(name.volume, name.snapshot)
    value: list[dict[str, Any]] = [
        ({"volume": one.volume} if of_store else {})
        | {"snapshot": one.snapshot, "holder": one.holder, "created": output.timestamp(one.created)}
        for one in found
    ]
    rows = [
        (f"{one.volume}@{one.snapshot}" if of_store else one.snapshot, one.holder, output.when(one.created))
        for one in found
    ]
    output.show(as_json, value, lambda: output.table(("SNAPSHOT", "HOLDER", "SINCE"), rows))


@click.command()
@click.argument("name", type=SNAPSHOT, metavar="STORE/VOLUME@SNAPSHOT")
@click.argument("text")
@trust_option
@json_option
def note(name: Name, text: str, as_json: bool) -> None:
    """Put a note in the place of a snapshot's; "" takes it away."""
    with name.open_store() as store:
        store.set_note(name.volume, name.required_snapshot, text)
        value = snapshot_value(find_snapshot(store.snapshots(name.volume), name))
    output.tell(as_json, value, lambda: f"noted with {name}" if text else f"{name} has no note any more")


def _keep(what: str, help: str) -> Callable[[Verb], Verb]:
    return click.option(f"--keep-{what}", type=click.IntRange(min=-1), default=0, metavar="N", help=help)


def complete_zone(ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Offer the time zones that this machine knows."""
    from zoneinfo import available_timezones

    from click.shell_completion import CompletionItem

    return [CompletionItem(zone) for zone in sorted(available_timezones()) if zone.startswith(incomplete)]


def rule_options(verb: Verb) -> Verb:
    """Add the options that say what to keep, and the one that drops nothing."""
    options = (
        _keep("last", "Keep the N newest; here and below -1 keeps all."),
        _keep("hourly", "Keep the newest of each of the last N hours that have one."),
        _keep("daily", "Keep the newest of each of the last N days that have one."),
        _keep("weekly", "Keep the newest of each of the last N weeks that have one."),
        _keep("monthly", "Keep the newest of each of the last N months that have one."),
        _keep("yearly", "Keep the newest of each of the last N years that have one."),
        click.option(
            "--keep-within",
            type=DurationType(),
            help="Keep all that are at most so much older than the newest: 36h, 14d.",
        ),
        click.option(
            "--time-zone",
            default="UTC",
            metavar="NAME",
            shell_complete=complete_zone,
            help="Time zone that says where a day ends, as Europe/Berlin; by default UTC.",
        ),
        click.option("--dry-run", is_flag=True, help="Drop nothing, and say what would be, and how much that frees."),
    )
    for option in reversed(options):
        verb = option(verb)
    return verb


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@rule_options
@trust_option
@json_option
def prune(name: Name, time_zone: str, dry_run: bool, as_json: bool, **keep: Any) -> None:
    """Drop the names of the snapshots that no rule keeps.

    The rules are restic's, and one that keeps is enough. What is held is kept. The others are dropped together, as by merge,
    or none is: the disk, clones and the snapshots that stay read as before.
    """
    from onionskin.operations import prune as of_store

    rules = rules_of(keep, time_zone)
    with name.open_store() as store, live(store, name.volume) or nullcontext() as served:
        if served is not None and dry_run:
            served.flush()  # so that what its clients wrote counts
        if served is None or dry_run:
            found = store.prune(name.volume, **keep, zone=rules.zone, dry_run=dry_run)
        else:
            merge = served.merge
            found = of_store.prune(
                store._opened,
                store._opened.catalog.volume(name.volume),
                rules,
                lambda going: merge([one.name for one in going], guid=[one.guid for one in going]),
            )
        dropped = [one.snapshot for one in found if not one.kept_by]
        freed = store.bytes_freed_by_merge(name.volume, dropped) if dry_run and dropped else 0
    tell_pruned(as_json, found, freed, dry_run=dry_run)


def tell_pruned(as_json: bool, found: "list[Retention]", freed: int | None, *, dry_run: bool) -> None:
    """Print what became of each snapshot, and what a dry run would free: None where nobody knows."""
    value = [
        {"snapshot": one.snapshot, "created": output.timestamp(one.created), "kept_by": list(one.kept_by)}
        | ({"bytes_freed_together": freed} if dry_run and not one.kept_by else {})
        for one in found
    ]

    def draw() -> str:
        listed = _drawn(found, dry_run)
        if not dry_run or all(one.kept_by for one in found):
            return listed
        room = "data that cannot be counted" if freed is None else output.size(freed)
        return f"{listed}\n{room} would come back; nothing was changed"

    (output.show if dry_run else output.tell)(as_json, value, draw)


def rules_of(keep: dict[str, Any], time_zone: str) -> "Rules":
    """Return the rules that were given, or fail as a usage error where none keeps anything."""
    from onionskin.operations.prune import Rules

    zone = _zone(time_zone)
    rules = Rules(**{what.removeprefix("keep_"): count for what, count in keep.items()}, zone=zone)
    try:
        rules.check()
    except ValueError as error:
        raise click.UsageError("no rule says what to keep, so nothing would be; give one, as --keep-last 3") from error
    return rules


def _zone(name: str) -> "tzinfo":
    if name == "UTC":  # so that the usual prune waits for no module that reads files of zones
        return UTC
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name)
    except (LookupError, OSError, ValueError) as error:
        raise click.UsageError(f"there is no time zone {name!r} here; write UTC, or a name as Europe/Berlin") from error


def _drawn(found: "list[Retention]", dry_run: bool) -> str:
    dropped = "would be dropped" if dry_run else "dropped"
    rows = [(one.snapshot, output.when(one.created), ", ".join(one.kept_by) or dropped) for one in found]
    return output.table(("SNAPSHOT", "TAKEN", "KEPT BY"), rows)
