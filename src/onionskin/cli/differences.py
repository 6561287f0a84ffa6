"""The verbs that say what snapshots have of their own: diff, usage."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from onionskin.cli import output
from onionskin.cli.arguments import VOLUME_OR_SNAPSHOT, Name, live, open_to_read, trust_option
from onionskin.cli.chosen import find_snapshot, same_store
from onionskin.cli.output import json_option
from onionskin.errors import SnapshotNotFoundError

if TYPE_CHECKING:
    from onionskin.store import Store


@click.command()
@click.argument(
    "names", type=VOLUME_OR_SNAPSHOT, nargs=-1, required=True, metavar="STORE/VOLUME[@A] [STORE/VOLUME[@B]]"
)
@click.option("--json-lines", "as_lines", is_flag=True, help="Print each extent as JSON on a line of its own.")
@trust_option
@json_option
def diff(names: tuple[Name, ...], as_lines: bool, as_json: bool) -> None:
    """Show what changed between two snapshots, or up to a head.

    Both may be of different volumes of a store, such as a snapshot and a clone of it. Only what the volumes hold is
    looked at: what was written again with the same contents counts as changed.

    With one name, show what changed since then: behind a snapshot, up to the head of its volume, and without one, since
    the snapshot that the disk stands on.
    """
    if as_lines and as_json:
        raise click.UsageError("--json and --json-lines do not go together")
    if len(names) > 2:
        raise click.UsageError("diff compares two states; three are named")
    a, b = names[0], names[-1]
    if len(names) == 2:
        if a.snapshot is None:
            raise click.UsageError(f"'{a}' names no snapshot: write {a}@SNAPSHOT, or {b} alone for what changed in it")
        same_store(a, b)
    with a.open_store() as store:
        if a.snapshot is None:
            a = a._replace(snapshot=_snapshot_below(store, a))
        elif len(names) == 1:
            b = a._replace(snapshot=None)
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


def _snapshot_below(store: "Store", name: Name) -> str:
    """Return the snapshot that the head of a volume stands on."""
    with live(store, name.volume) or open_to_read(store, name) as volume:
        parent = volume.parent
    if parent is None:
        raise SnapshotNotFoundError(
            f"{name} stands on no snapshot of its own, since which anything could have changed; name two states, such as the "
            f"snapshot that 'onionskin lineage {name}' says and {name}"
        )
    return parent.name


def _diff(store: "Store", a: Name, b: Name) -> list[tuple[int, int, int]]:
    from onionskin.operations import differences
    from onionskin.operations.unflushed import refuse_unflushed

    start = f"{a.volume}@{a.required_snapshot}"
    if b.snapshot is not None:
        found = differences.diff(store._opened, start, f"{b.volume}@{b.snapshot}")
    else:
        find_snapshot(store.snapshots(a.volume), a)
        # An open head does not change meanwhile; a served one goes on changing, and what was written to it is flushed.
        served = live(store, b.volume)
        with served or open_to_read(store, b) as volume:
            if not served:  # diff only looks, so it does not make durable what a writer that died left
                refuse_unflushed(store._opened, store._opened.catalog.volume(b.volume).id, b.volume)
            if a.volume == b.volume:
                found = volume._diff(a.required_snapshot)
            else:
                if served:
                    served.flush()
                found = differences.diff(store._opened, start, b.volume)
    return [extent[:3] for extent in found]


@click.command()
@click.argument("name", type=VOLUME_OR_SNAPSHOT, metavar="STORE/VOLUME[@SNAPSHOT]")
@click.option(
    "--forks", is_flag=True, help="Show instead what each fork of it holds, and what all of them do together."
)
@trust_option
@json_option
def usage(name: Name, forks: bool, as_json: bool) -> None:
    """Show how much snapshots hold, and what dropping them frees.

    With --forks, PRIVATE is what comes back if that fork alone is deleted, and SHARED what it stands on that stays then.
    """
    if forks:
        _show_usage_of_forks(name, as_json=as_json)
        return
    if name.snapshot is not None:
        raise click.UsageError(f"usage shows all snapshots of a volume: give {name.store}/{name.volume}, or --forks")
    from onionskin.operations.unflushed import refuse_left_unflushed

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
