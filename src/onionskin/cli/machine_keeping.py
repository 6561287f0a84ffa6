"""The verbs that say which snapshots of a machine stay: hold, unhold, holds, note and prune."""

from typing import TYPE_CHECKING, Any

import click

from onionskin.cli import output
from onionskin.cli.arguments import (
    MACHINE,
    MACHINE_OR_SNAPSHOT,
    MACHINE_SNAPSHOT,
    MACHINE_SNAPSHOT_OR_RANGE,
    Name,
    parse_name,
    trust_option,
)
from onionskin.cli.chosen import chosen_snapshots, listed, same_store
from onionskin.cli.ending_options import with_help
from onionskin.cli.keeping import rule_options, rules_of, tell_pruned
from onionskin.cli.output import json_option
from onionskin.errors import OnionskinError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from onionskin.store import Store

SNAPSHOTS = "STORE/MACHINE@SNAPSHOT..."


def chosen_of(store: "Store", names: tuple[Name, ...]) -> list[str]:
    """Return the snapshots of one machine that names and ranges mean, in the order of taking."""
    same_machine(names)
    return chosen_snapshots(store.machine_snapshots(names[0].volume), names, "machine")


def same_machine(names: tuple[Name, ...]) -> None:
    """Refuse names that are not of one machine, as wrong usage, before anything is opened."""
    for name in names[1:]:
        same_store(names[0], name)
        if name.volume != names[0].volume:
            raise click.UsageError("the snapshots are of several machines; name those of one")


@with_help
@click.command()
@click.argument("names", type=MACHINE_SNAPSHOT_OR_RANGE, nargs=-1, metavar=SNAPSHOTS)
@click.argument("holder")
@trust_option
@json_option
def hold(names: tuple[Name, ...], holder: str, as_json: bool) -> None:
    """Keep snapshots from being discarded, merged or deleted.

    HOLDER says who needs them, and lets them go with unhold. What they have of disks and RAM is kept, too. Several, and
    ranges as vms/lab@a..@c, are held together, or none is.
    """
    _refuse_no_holder("hold", names, holder)
    same_machine(names)
    with names[0].open_store() as store:
        chosen = chosen_of(store, names)
        store.open_machine(names[0].volume).hold(chosen, holder)
    is_are = "are" if len(chosen) > 1 else "is"
    output.tell(as_json, _value(names[0], chosen, holder), lambda: f"{listed(names, chosen)} {is_are} held by {holder}")


def complete_held(ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Offer snapshots and, behind the first one, who holds any of them."""
    from click.shell_completion import CompletionItem

    words = [*(ctx.params.get("names") or ()), ctx.params.get("holder")]  # behind one word, that is the holder to click
    named = [parse_name(word) if isinstance(word, str) else word for word in words if word and "/" not in incomplete]
    if not named:
        return MACHINE_SNAPSHOT_OR_RANGE.shell_complete(ctx, param, incomplete)
    try:
        with named[0].open_store() as store:
            holders = {
                one.holder for name in named for one in store.open_machine(name.volume).holds(name.required_snapshot)
            }
    except (OnionskinError, OSError, ValueError):
        return []
    return [CompletionItem(one) for one in sorted(holders) if one.startswith(incomplete)]


@with_help
@click.command()
@click.argument("names", type=MACHINE_SNAPSHOT_OR_RANGE, nargs=-1, metavar=SNAPSHOTS, shell_complete=complete_held)
@click.argument("holder")
@trust_option
@json_option
def unhold(names: tuple[Name, ...], holder: str, as_json: bool) -> None:
    """Let snapshots go that HOLDER held.

    Several, and ranges as vms/lab@a..@c, are let go together, or none is.
    """
    _refuse_no_holder("unhold", names, holder)
    same_machine(names)
    with names[0].open_store() as store:
        chosen = chosen_of(store, names)
        store.open_machine(names[0].volume).unhold(chosen, holder)
    is_are = "are" if len(chosen) > 1 else "is"
    line = f"{listed(names, chosen)} {is_are} not held by {holder} any more"
    output.tell(as_json, _value(names[0], chosen, holder), lambda: line)


def _refuse_no_holder(verb: str, names: tuple[Name, ...], holder: str) -> None:
    """Refuse a call of one word, which is the snapshot, as it seems, and not its holder."""
    if not names:
        raise click.UsageError(
            f"{verb} wants snapshots, and behind them who holds them, as 'onionskin machine {verb} {holder} backup'"
            if "@" in holder
            else f"{verb} wants snapshots before {holder!r}, as 'onionskin machine {verb} STORE/MACHINE@SNAPSHOT {holder}'"
        )


def _value(name: Name, chosen: list[str], holder: str) -> dict[str, Any]:
    return {"machine": name.volume, "snapshots": chosen, "holder": holder}


@with_help
@click.command()
@click.argument("name", type=MACHINE_OR_SNAPSHOT, metavar="STORE/MACHINE[@SNAPSHOT]")
@trust_option
@json_option
def holds(name: Name, as_json: bool) -> None:
    """List who holds a snapshot of a machine, or any of them."""
    with name.open_store() as store:
        found = store.open_machine(name.volume).holds(name.snapshot)
    value = [
        {"snapshot": one.snapshot, "holder": one.holder, "created": output.timestamp(one.created)} for one in found
    ]
    rows = [(one.snapshot, one.holder, output.when(one.created)) for one in found]
    output.show(as_json, value, lambda: output.table(("SNAPSHOT", "HOLDER", "SINCE"), rows))


@with_help
@click.command()
@click.argument("name", type=MACHINE_SNAPSHOT, metavar="STORE/MACHINE@SNAPSHOT")
@click.argument("text")
@trust_option
@json_option
def note(name: Name, text: str, as_json: bool) -> None:
    """Put a note in the place of a snapshot's; "" takes it away."""
    with name.open_store() as store:
        store.open_machine(name.volume).set_note(name.required_snapshot, text)
    value = {"machine": name.volume, "snapshot": name.snapshot, "note": text}
    output.tell(as_json, value, lambda: f"noted with {name}" if text else f"{name} has no note any more")


@with_help
@click.command()
@click.argument("name", type=MACHINE, metavar="STORE/MACHINE")
@rule_options
@trust_option
@json_option
def prune(name: Name, time_zone: str, dry_run: bool, as_json: bool, **keep: Any) -> None:
    """Drop the snapshots of a machine that no rule keeps.

    The rules are restic's, and one that keeps is enough. What is held is kept, and what the machine, or a fork that never
    ran, is about to go on from. The others are dropped together, as by merge, or none is.
    """
    from onionskin.operations import machine_usage

    rules = rules_of(keep, time_zone)
    freed: int | None = 0
    with name.open_store() as store:
        target = store.open_machine(name.volume)
        found = target.prune(**keep, zone=rules.zone, dry_run=dry_run)
        dropped = [one.snapshot for one in found if not one.kept_by]
        if dry_run and dropped:
            freed = machine_usage.loss_of_merge(store._opened, target._id, dropped).bytes_freed
    tell_pruned(as_json, found, freed, dry_run=dry_run)
