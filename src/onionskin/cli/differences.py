"""The verbs that say what snapshots have of their own: diff, usage."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from onionskin.cli import output
from onionskin.cli.arguments import SNAPSHOT, VOLUME_OR_SNAPSHOT, Name, live, open_to_read, trust_option
from onionskin.cli.chosen import find_snapshot, same_store
from onionskin.cli.output import json_option

if TYPE_CHECKING:
    from onionskin.store import Store


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
    from onionskin.operations.unflushed import refuse_unflushed

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
