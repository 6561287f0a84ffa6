"""The verbs that show one thing in full: tree, info."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from onionskin.base.paths import FilePath
from onionskin.cli import output
from onionskin.cli.arguments import STORE, VOLUME_SNAPSHOT_OR_STORE, Name, open_store, trust_option
from onionskin.cli.chosen import find_snapshot
from onionskin.cli.output import json_option
from onionskin.cli.picture_file import PictureType, write_picture
from onionskin.cli.values import holder, labels_text, snapshot_value, space_of, space_value, volume_value

if TYPE_CHECKING:
    from onionskin.catalog.tree import Snapshot
    from onionskin.operations.chain_members import ChainLayer
    from onionskin.operations.lineage import Ancestor
    from onionskin.operations.listing import TreeNode, VolumeInfo
    from onionskin.operations.usage import SnapshotSpace


@click.command()
@click.argument("store", type=STORE)
@click.option("--output", "-o", "path", type=PictureType(".svg"), help="Write a picture as SVG; - is stdout.")
@trust_option
@json_option
def tree(store: FilePath, path: FilePath | None, as_json: bool) -> None:
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
    value = [_node_value(node) for node in nodes] if as_json else None
    if path is None:
        output.show(as_json, value, lambda: _draw(nodes))
    else:
        output.tell(as_json, value, lambda: f"wrote {path}")


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


@click.command()
@click.argument("name", type=VOLUME_SNAPSHOT_OR_STORE, metavar="STORE[/VOLUME[@SNAPSHOT]]")
@trust_option
@json_option
def info(name: Name | FilePath, as_json: bool) -> None:
    """Describe a store, a volume or a snapshot.

    Of a volume and a snapshot that includes the layers that it stands on, down to the base, and what each of them holds.
    """
    if isinstance(name, FilePath):
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
        ("held by", holder(about) or "nobody"),
        ("expires", "" if about.expires is None else output.when(about.expires)),
        ("labels", labels_text(about.labels)),
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


def _show_store(path: FilePath, as_json: bool) -> None:
    with open_store(path) as store:
        about = store.store_info()
    from dataclasses import asdict  # it comes with what describes a store

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
