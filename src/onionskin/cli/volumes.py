"""The verbs for whole volumes: create, tree, list, info, clone, flatten, resize, rename, relocate, delete."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

import onionskin
from onionskin.base.sizes import format_size
from onionskin.cli import losses, output
from onionskin.cli.arguments import (
    NEW_SNAPSHOT,
    NEW_VOLUME,
    SIZE,
    SNAPSHOT,
    STORE,
    VOLUME,
    VOLUME_OR_SNAPSHOT,
    VOLUME_SNAPSHOT_OR_STORE,
    WIPE,
    Name,
    block_size_option,
    live,
    matching,
    note_trust,
    open_store,
    trust_option,
    wipe_option,
)
from onionskin.cli.columns import Asked, Column, column_options, draw, in_order, is_asked
from onionskin.cli.forking import label_option
from onionskin.cli.losses import dry_run_option, yes_option
from onionskin.cli.map import PictureType, write_picture
from onionskin.cli.output import json_option
from onionskin.cli.snapshots import find_snapshot, same_store, snapshot_value, space_of, space_value
from onionskin.errors import FormatError, StateError

if TYPE_CHECKING:
    from onionskin.catalog.tree import Snapshot
    from onionskin.control.client import LiveVolume
    from onionskin.operations.chain_members import ChainLayer
    from onionskin.operations.lineage import Ancestor
    from onionskin.operations.listing import TreeNode, VolumeInfo
    from onionskin.operations.losses import Loss
    from onionskin.operations.usage import SnapshotSpace
    from onionskin.store import Store
    from onionskin.volume import Volume

FILE = click.Path(path_type=Path, readable=False)


def volume_value(info: "VolumeInfo") -> dict[str, Any]:
    """Return the JSON value of a volume."""
    return {
        "name": info.name,
        "size_bytes": info.size_bytes,
        "block_size": info.block_size,
        "wipe": info.wipe,
        "base": None if info.base is None else str(info.base),
        "created": output.timestamp(info.created),
        "snapshots": info.snapshots,
        "holder": info.holder,
        "used_bytes": info.used_bytes,
        "written_bytes": info.written_bytes,
    }


@click.command()
@click.argument("name", type=NEW_VOLUME, metavar="STORE/VOLUME")
@click.option("--base", type=FILE, help="A raw image below the volume; only merge --into-base writes to it.")
@click.option(
    "--format",
    "base_format",
    type=click.Choice(["raw"]),
    help="Take the bytes of the base for the disk, whatever they look like.",
)
@click.option("--size", type=SIZE, help="Size of the disk, as 20G; by default that of the base.")
@block_size_option
@wipe_option
@click.option("--digest", is_flag=True, help="Take a digest of the whole base, for relocate --verify.")
@click.option("--group", help="Let the members of this group use the store that is made, too.")
@trust_option
@json_option
def create(
    name: Name,
    base: Path | None,
    base_format: Literal["raw"] | None,
    size: int | None,
    block_size: int | None,
    wipe: Literal["release", "zero"] | None,
    digest: bool,
    group: str | None,
    as_json: bool,
) -> None:
    """Make a volume over a base image or over nothing.

    The store is made if it is missing.
    """
    from onionskin.exchange.image_formats import refuse_as_raw

    if base is None and size is None:
        raise click.UsageError("a volume wants --base FILE or --size SIZE")
    if digest and base is None:
        raise click.UsageError("--digest is about the base: give --base FILE too")
    if base_format is not None and base is None:
        raise click.UsageError("--format is about the base: give --base FILE too")
    if base is not None:  # one that is missing, or is not to be had as a base, shall not leave an empty store behind
        if base.is_block_device():
            raise FormatError(
                f"{base} is a block device, and a base is a raw image file: a device has no time of change, so nobody could "
                "tell that it was written to meanwhile. Copy it with 'onionskin import'"
            )
        base.stat()
        if base_format is None and base.is_file():  # to open a FIFO waits; it is refused below, as no regular file
            with open(base, "rb", buffering=0) as file:
                refuse_as_raw(file.fileno(), base)
    with open_store(name.store, create=True, group=group) as store:
        store.create(
            name.volume,
            base=base,
            base_format=base_format,
            size=size,
            block_size=block_size,
            wipe=wipe,
            digest=digest,
        ).close()
        about = store.info(name.volume)
    over = f" over {about.base}" if about.base else ""
    output.tell(as_json, volume_value(about), lambda: f"made {name}: {output.size(about.size_bytes)}{over}")


@click.command()
@click.argument("store", type=STORE)
@click.option("--output", "-o", "path", type=PictureType(".svg"), help="Write a picture as SVG; - is stdout.")
@trust_option
@json_option
def tree(store: Path, path: Path | None, as_json: bool) -> None:
    """Draw the bases, snapshots, clones and heads of a store.

    A fork or clone that does not stand on the snapshot that it began as says what it came from.
    """
    if as_json and path is not None and str(path) == "-":
        raise click.UsageError("--json and --output - both want stdout: give --output a file")
    with open_store(store) as opened:
        nodes = opened.tree()
    if path is not None:
        from onionskin.pictures.trees import tree_svg

        write_picture(path, tree_svg(str(store), nodes).encode())
        if str(path) == "-":
            return
    output.show(
        as_json,
        [_node_value(node) for node in nodes] if as_json else None,
        lambda: _draw(nodes) if path is None else f"wrote {path}",
    )


def _node_value(root: "TreeNode") -> dict[str, Any]:
    """Return the JSON value of a node and all below it, without recursion, as chains can be deep."""
    values: dict[int, dict[str, Any]] = {}
    pending = [root]
    order = []
    while pending:
        node = pending.pop()
        order.append(node)
        pending.extend(node.children)
    for node in reversed(order):
        values[id(node)] = {
            "kind": node.kind,
            "name": node.name,
            "size_bytes": node.size_bytes,
            "created": output.timestamp(node.created),
            "note": node.note,
            "bytes_held": node.bytes_held,
            "origins": [_origin_value(one) for one in node.origins],
            "children": [values[id(child)] for child in node.children],
        }
    return values[id(root)]


def _origin_value(origin: "Ancestor") -> dict[str, Any]:
    return {
        "volume": origin.name,
        "snapshot": origin.snapshot,
        "created": output.timestamp(origin.created),
        "dropped": output.timestamp(origin.dropped),
    }


_COLOURS = {"base": "cyan", "volume": "cyan", "snapshot": "green", "layer": "bright_black", "head": "yellow"}


def _node_line(node: "TreeNode", origins: "Sequence[Ancestor]") -> str:
    from onionskin.pictures.trees import source

    # A layer without a name is one that a merge left because several children need it.
    label = click.style(output.cell(node.name) if node.name else "(no name)", fg=_COLOURS.get(node.kind), bold=True)
    about = [node.kind, output.size(node.size_bytes)]
    if node.kind != "base":
        about.append(f"holds {output.size(node.bytes_held)}")
    if node.kind == "snapshot" and node.created is not None:
        about.append(output.when(node.created))
    for one in origins:
        gone = f" (dropped {output.when(one.dropped)})" if one.dropped else ""
        about.append(f"from {output.cell(source(one))}{gone}")
    note = f"  {output.cell(node.note)}" if node.note else ""
    return f"{label}  {', '.join(about)}{note}"


def _draw(nodes: "list[TreeNode]") -> str:
    """Draw trees; a node with one child goes straight down, so that a long chain stays on the page."""
    from onionskin.pictures.trees import origins_to_show

    fancy = output.printable("├└│") == "├└│"
    branch, last, pipe = ("├── ", "└── ", "│   ") if fancy else ("|-- ", "`-- ", "|   ")
    lines = []
    pending: list[tuple[TreeNode, str, str, str | None]] = [(node, "", "", None) for node in reversed(nodes)]
    while pending:
        node, lead, below, beneath = pending.pop()
        lines.append(lead + _node_line(node, origins_to_show(node, beneath)))
        for index, child in enumerate(reversed(node.children)):
            mark, under = (last, "    ") if index == 0 else (branch, pipe)
            pending.append((child, below + mark, below + under, node.name))
    return "\n".join(lines) or "no volumes"


_COLUMNS: "tuple[Column[VolumeInfo], ...]" = (
    Column("name", "VOLUME", lambda about: about.name),
    Column("size", "SIZE", lambda about: about.size_bytes, is_size=True),
    Column("used", "USED", lambda about: about.used_bytes, is_size=True, is_slow=True),
    Column("written", "WRITTEN", lambda about: about.written_bytes, is_size=True, is_slow=True),
    Column("snapshots", "SNAPSHOTS", lambda about: about.snapshots, is_number=True),
    Column("wipe", "WIPE", lambda about: about.wipe),
    Column("base", "BASE", lambda about: None if about.base is None else str(about.base)),
    Column("holder", "HELD-BY", lambda about: _holder(about) or None),
    Column("block-size", "BLOCK-SIZE", lambda about: about.block_size, is_size=True),
    Column("created", "CREATED", lambda about: about.created),
)
_SHOWN = ("name", "size", "used", "written", "snapshots", "wipe", "base", "holder")


@click.command(name="list")
@click.argument("store", type=STORE)
@label_option("List those alone that have this label.")
@click.option(
    "--all", "owned", is_flag=True, help="List those that go with a machine too: its RAM, and disks of forks."
)
@column_options(_COLUMNS)
@trust_option
@json_option
def list_volumes(store: Path, labels: tuple[tuple[str, str], ...], owned: bool, asked: Asked, as_json: bool) -> None:
    """List the volumes of a store.

    USED is what a volume and its snapshots hold on the disk, without what a clone shares with its origin. WRITTEN is what of
    that was written since the last snapshot. In a store of more than 20,000 files they are shown only with -o.
    """
    with open_store(store) as opened:
        space = is_asked(asked, _COLUMNS)
        if space is None:
            space = as_json or is_quick(opened)
        volumes = in_order(asked, _COLUMNS, opened.volumes(labels=dict(labels), space=space, owned=owned))
    value = [volume_value(about) for about in volumes] if as_json else None
    output.show(as_json, value, lambda: draw(asked, _COLUMNS, volumes, _SHOWN))


def is_quick(store: "Store") -> bool:
    """Whether nobody minds waiting for what the volumes of a store hold."""
    from onionskin.operations import space

    return space.is_quick(store._opened)


def _holder(about: "VolumeInfo") -> str:
    return "" if about.holder is None else f"process {about.holder}"


@click.command()
@click.argument("name", type=VOLUME_SNAPSHOT_OR_STORE, metavar="STORE[/VOLUME[@SNAPSHOT]]")
@trust_option
@json_option
def info(name: Name | Path, as_json: bool) -> None:
    """Describe a store, a volume or a snapshot.

    Of a volume and a snapshot that includes the layers that it stands on, down to the base, and what each of them holds.
    """
    if isinstance(name, Path):
        _show_store(name, as_json)
        return
    with name.open_store() as store:
        about = store.info(name.volume)
        snapshot = find_snapshot(store.snapshots(name.volume), name) if name.snapshot else None
        space = space_of(store, name.volume, wanted=None).get(snapshot.name) if snapshot else None
        chain = store.chain(name.volume, name.snapshot)
    if snapshot is None:
        pairs, value = _volume_fields(about), volume_value(about)
    else:
        pairs, value = _snapshot_fields(about, snapshot, space), snapshot_value(snapshot) | space_value(space)
    value["chain"] = [_layer_value(layer) for layer in chain]
    output.show(as_json, value, lambda: f"{output.fields(pairs)}\n\n{_draw_chain(chain)}")


def _volume_fields(about: "VolumeInfo") -> list[tuple[str, str]]:
    return [
        ("volume", about.name),
        ("size", f"{output.size(about.size_bytes)} ({about.size_bytes} bytes)"),
        ("block size", output.size(about.block_size)),
        ("wipe", about.wipe),
        ("base", str(about.base or "none")),
        ("made", output.when(about.created)),
        ("snapshots", str(about.snapshots)),
        ("used", output.size(about.used_bytes)),
        ("written", f"{output.size(about.written_bytes)} since the last snapshot"),
        ("held by", _holder(about) or "nobody"),
    ]


def _snapshot_fields(about: "VolumeInfo", snapshot: "Snapshot", space: "SnapshotSpace | None") -> list[tuple[str, str]]:
    return [
        ("snapshot", snapshot.name),
        ("of volume", about.name),
        ("size", f"{output.size(snapshot.size_bytes)} ({snapshot.size_bytes} bytes)"),
        ("used", output.size(space.used_bytes if space else None)),
        ("written", output.size(space.written_bytes if space else None)),
        ("taken", output.when(snapshot.created)),
        ("parent", snapshot.parent or "none"),
        ("note", snapshot.note),
        ("guid", snapshot.guid),
    ]


def _layer_value(layer: "ChainLayer") -> dict[str, Any]:
    return {
        "kind": layer.kind,
        "name": layer.name,
        "created": output.timestamp(layer.created),
        "size_bytes": layer.size_bytes,
        "bytes_held": layer.bytes_held,
        "format": layer.format,
    }


_LAYERS_SHOWN = 30


def _draw_chain(chain: "list[ChainLayer]") -> str:
    """Draw what a disk stands on, top first; of a long chain its beginning, and the base."""
    shown = chain if len(chain) <= _LAYERS_SHOWN else [*chain[: _LAYERS_SHOWN - 2], *chain[-1:]]
    rows = [
        (
            f"{layer.kind}, {layer.format}" if layer.format else layer.kind,
            output.size(layer.size_bytes),
            "missing" if layer.bytes_held is None else output.size(layer.bytes_held),
            output.when(layer.created) or "-",
            layer.name,  # last, since a path may be long
        )
        for layer in shown
    ]
    lines = output.table(("LAYER", "SIZE", "HOLDS", "MADE", "NAME"), rows, right="SIZE HOLDS").split("\n")
    if len(shown) < len(chain):
        lines.insert(len(lines) - 1, f"... {len(chain) - len(shown)} more, which --json lists")
    return "\n".join(lines)


def _show_store(path: Path, as_json: bool) -> None:
    with open_store(path) as store:
        about = store.store_info()
    size = output.size
    waits = [f"{about.pending_work} files or parts of files are to be freed"] if about.pending_work else []
    if about.unfinished_base_merges:
        waits.append("a merge into a base was begun and has not ended; run 'onionskin merge --into-base' again")
    by_repair = (
        f"{size(about.bytes_freed_by_repair)} in files that nothing names; onionskin check --repair removes them"
    )
    pairs = [
        ("store", about.path),
        ("format", f"version {about.format_version}"),
        ("volumes", str(about.volumes)),
        ("snapshots", str(about.snapshots)),
        ("holds", f"{size(about.bytes_held)}, and {size(about.map_bytes)} of block maps"),
        ("work", "; ".join(waits) or "none waits"),
        ("to be freed", f"{size(about.bytes_freed_by_work)} when that is done" if about.pending_work else ""),
        ("left over", by_repair if about.bytes_freed_by_repair else ""),
        ("new volumes", f"wipe {about.default_wipe}, blocks of {size(about.default_block_size)}"),
        ("reserve", size(about.reserve_bytes)),
        ("read-only", "yes" if about.read_only else ""),
    ]
    output.show(as_json, asdict(about) if as_json else None, lambda: output.fields(pairs))


@click.command()
@click.argument("name", type=SNAPSHOT, metavar="STORE/VOLUME@SNAPSHOT")
@click.argument("new_name", type=NEW_VOLUME, metavar="STORE/NEW")
@click.option("--wipe", type=WIPE, help="What happens to freed blocks; by default as where it comes from.")
@trust_option
@json_option
def clone(name: Name, new_name: Name, wipe: Literal["release", "zero"] | None, as_json: bool) -> None:
    """Make a new volume that starts as a snapshot.

    Nothing is copied. The clone begins with no snapshots of its own.
    """
    if new_name.store.resolve() != name.store.resolve():
        raise click.UsageError(
            f"a clone lives in the store of its snapshot: write {name.store}/{new_name.volume}, "
            "or copy with delta and apply"
        )
    with name.open_store() as store:
        store.clone(name.volume, name.required_snapshot, new_name.volume, wipe=wipe)
        about = store.info(new_name.volume)
    output.tell(as_json, volume_value(about), lambda: f"made {new_name}: a clone of {name}")


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@trust_option
@json_option
def flatten(name: Name, as_json: bool) -> None:
    """Make a volume independent of its base and of other volumes.

    All data that it reads and does not own is copied.
    """
    with name.open_store() as store:
        with store.open(name.volume) as volume, output.progress(f"flatten {name}", as_json) as progress:
            volume.flatten(progress=progress)
        about = store.info(name.volume)
    output.tell(as_json, volume_value(about), lambda: f"flattened {name}: it stands alone now")


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@click.argument("size", type=SIZE)
@click.option("--force", is_flag=True, help="Shrink, which drops what lies beyond the new end.")
@yes_option
@dry_run_option
@trust_option
@json_option
def resize(name: Name, size: int, force: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Change the size of a disk.

    Snapshots keep their sizes, and revert brings the old size back. A disk that is being served does not shrink.
    """
    with name.open_store() as store:
        with live(store, name.volume) or store.open(name.volume) as volume:
            shrinks = size < volume.size_bytes
            if dry_run or (shrinks and force):
                loss = _lost_by_shrinking(store, name, volume, size, force=force)
                if dry_run:
                    losses.tell_dry_run(as_json, "resize", [loss])
                    return
                losses.agree("resize", [loss], yes=yes)
            volume.resize(size, force=force)
        about = store.info(name.volume)
    output.tell(as_json, volume_value(about), lambda: f"{name} has {output.size(about.size_bytes)} now")


def _lost_by_shrinking(store: "Store", name: Name, volume: "Volume | LiveVolume", size: int, *, force: bool) -> "Loss":
    """Say what a resize drops, or refuse it as it would be refused itself."""
    from onionskin.operations.losses import Loss, of_shrinking

    if size >= volume.size_bytes:
        return Loss((), (), 0, False)
    if not isinstance(volume, onionskin.Volume):
        raise StateError(
            f"volume {name.volume!r} is being served and its clients may write up to its end; stop the server to shrink it"
        )
    if not force:
        raise StateError(f"resize would cut {name.volume!r} and lose what lies behind; pass force if that is meant")
    volume.flush()
    return of_shrinking(store._opened, name.volume, size)


@click.command()
@click.argument("name", type=VOLUME_OR_SNAPSHOT, metavar="STORE/VOLUME[@SNAPSHOT]")
@click.argument("new_name", metavar="NEW")
@trust_option
@json_option
def rename(name: Name, new_name: str, as_json: bool) -> None:
    """Give a volume or a snapshot another name in its store.

    NEW is the name alone, or STORE/NEW; of a snapshot it is the name alone, or STORE/VOLUME@NEW. If the volume is being
    served, connected clients go on, and later clients ask for the new name. Clones and holds of a snapshot stay.
    """
    if name.snapshot is not None:
        _rename_snapshot(name, new_name, as_json=as_json)
        return
    new = NEW_VOLUME.convert(new_name, None, None) if "/" in new_name else Name(name.store, new_name)
    if new.store.resolve() != name.store.resolve():
        raise click.UsageError("a volume cannot move to another store; copy it with delta and apply")
    with name.open_store() as store:
        if served := live(store, name.volume):
            with served:
                served.rename(new.volume)
        else:
            store.rename(name.volume, new.volume)
        about = store.info(new.volume)
    output.tell(as_json, volume_value(about), lambda: f"{name} is {new} now")


def _rename_snapshot(name: Name, new_name: str, *, as_json: bool) -> None:
    new = Name(name.store, name.volume, new_name.removeprefix("@"))
    if "/" in new_name:
        new = NEW_SNAPSHOT.convert(new_name, None, None)
    if new.store.resolve() != name.store.resolve() or new.volume != name.volume:
        raise click.UsageError(
            f"a snapshot stays with its volume: write {name.store}/{name.volume}@NEW, or make a volume of it with clone"
        )
    with name.open_store() as store:  # of a served volume too: its server looks names up whenever one is asked for
        store.rename_snapshot(name.volume, name.required_snapshot, new.required_snapshot)
        value = snapshot_value(find_snapshot(store.snapshots(name.volume), new))
    output.tell(as_json, value, lambda: f"{name} is {new} now")


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@click.option("--base", type=FILE, required=True, help="Where the base image is now.")
@click.option(
    "--trust",
    is_flag=True,
    callback=note_trust,
    help="Take your word that it holds the same bytes, and open a store that another user owns.",
)
@click.option("--verify", is_flag=True, help="Compare it with the digest that create --digest took.")
@json_option
def relocate(name: Name, base: Path, trust: bool, verify: bool, as_json: bool) -> None:
    """Say where a base is that was moved or touched."""
    with name.open_store() as store:
        store.relocate(name.volume, base=base, trust=trust, verify=verify)
        about = store.info(name.volume)
    output.tell(as_json, volume_value(about), lambda: f"{name} is over {about.base} now")


@click.command()
@click.argument("names", type=VOLUME, nargs=-1, required=True, metavar="STORE/VOLUME|'STORE/PATTERN'...")
@click.option("--recursive", is_flag=True, help="Delete their snapshots too.")
@yes_option
@dry_run_option
@trust_option
@json_option
def delete(names: tuple[Name, ...], recursive: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Delete volumes, with --recursive their snapshots too.

    The command refuses this while a clone needs one of them that is not deleted with it. All are of one store, and are
    deleted together, or none of them. A name with wildcards as a shell has them stands for all
    that match it, unless a volume has that very name.
    """
    from onionskin.operations import losses as of_store
    from onionskin.operations import volumes as of_names

    for name in names[1:]:
        same_store(names[0], name)
    with names[0].open_store() as store:
        called = matching(store, names)
        ids = of_names.ids_of(store._opened.catalog, called)
        loss = of_store.of_delete(store._opened, called, recursive=recursive)
        if dry_run:
            losses.tell_dry_run(as_json, "delete", [loss])
            return
        losses.agree("delete", [loss], yes=yes)
        on_disk = store._delete(called, recursive=recursive, agreed=ids)
    gone, freed = sorted(called), losses.freed([loss])  # as --dry-run says it: without what the files need themselves
    if freed is None:
        freed = on_disk
    back = f"; {format_size(freed)} come back" if freed else ""
    output.tell(as_json, {"deleted": gone, "bytes_freed": freed}, lambda: f"deleted {', '.join(gone)}{back}")
