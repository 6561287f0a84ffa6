"""The verbs that list in columns: list, snapshots."""

from typing import TYPE_CHECKING

import click

from onionskin.base.paths import FilePath
from onionskin.cli import output
from onionskin.cli.arguments import STORE, VOLUME_OR_STORE, Name, label_option, open_store, trust_option
from onionskin.cli.columns import Asked, Column, column_options, draw, in_order, is_asked
from onionskin.cli.output import json_option
from onionskin.cli.values import holder, labels_text, snapshot_value, space_of, space_value, volume_value
from onionskin.errors import VolumeNotFoundError

if TYPE_CHECKING:
    from onionskin.catalog.tree import Snapshot
    from onionskin.operations.listing import VolumeInfo
    from onionskin.operations.usage import SnapshotSpace
    from onionskin.store import Store


_OF_VOLUMES: "tuple[Column[VolumeInfo], ...]" = (
    Column("name", "VOLUME", lambda about: about.name),
    Column("size", "SIZE", lambda about: about.size_bytes, is_size=True),
    Column("used", "USED", lambda about: about.used_bytes, is_size=True, is_slow=True),
    Column("written", "WRITTEN", lambda about: about.written_bytes, is_size=True, is_slow=True),
    Column("snapshots", "SNAPSHOTS", lambda about: about.snapshots, is_number=True),
    Column("wipe", "WIPE", lambda about: about.wipe),
    Column("base", "BASE", lambda about: None if about.base is None else str(about.base)),
    Column("holder", "HELD-BY", lambda about: holder(about) or None),
    Column("block-size", "BLOCK-SIZE", lambda about: about.block_size, is_size=True),
    Column("created", "CREATED", lambda about: about.created),
    Column("expires", "EXPIRES", lambda about: about.expires),
    Column("labels", "LABELS", lambda about: labels_text(about.labels) or None),
)
_SHOWN_OF_VOLUMES = ("name", "size", "used", "written", "snapshots", "wipe", "base", "holder")

# A snapshot, what it takes, and its volume where those of a whole store are listed.
_Listed = tuple["Snapshot", "SnapshotSpace | None", str | None]
_OF_SNAPSHOTS: "tuple[Column[_Listed], ...]" = (
    Column("name", "SNAPSHOT", lambda one: one[0].name if one[2] is None else f"{one[2]}@{one[0].name}"),
    Column("size", "SIZE", lambda one: one[0].size_bytes, is_size=True),
    Column("used", "USED", lambda one: one[1].used_bytes if one[1] else None, is_size=True, is_slow=True),
    Column("written", "WRITTEN", lambda one: one[1].written_bytes if one[1] else None, is_size=True, is_slow=True),
    Column("taken", "TAKEN", lambda one: one[0].created),
    Column("parent", "PARENT", lambda one: one[0].parent),
    Column("note", "NOTE", lambda one: one[0].note),
    Column("guid", "GUID", lambda one: one[0].guid),
)
_SHOWN_OF_SNAPSHOTS = ("name", "size", "used", "written", "taken", "parent", "note")
_SHOWN_OF_ALL = ("name", "size", "taken", "parent", "note")


@click.command(name="list")
@click.argument("store", type=STORE)
@label_option("List those alone that have this label.")
@click.option(
    "--all", "owned", is_flag=True, help="List those that go with a machine too: its RAM, and disks of forks."
)
@column_options(_OF_VOLUMES)
@trust_option
@json_option
def list_volumes(
    store: FilePath, labels: tuple[tuple[str, str], ...], owned: bool, asked: Asked, as_json: bool
) -> None:
    """List the volumes of a store.

    USED is what a volume and its snapshots hold on the disk, without what a clone shares with its origin. WRITTEN is what of
    that was written since the last snapshot. In a store of more than 20,000 files they are shown only with -o.
    """
    with open_store(store) as opened:
        space = is_asked(asked, _OF_VOLUMES)
        if space is None:
            space = as_json or is_quick(opened)
        volumes = in_order(asked, _OF_VOLUMES, opened.volumes(labels=dict(labels), space=space, owned=owned))
    value = [volume_value(about) for about in volumes] if as_json else None
    output.show(as_json, value, lambda: draw(asked, _OF_VOLUMES, volumes, _SHOWN_OF_VOLUMES))


def is_quick(store: "Store") -> bool:
    """Whether nobody minds waiting for what the volumes of a store hold."""
    from onionskin.operations import space

    return space.is_quick(store._opened)


@click.command()
@click.argument("name", type=VOLUME_OR_STORE, metavar="STORE[/VOLUME]")
@column_options(_OF_SNAPSHOTS)
@trust_option
@json_option
def snapshots(name: Name | FilePath, asked: Asked, as_json: bool) -> None:
    """List the snapshots of a volume or of a store.

    USED is what nothing else reads, and what comes back if that snapshot alone is dropped, as merge does. WRITTEN is what was
    written between the snapshot before it and this one. Where much was written, and of a store, they are shown only with -o.
    """
    space = is_asked(asked, _OF_SNAPSHOTS)
    if isinstance(name, FilePath):
        with open_store(name) as store:
            found = [row for volume in store for row in _those_of(store, volume, space or False, is_one=False)]
    else:
        with name.open_store() as store:
            found = _those_of(store, name.volume, space)
    listed = in_order(asked, _OF_SNAPSHOTS, found)
    value = [
        ({} if volume is None else {"volume": volume}) | snapshot_value(one) | space_value(taken)
        for one, taken, volume in listed
    ]
    shown = _SHOWN_OF_ALL if isinstance(name, FilePath) else _SHOWN_OF_SNAPSHOTS
    output.show(as_json, value, lambda: draw(asked, _OF_SNAPSHOTS, listed, shown))


def _those_of(store: "Store", volume: str, space: bool | None, *, is_one: bool = True) -> "list[_Listed]":
    """Return the snapshots of a volume; none if it is one of many, and was deleted meanwhile."""
    try:
        found = store.snapshots(volume)
        taken = space_of(store, volume, wanted=space) if found else {}
    except VolumeNotFoundError:
        if is_one:
            raise
        return []
    return [(one, taken.get(one.name), None if is_one else volume) for one in found]
