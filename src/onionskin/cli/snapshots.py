"""The verb snapshot. It is the one that is waited for with a machine stopped, and stands alone in its module."""

import click

from onionskin.cli import output
from onionskin.cli.arguments import NEW_SNAPSHOT_OR_NONE, Name, trust_option
from onionskin.cli.chosen import same_store
from onionskin.cli.output import json_option
from onionskin.cli.values import snapshot_value


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
