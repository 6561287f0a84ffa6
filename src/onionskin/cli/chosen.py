"""Finds the volume and the snapshots that names and ranges on the command line mean."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from onionskin.base.naming import some_of
from onionskin.cli.arguments import Name
from onionskin.errors import SnapshotNotFoundError

if TYPE_CHECKING:
    from onionskin.catalog.tree import Snapshot
    from onionskin.operations.machine_tree import MachineSnapshotInfo

SNAPSHOTS = "STORE/VOLUME@SNAPSHOT..."


def find_snapshot(snapshots: "list[Snapshot]", name: Name) -> "Snapshot":
    """Find the snapshot that a name means, before the user is asked about it."""
    for snapshot in snapshots:
        if snapshot.name == name.snapshot:
            return snapshot
    raise _not_found(name, "volume")


def _not_found(name: Name, kind: str) -> SnapshotNotFoundError:
    import shlex

    verb = "machine snapshots" if kind == "machine" else "snapshots"
    return SnapshotNotFoundError(
        f"{kind} {name.volume!r} has no snapshot {name.snapshot!r}; "
        f"list them with: onionskin {verb} {shlex.quote(f'{name.store}/{name.volume}')}"
    )


def guids_of(snapshots: "list[Snapshot]", chosen: Sequence[str]) -> list[str]:
    """Return the GUIDs by which chosen snapshots are dropped, since others may take their names until then."""
    by_name = {snapshot.name: snapshot.guid for snapshot in snapshots}
    return [by_name[name] for name in chosen]


def chosen_snapshots(
    snapshots: "Sequence[Snapshot | MachineSnapshotInfo]", names: Sequence[Name], kind: str = "volume"
) -> list[str]:
    """Find the snapshots of one volume, or machine, that names and ranges mean, in the order of taking, each once.

    A range is ``A..@C``, ``A..`` or ``..@C``; both ends are in it. What is the name of a snapshot is no range.
    """

    def place_of(name: Name) -> int:
        if name.snapshot not in places:
            raise _not_found(name, kind)
        return places[name.required_snapshot]

    places = {snapshot.name: place for place, snapshot in enumerate(snapshots)}
    chosen: set[int] = set()
    for name in names:
        if (name.store.resolve(), name.volume) != (names[0].store.resolve(), names[0].volume):
            raise click.UsageError(f"{names[0]} and {name} are not of one {kind}; give one command for each {kind}")
        first, dots, last = name.required_snapshot.partition("..")
        if name.snapshot in places or not dots or (last and not last.startswith("@")):
            chosen.add(place_of(name))
            continue
        if last == "@" or not (first or last):
            raise click.UsageError(f"{name} names no end of the range: write @A..@C, @A.. or @..@C")
        ends = [name._replace(snapshot=end) for end in (first, last.removeprefix("@")) if end]
        found = [place_of(end) for end in ends]
        start = found[0] if first else 0
        stop = found[-1] if last else len(snapshots) - 1
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
