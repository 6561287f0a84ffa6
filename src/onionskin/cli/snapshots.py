"""The verbs for snapshots: snapshot, snapshots, revert, discard, merge, diff, usage."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from onionskin.base.naming import some_of
from onionskin.cli import losses, output
from onionskin.cli.arguments import (
    NEW_SNAPSHOT_OR_NONE,
    SIZE,
    SNAPSHOT,
    VOLUME,
    VOLUME_OR_SNAPSHOT,
    Name,
    live,
    open_to_read,
    trust_option,
)
from onionskin.cli.columns import Asked, Column, column_options, draw, in_order, is_asked
from onionskin.cli.losses import dry_run_option, yes_option
from onionskin.cli.output import json_option
from onionskin.errors import FormatError, SnapshotNotFoundError

if TYPE_CHECKING:
    from onionskin.catalog.tree import Snapshot
    from onionskin.control.client import LiveVolume
    from onionskin.operations.usage import SnapshotSpace
    from onionskin.store import Store
    from onionskin.volume import Volume


def snapshot_value(snapshot: "Snapshot") -> dict[str, Any]:
    """Return the JSON value of a snapshot."""
    return {
        "name": snapshot.name,
        "guid": snapshot.guid,
        "created": output.timestamp(snapshot.created),
        "parent": snapshot.parent,
        "note": snapshot.note,
        "size_bytes": snapshot.size_bytes,
    }


SNAPSHOTS = "STORE/VOLUME@SNAPSHOT..."
_Listed = tuple["Snapshot", "SnapshotSpace | None"]
_COLUMNS: "tuple[Column[_Listed], ...]" = (
    Column("name", "SNAPSHOT", lambda one: one[0].name),
    Column("size", "SIZE", lambda one: one[0].size_bytes, is_size=True),
    Column("used", "USED", lambda one: one[1].used_bytes if one[1] else None, is_size=True, is_slow=True),
    Column("written", "WRITTEN", lambda one: one[1].written_bytes if one[1] else None, is_size=True, is_slow=True),
    Column("taken", "TAKEN", lambda one: one[0].created),
    Column("parent", "PARENT", lambda one: one[0].parent),
    Column("note", "NOTE", lambda one: one[0].note),
    Column("guid", "GUID", lambda one: one[0].guid),
)
_SHOWN = ("name", "size", "used", "written", "taken", "parent", "note")


def find_snapshot(snapshots: "list[Snapshot]", name: Name) -> "Snapshot":
    """Find the snapshot that a name means, before the user is asked about it."""
    for snapshot in snapshots:
        if snapshot.name == name.snapshot:
            return snapshot
    raise SnapshotNotFoundError(
        f"volume {name.volume!r} has no snapshot {name.snapshot!r}; "
        f"list them with: onionskin snapshots {name.store}/{name.volume}"
    )


def guids_of(snapshots: "list[Snapshot]", chosen: Sequence[str]) -> list[str]:
    """Return the GUIDs by which chosen snapshots are dropped, since others may take their names until then."""
    by_name = {snapshot.name: snapshot.guid for snapshot in snapshots}
    return [by_name[name] for name in chosen]


def chosen_snapshots(snapshots: "list[Snapshot]", names: Sequence[Name]) -> list[str]:
    """Find the snapshots of one volume that names and ranges mean, in the order of taking, each once.

    A range is ``A..@C``, ``A..`` or ``..@C``; both ends are in it. What is the name of a snapshot is no range.
    """
    places = {snapshot.name: place for place, snapshot in enumerate(snapshots)}
    chosen: set[int] = set()
    for name in names:
        if (name.store.resolve(), name.volume) != (names[0].store.resolve(), names[0].volume):
            raise click.UsageError(f"{names[0]} and {name} are not of one volume; give one command for each volume")
        first, dots, last = name.required_snapshot.partition("..")
        if name.snapshot in places or not dots or (last and not last.startswith("@")):
            find_snapshot(snapshots, name)
            chosen.add(places[name.required_snapshot])
            continue
        if not first and not last:
            raise click.UsageError(f"{name} names no end of the range: write @A..@C, @A.. or @..@C")
        ends = [name._replace(snapshot=end) for end in (first, last.removeprefix("@")) if end]
        for end in ends:
            find_snapshot(snapshots, end)
        start = places[first] if first else 0
        stop = places[last.removeprefix("@")] if last else len(snapshots) - 1
        if start > stop:
            raise click.UsageError(f"{name}: {ends[1]} was taken before {ends[0]}; write the older one first")
        chosen.update(range(start, stop + 1))
    return [snapshots[place].name for place in sorted(chosen)]


def listed(names: Sequence[Name], chosen: Sequence[str]) -> str:
    """Write the snapshots of a volume for people: one in full, of several a few."""
    volume = f"{str(names[0].store).rstrip('/')}/{names[0].volume}"
    return some_of([f"{volume}@{one}" for one in chosen])


def same_store(a: Name, b: Name) -> None:
    """Refuse two names that are not of one store, as wrong usage."""
    if a.store.resolve() != b.store.resolve():
        raise click.UsageError(
            f"{a} and {b} are not of one store; copy one with delta and apply, or with import, to where the other is"
        )


@click.command()
@click.argument("names", type=NEW_SNAPSHOT_OR_NONE, nargs=-1, required=True, metavar="STORE/VOLUME[@SNAPSHOT]...")
@click.option("--note", default="", help="A few words that tree and snapshots show.")
@trust_option
@json_option
def snapshot(names: tuple[Name, ...], note: str, as_json: bool) -> None:
    """Keep the disk as it is now under a name.

    If no name is given, the snapshot is called by the time in UTC, as 20261126T071101.123Z; such names sort as they were
    taken. Nothing is copied, whatever the size. Several volumes of one store are cut at one instant: all of them, or none.
    """
    if len(names) > 1:
        _snapshot_group(names, note, as_json)
        return
    (name,) = names
    with name.open_volume() as (_, volume):
        taken = volume.snapshot(name.snapshot, note)
    output.tell(as_json, snapshot_value(taken), lambda: f"took {name.store}/{name.volume}@{taken.name}")


def _snapshot_group(names: tuple[Name, ...], note: str, as_json: bool) -> None:
    for name in names[1:]:
        same_store(names[0], name)
    wanted = {name.volume: name.snapshot for name in names}
    if len(wanted) < len(names):
        raise click.UsageError("a volume is named twice; a group has one snapshot of each")
    with names[0].open_store() as store:
        group = store.snapshot_group(wanted, note)
    value = {volume: snapshot_value(taken) for volume, taken in group.items()}
    where = names[0].store
    output.tell(
        as_json, value, lambda: f"took {', '.join(f'{where}/{volume}@{one.name}' for volume, one in group.items())}"
    )


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@column_options(_COLUMNS)
@trust_option
@json_option
def snapshots(name: Name, asked: Asked, as_json: bool) -> None:
    """List the snapshots of a volume.

    USED is what nothing else reads, and what comes back if that snapshot alone is dropped, as merge does. WRITTEN is what was
    written between the snapshot before it and this one. Where much was written they are shown only with -o.
    """
    with name.open_store() as store:
        found = store.snapshots(name.volume)
        space = space_of(store, name.volume, wanted=is_asked(asked, _COLUMNS))
    listed = in_order(asked, _COLUMNS, [(one, space.get(one.name)) for one in found])
    value = [snapshot_value(one) | space_value(taken) for one, taken in listed]
    output.show(as_json, value, lambda: draw(asked, _COLUMNS, listed, _SHOWN))


def space_of(store: "Store", volume: str, *, wanted: bool | None) -> "dict[str, SnapshotSpace]":
    """Find out what each snapshot takes; nothing of those of which it is not wanted, or not asked for and not quick."""
    if wanted is False:
        return {}
    from onionskin.operations import usage

    if wanted is None and not usage.is_quick(store._opened, volume):
        return {}
    try:
        return {one.snapshot: one for one in usage.snapshot_space(store._opened, volume)}
    except (FormatError, OSError):  # a list of the names is wanted then too
        if wanted:
            raise
        return {}


def space_value(space: "SnapshotSpace | None") -> dict[str, Any]:
    """Return what a snapshot takes as JSON; null where it was not found out."""
    return {"used_bytes": space.used_bytes if space else None, "written_bytes": space.written_bytes if space else None}


@click.command()
@click.argument("name", type=SNAPSHOT, metavar="STORE/VOLUME@SNAPSHOT")
@yes_option
@dry_run_option
@trust_option
@json_option
def revert(name: Name, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Make the disk read as when a snapshot was taken.

    All snapshots stay. Changes since the last one are dropped.
    """
    from onionskin.operations import losses as of_store

    with _open_to_drop(name, dry_run=dry_run) as (store, volume, served):
        guid = find_snapshot(store.snapshots(name.volume), name).guid
        if served is not None:
            losses.refuse_unagreed(served, "revert")
        loss = of_store.of_revert(store._opened, name.volume, name.required_snapshot)
        if volume is None:
            losses.tell_dry_run(as_json, "revert", [loss])
            return
        losses.agree("revert", [loss], yes=yes)
        volume.revert(name.required_snapshot, guid=guid)
        value = {"volume": name.volume, "snapshot": name.snapshot, "size_bytes": volume.size_bytes}
    output.tell(as_json, value, lambda: f"{name.store}/{name.volume} reads as {name.snapshot} again")


@click.command()
@click.argument("names", type=SNAPSHOT, nargs=-1, required=True, metavar=SNAPSHOTS)
@click.option("--recursive", is_flag=True, help="Discard the snapshots that were taken on top of it too.")
@yes_option
@dry_run_option
@trust_option
@json_option
def discard(names: tuple[Name, ...], recursive: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Drop snapshots and all that was written after them.

    If the head is on that branch, the disk reads as when the snapshot was taken. Several snapshots of a volume, and ranges
    as vms/web@a..@c (all from a to c in the order of taking), vms/web@a.. and vms/web@..@c, are dropped together, or none is.
    """
    from onionskin.operations import losses as of_store

    name = names[0]
    with _open_to_drop(name, dry_run=dry_run) as (store, volume, served):
        found = store.snapshots(name.volume)
        chosen = chosen_snapshots(found, names)
        loss = of_store.of_discard(store._opened, name.volume, chosen, recursive=recursive)
        if served is not None:
            if not set(chosen).isdisjoint(_ancestors(served)):
                losses.refuse_unagreed(served, "discard of a snapshot that the disk stands on")
            losses.refuse_read(served, [one.partition("@")[2] for one in loss.snapshots])
        if volume is None:
            losses.tell_dry_run(as_json, "discard", [loss])
            return
        losses.agree("discard", [loss], yes=yes)
        before = {s.name for s in volume.snapshots}
        volume.discard(chosen, recursive=recursive, guid=guids_of(found, chosen))
        gone = sorted(before - {s.name for s in volume.snapshots})
    value = {"volume": name.volume, "discarded": gone}
    output.tell(as_json, value, lambda: f"discarded {', '.join(f'{name.volume}@{one}' for one in gone)}")


@contextmanager
def _open_to_drop(
    name: Name, *, dry_run: bool
) -> "Iterator[tuple[Store, Volume | LiveVolume | None, LiveVolume | None]]":
    """Give the store, the volume to be changed with all that was written to it flushed, and its server if it has one.

    For a dry run the volume is not opened, and None: it is found that it could be.
    """
    from onionskin.operations.losses import refuse_open

    with name.open_store() as store:
        served = losses.flushed(store, name.volume)
        if served is not None:
            with served:
                yield store, None if dry_run else served, served
        elif dry_run:
            refuse_open(store._opened, name.volume)
            yield store, None, None
        else:
            with store.open(name.volume) as volume:
                volume.flush()
                yield store, volume, None


def _ancestors(volume: "Volume | LiveVolume") -> list[str]:
    """Name the snapshots that the head stands on, the nearest first."""
    parents = {s.name: s.parent for s in volume.snapshots}
    at = volume.parent.name if volume.parent is not None else None
    line = []
    while at is not None:
        line.append(at)
        at = parents[at]
    return line


@click.command()
@click.argument("names", type=VOLUME_OR_SNAPSHOT, nargs=-1, required=True, metavar=SNAPSHOTS)
@click.option("--into-base", is_flag=True, help="Write the snapshot, or the whole volume, into the base file.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads that copy; 0 chooses.")
@click.option("--rate", type=SIZE, metavar="SIZE", help="Copy at most so many bytes a second, as 100M.")
@dry_run_option
@trust_option
@json_option
def merge(
    names: tuple[Name, ...], into_base: bool, threads: int, rate: int | None, dry_run: bool, as_json: bool
) -> None:
    """Drop snapshots' names and keep all data.

    Several snapshots of a volume, and ranges as vms/web@a..@c (all from a to c in the order of taking), vms/web@a.. and
    vms/web@..@c, are merged together, or none is.

    With --into-base, write a snapshot, or the whole volume, into the base file itself. Ctrl-C ends that, and the same
    command goes on with it. Machines can read and write a served volume meanwhile.
    """
    if rate is not None and not into_base:
        raise click.UsageError("--rate is about --into-base; a merge into a layer copies nothing")
    if into_base and len(names) > 1:
        raise click.UsageError("--into-base takes one name: the layers up to that snapshot are written into the base")
    if into_base and dry_run:
        raise click.UsageError(
            "--dry-run is about merges of snapshots; --into-base writes into the base, and drops no data"
        )
    for name in names:
        if not into_base and name.snapshot is None:
            raise click.UsageError(f"name the snapshot to merge, as {name}@SNAPSHOT, or give --into-base")
    if into_base:
        _merge_into_base(names[0], threads, rate or 0, as_json)
    else:
        _merge(names, dry_run, as_json)


def _merge(names: tuple[Name, ...], dry_run: bool, as_json: bool) -> None:
    from onionskin.operations import losses as of_store

    name = names[0]
    if dry_run:
        with _open_to_drop(name, dry_run=True) as (store, _, served):
            chosen = chosen_snapshots(store.snapshots(name.volume), names)
            loss = of_store.of_merge(store._opened, name.volume, chosen)
            if served is not None:
                losses.refuse_read(served, chosen)
        losses.tell_dry_run(as_json, "merge", [loss])
        return
    with name.open_volume() as (store, volume):
        found = store.snapshots(name.volume)
        chosen = chosen_snapshots(found, names)
        volume.merge(chosen, guid=guids_of(found, chosen))
    value = {"volume": name.volume, "merged": sorted(chosen), "into_base": False}
    output.tell(as_json, value, lambda: f"merged {listed(names, chosen)}")


def _merge_into_base(name: Name, threads: int, rate: int, as_json: bool) -> None:
    with name.open_volume() as (_, volume):
        if name.snapshot is not None:
            find_snapshot(volume.snapshots, name)
        before = {s.name for s in volume.snapshots}
        with output.progress(f"merge {name} into its base", as_json) as progress:
            volume.merge_into_base(name.snapshot, progress=progress, threads=threads, bytes_per_second=rate)
        gone = sorted(before - {s.name for s in volume.snapshots})
    value = {"volume": name.volume, "merged": gone, "into_base": True}
    output.tell(as_json, value, lambda: f"merged {name} into its base")


@click.command()
@click.argument("a", type=SNAPSHOT, metavar="STORE/VOLUME@A")
@click.argument("b", type=VOLUME_OR_SNAPSHOT, metavar="STORE/VOLUME[@B]")
@click.option("--json-lines", "as_lines", is_flag=True, help="Print each extent as JSON on a line of its own.")
@trust_option
@json_option
def diff(a: Name, b: Name, as_lines: bool, as_json: bool) -> None:
    """Show what changed between two snapshots, or up to a head.

    Both may be of different volumes of a store, such as a snapshot and a clone of it. Only what the volumes hold is
    looked at: what was written again with the same contents counts as changed.
    """
    if as_lines and as_json:
        raise click.UsageError("--json and --json-lines do not go together")
    same_store(a, b)
    with a.open_store() as store:
        extents = _diff(store, a, b)
    if as_lines:
        for offset, length, state in extents:
            output.echo(output.as_json_line({"offset": offset, "length": length, "state": output.STATES[state]}))
        return
    changed = sum(length for _, length, _ in extents)
    value = {
        "from": a.snapshot,
        "to": b.snapshot,
        "bytes": changed,
        "extents": [{"offset": o, "length": n, "state": output.STATES[s]} for o, n, s in extents],
    }
    if a.volume != b.volume:
        value |= {"from_volume": a.volume, "to_volume": b.volume}

    def draw() -> str:
        rows = [(str(o), str(n), output.STATES[s]) for o, n, s in extents]
        listed = output.table(("OFFSET", "LENGTH", "NOW"), rows, right="OFFSET LENGTH")
        return (
            f"{listed}\n{output.size(changed)} in {len(rows)} extent{'s' * (len(rows) > 1)}"
            if rows
            else "no difference"
        )

    output.show(as_json, value, draw)


def _diff(store: "Store", a: Name, b: Name) -> list[tuple[int, int, int]]:
    from onionskin.operations.losses import refuse_unflushed

    start = f"{a.volume}@{a.required_snapshot}"
    if b.snapshot is not None:
        found = store.diff(start, f"{b.volume}@{b.snapshot}")
    else:
        find_snapshot(store.snapshots(a.volume), a)
        # An open head does not change meanwhile; a served one goes on changing, and what was written to it is flushed.
        served = live(store, b.volume)
        with served or open_to_read(store, b) as volume:
            if not served:  # diff only looks, so it does not make durable what a writer that died left
                refuse_unflushed(store._opened, store._opened.catalog.volume(b.volume).id, b.volume)
            if a.volume == b.volume:
                found = volume.diff(a.required_snapshot, None)
            else:
                if served:
                    served.flush()
                found = store.diff(start, b.volume)
    return [(int(offset), int(length), int(state)) for offset, length, state in found]


@click.command()
@click.argument("name", type=VOLUME_OR_SNAPSHOT, metavar="STORE/VOLUME[@SNAPSHOT]")
@click.option(
    "--forks", is_flag=True, help="Show instead what each fork of it holds, and what all of them do together."
)
@trust_option
@json_option
def usage(name: Name, forks: bool, as_json: bool) -> None:
    """Show how much snapshots hold, and how much dropping them frees.

    With --forks, PRIVATE is what comes back if that fork alone is deleted, and SHARED what it stands on that stays then.
    """
    if forks:
        _show_usage_of_forks(name, as_json=as_json)
        return
    if name.snapshot is not None:
        raise click.UsageError(f"usage shows all snapshots of a volume: give {name.store}/{name.volume}, or --forks")
    from onionskin.operations.losses import refuse_left_unflushed

    with name.open_store() as store:
        served = live(store, name.volume)  # its server knows the changes that are not durable yet
        if not served:
            refuse_left_unflushed(store._opened, name.volume)
        with served or nullcontext():
            found = served.usage() if served else store.usage(name.volume)
    value = [
        {
            "snapshot": row.snapshot,
            "bytes_held": row.bytes_held,
            "bytes_freed_by_discard": row.bytes_freed_by_discard,
            "bytes_freed_by_merge": row.bytes_freed_by_merge,
        }
        for row in found
    ]
    headings = ("SNAPSHOT", "HOLDS", "DISCARD-FREES", "MERGE-FREES")
    rows = [
        (
            row.snapshot or "(head)",
            output.size(row.bytes_held),
            output.size(row.bytes_freed_by_discard),
            output.size(row.bytes_freed_by_merge),
        )
        for row in found
    ]
    output.show(as_json, value, lambda: output.table(headings, rows, right=" ".join(headings[1:])))


def _show_usage_of_forks(name: Name, *, as_json: bool) -> None:
    with name.open_store() as store:
        found = store.usage_of_forks(name.volume, name.snapshot)
    value = [{"fork": row.fork, "private_bytes": row.private_bytes, "shared_bytes": row.shared_bytes} for row in found]
    rows = [(row.fork or "(together)", output.size(row.private_bytes), output.size(row.shared_bytes)) for row in found]
    output.show(as_json, value, lambda: output.table(("FORK", "PRIVATE", "SHARED"), rows, right="PRIVATE SHARED"))
