"""The verbs that drop what was written or a name of it: revert, discard, merge."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from onionskin.cli import losses, output
from onionskin.cli.arguments import SIZE, SNAPSHOT, SNAPSHOT_OR_RANGE, VOLUME_OR_RANGE, Name, trust_option
from onionskin.cli.chosen import SNAPSHOTS, chosen_snapshots, find_snapshot, guids_of, listed
from onionskin.cli.losses import dry_run_option, yes_option
from onionskin.cli.output import json_option

if TYPE_CHECKING:
    from onionskin.control.client import LiveVolume
    from onionskin.store import Store
    from onionskin.volume import Volume


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
@click.argument("names", type=SNAPSHOT_OR_RANGE, nargs=-1, required=True, metavar=SNAPSHOTS)
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
    from onionskin.operations.unflushed import refuse_open

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
@click.argument("names", type=VOLUME_OR_RANGE, nargs=-1, required=True, metavar=SNAPSHOTS)
@click.option("--into-base", is_flag=True, help="Write the snapshot, or the whole volume, into the base file.")
@click.option("--threads", type=click.IntRange(0, 64), default=0, help="Threads that copy; 0 chooses.")
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
