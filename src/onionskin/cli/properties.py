"""The verbs for what a volume was made with, and a store makes volumes with: get and set."""

from typing import TYPE_CHECKING, Any, Literal

import click

from onionskin.base.paths import FilePath
from onionskin.base.sizes import parse_size
from onionskin.cli import output
from onionskin.cli.arguments import VOLUME_OR_STORE, Name, open_store, trust_option
from onionskin.cli.output import json_option
from onionskin.cli.values import PROPERTIES, labels_text

if TYPE_CHECKING:
    from datetime import datetime

    from click.shell_completion import CompletionItem

    from onionskin.catalog import Defaults
    from onionskin.operations.listing import VolumeInfo

_OF_STORE = ("wipe", "block-size")


def complete_assignment(ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Offer what can be set."""
    from click.shell_completion import CompletionItem

    offered = ["wipe=release", "wipe=zero"]
    if isinstance(ctx.params.get("name"), FilePath):
        offered.append("block-size=")
    else:
        offered += ["lifetime=none", "lifetime=", "label:"]
    return [CompletionItem(one) for one in offered if one.startswith(incomplete)]


@click.command(name="set")
@click.argument("name", type=VOLUME_OR_STORE, metavar="STORE[/VOLUME]")
@click.argument("assignment", metavar="PROPERTY=VALUE", shell_complete=complete_assignment)
@trust_option
@json_option
def set_(name: Name | FilePath, assignment: str, as_json: bool) -> None:
    """Change a property of a volume or of a store.

    Of a volume, which nobody may have open: wipe=zero overwrites from then on what is freed of the volume and its
    snapshots, and wipe=release gives it back as it is.

    Of any volume: lifetime=2h has 'expire' delete it from then on, counted from now, and lifetime=none keeps it.
    label:task=42 marks it, and label:task= takes that label away.

    Of a store: wipe and block-size are those of the volumes that are made or imported from then on without --wipe and
    --block-size. Volumes that exist keep theirs, and a clone has those of its origin.
    """
    key, _, value = assignment.partition("=")
    if isinstance(name, FilePath):
        _set_default(name, key, value, assignment, as_json)
        return
    is_label = key.startswith("label:") and "=" in assignment
    if not is_label and key not in ("wipe", "lifetime"):
        raise click.UsageError(
            f"{assignment!r} sets no property of a volume that can be set: write wipe=zero, wipe=release, lifetime=2h, "
            "lifetime=none or label:KEY=VALUE"
        )
    with name.open_store() as store:
        if is_label:
            store.set_labels(name.volume, {key.removeprefix("label:"): value or None})
        elif key == "lifetime":
            store.set_lifetime(name.volume, None if value == "none" else value)
        else:
            store.set_wipe(name.volume, _policy(value))
        about = store.info(name.volume)
    has = f"{name} has {key}={value} now" if value else f"{name} has no {key} any more"
    output.tell(as_json, _values(about), lambda: has)


def _set_default(path: FilePath, key: str, value: str, assignment: str, as_json: bool) -> None:
    if key not in _OF_STORE:
        raise click.UsageError(
            f"{assignment!r} sets no property of a store: write wipe=zero, wipe=release or block-size=SIZE"
        )
    policy = _policy(value) if key == "wipe" else None
    block_size = parse_size(value) if key == "block-size" else None
    with open_store(path) as store:
        defaults = store.set_defaults(wipe=policy, block_size=block_size)
    output.tell(
        as_json,
        _values_of_store(path, defaults),
        lambda: f"volumes that are made in {path} get {key}={value} from now on",
    )


def _policy(value: str) -> Literal["release", "zero"]:
    if value == "zero":
        return "zero"
    if value == "release":
        return "release"
    raise click.UsageError(f"wipe is release or zero, not {value!r}")


@click.command()
@click.argument("name", type=VOLUME_OR_STORE, metavar="STORE[/VOLUME]")
@click.argument("properties", nargs=-1, type=click.Choice((*PROPERTIES, "all")), metavar="[PROPERTY...]")
@click.option("-H", "without_header", is_flag=True, help="Print no heading, and one tab between columns.")
@click.option("-p", "exact", is_flag=True, help="Print exact numbers: bytes, and seconds since 1970.")
@trust_option
@json_option
def get(name: Name | FilePath, properties: tuple[str, ...], without_header: bool, exact: bool, as_json: bool) -> None:
    """Show properties of a volume or of a store.

    All are shown, as with the word all, or those that are named. A volume has wipe, size, block-size, base, created, expires
    and labels. A store has wipe and block-size, which are those of the volumes that are made without saying them. set
    changes wipe, the lifetime and labels, and block-size of a store.
    """
    if "all" in properties:
        properties = ()
    if isinstance(name, FilePath):
        for one in properties:
            if one not in _OF_STORE:
                raise click.UsageError(f"a store has no {one}: it has {' and '.join(_OF_STORE)}")
        with open_store(name) as store:
            defaults = store.defaults()
        chosen, values = properties or _OF_STORE, _values_of_store(name, defaults)
        shown = {"wipe": defaults.wipe, "block-size": _size(defaults.block_size, exact)}
    else:
        with name.open_store() as store:
            about = store.info(name.volume)
        chosen, values = properties or PROPERTIES, _values(about)
        shown = {
            "wipe": about.wipe,
            "size": _size(about.size_bytes, exact),
            "block-size": _size(about.block_size, exact),
            "base": "-" if about.base is None else str(about.base),
            "created": _time(about.created, exact),
            "expires": "-" if about.expires is None else _time(about.expires, exact),
            "labels": labels_text(about.labels) or "-",
        }
    rows = [(key, shown[key]) for key in chosen]

    def draw() -> str:
        if without_header:
            return "\n".join(f"{key}\t{output.exact_cell(value)}" for key, value in rows)
        return output.table(("PROPERTY", "VALUE"), rows)

    output.show(as_json, {key: value for key, value in values.items() if key in _keys(chosen)}, draw)


def _time(at: "datetime", exact: bool) -> str:
    return str(int(at.timestamp())) if exact else output.when(at)


def _size(size_bytes: int, exact: bool) -> str:
    return str(size_bytes) if exact else output.size(size_bytes)


def _values(about: "VolumeInfo") -> dict[str, Any]:
    return {
        "name": about.name,
        "wipe": about.wipe,
        "size_bytes": about.size_bytes,
        "block_size": about.block_size,
        "base": None if about.base is None else str(about.base),
        "created": output.timestamp(about.created),
        "expires": None if about.expires is None else output.timestamp(about.expires),
        "labels": dict(about.labels),
    }


def _values_of_store(path: FilePath, defaults: "Defaults") -> dict[str, Any]:
    return {"path": str(path), "wipe": defaults.wipe, "block_size": defaults.block_size}


def _keys(properties: tuple[str, ...]) -> set[str]:
    return {
        *("name", "path"),
        *({"size": "size_bytes", "block-size": "block_size"}.get(one, one) for one in properties),
    }
