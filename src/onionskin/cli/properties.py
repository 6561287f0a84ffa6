"""The verbs for what a volume was made with: get and set."""

from typing import TYPE_CHECKING, Any

import click

from onionskin.cli import output
from onionskin.cli.arguments import VOLUME, Name, trust_option
from onionskin.cli.output import json_option

if TYPE_CHECKING:
    from onionskin.operations.listing import VolumeInfo

# What can be set, and to what.
_SETTABLE = {"wipe": ("release", "zero")}
_PROPERTIES = ("wipe", "size", "block-size", "base", "created")


@click.command(name="set")
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@click.argument("assignment", metavar="PROPERTY=VALUE")
@trust_option
@json_option
def set_(name: Name, assignment: str, as_json: bool) -> None:
    """Change a property of a volume, which nobody may have open.

    wipe=zero overwrites from then on what is freed of the volume and its snapshots, and wipe=release gives it back as it is.
    """
    key, _, value = assignment.partition("=")
    if key not in _SETTABLE:
        raise click.UsageError(f"{assignment!r} sets no property that can be set: write wipe=zero or wipe=release")
    if value not in _SETTABLE[key]:
        raise click.UsageError(f"{key} is {' or '.join(_SETTABLE[key])}, not {value!r}")
    with name.open_store() as store:
        store.set_wipe(name.volume, "zero" if value == "zero" else "release")
        about = store.info(name.volume)
    output.tell(as_json, _values(about), lambda: f"{name} has {key}={value} now")


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@click.argument("properties", nargs=-1, type=click.Choice(_PROPERTIES), metavar="[PROPERTY...]")
@click.option("-H", "without_header", is_flag=True, help="Print no heading, and one tab between columns.")
@click.option("-p", "exact", is_flag=True, help="Print exact numbers: bytes, and seconds since 1970.")
@trust_option
@json_option
def get(name: Name, properties: tuple[str, ...], without_header: bool, exact: bool, as_json: bool) -> None:
    """Show properties of a volume: those that are named, or all.

    They are wipe, size, block-size, base and created. set changes wipe.
    """
    with name.open_store() as store:
        about = store.info(name.volume)
    chosen = properties or _PROPERTIES
    shown = {
        "wipe": about.wipe,
        "size": str(about.size_bytes) if exact else output.size(about.size_bytes),
        "block-size": str(about.block_size) if exact else output.size(about.block_size),
        "base": "-" if about.base is None else str(about.base),
        "created": str(int(about.created.timestamp())) if exact else output.when(about.created),
    }
    rows = [(key, shown[key]) for key in chosen]

    def draw() -> str:
        if without_header:
            return "\n".join(f"{key}\t{output.cell(value)}" for key, value in rows)
        return output.table(("PROPERTY", "VALUE"), rows)

    output.show(as_json, {key: value for key, value in _values(about).items() if key in _keys(chosen)}, draw)


def _values(about: "VolumeInfo") -> dict[str, Any]:
    return {
        "name": about.name,
        "wipe": about.wipe,
        "size_bytes": about.size_bytes,
        "block_size": about.block_size,
        "base": None if about.base is None else str(about.base),
        "created": output.timestamp(about.created),
    }


def _keys(properties: tuple[str, ...]) -> set[str]:
    return {"name", *({"size": "size_bytes", "block-size": "block_size"}.get(one, one) for one in properties)}
