"""Draws the tree of a store as SVG: a row for each node, a lane for each branch, and a bar for the data that it holds.

The child with the largest subtree goes on in its parent's lane. The others branch off to the right, each above it. So a
long chain is one lane, a thousand clones are one lane, and no tree of n nodes has more than log2(n) + 1 lanes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onionskin.base.sizes import format_size
from onionskin.pictures import svg

if TYPE_CHECKING:
    from onionskin.operations.lineage import Ancestor
    from onionskin.operations.listing import TreeNode

WIDTH, TOP, ROW, LANE, RADIUS = 760, 14, 24, 18, 5
BAR, BAR_LEFT = 84, 552
TIME_LEFT = 396
CHARACTER = 6.6  # of the font, on average
_STYLE = (
    ".skin .edge{stroke:var(--soft);stroke-width:1.6;fill:none}.skin .base{fill:var(--base)}"
    ".skin .head{fill:#d6394b}.skin .snapshot{fill:#2e8ca8}.skin .layer{fill:var(--paper);stroke:var(--soft)}"
    ".skin .bar{fill:#2e8ca8;opacity:.75}.skin .rest{fill:var(--line)}"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node is drawn; `parent` is the index of the place of its parent, None for a root."""

    node: "TreeNode"
    lane: int
    parent: int | None


def tree_svg(name: str, roots: "Sequence[TreeNode]") -> str:
    """Return the tree as an SVG document that can be read on light and on dark."""
    places = lay_out(roots)
    lanes = 1 + max((place.lane for place in places), default=0)
    most = max((place.node.bytes_held for place in places), default=0)
    left = 12 + lanes * LANE
    body = [_edge(places, index) for index, place in enumerate(places) if place.parent is not None]
    for row, place in enumerate(places):
        beneath = None if place.parent is None else places[place.parent].node.name
        body += [_dot(place, row), *_about(place.node, left, _y(row), most, origins_to_show(place.node, beneath))]
    if not places:
        body = [svg.text(12, _y(0) + 4, "no volumes", "soft")]
    height = TOP + max(len(places), 1) * ROW + 6
    return svg.document(WIDTH, height, f"Bases, snapshots and heads of {name}", _STYLE, body)


def origins_to_show(node: "TreeNode", beneath: str | None) -> "Sequence[Ancestor]":
    """Return what is said of where a head comes from: nothing where it stands on the snapshot that it began as.

    `beneath` is the name of the node below it.
    """
    if len(node.origins) == 1 and not node.origins[0].dropped and source(node.origins[0]) == beneath:
        return ()
    return node.origins


def source(origin: "Ancestor") -> str:
    """Return the volume, or the snapshot, that something was forked from."""
    return origin.name if origin.snapshot is None else f"{origin.name}@{origin.snapshot}"


def lay_out(roots: "Sequence[TreeNode]") -> list[Place]:
    """Give each node a row (its index) and a lane, parents before children; no recursion, as chains can be deep."""
    below = _counts(roots)
    places: list[Place] = []
    pending: list[tuple[TreeNode, int, int | None]] = [(root, 0, None) for root in reversed(roots)]
    while pending:
        node, lane, parent = pending.pop()
        here = len(places)
        places.append(Place(node, lane, parent))
        if not node.children:
            continue
        heaviest = max(node.children, key=lambda child: below[id(child)])
        pending.append((heaviest, lane, here))
        pending += [(child, lane + 1, here) for child in reversed(node.children) if child is not heaviest]
    return places


def _counts(roots: "Sequence[TreeNode]") -> dict[int, int]:
    """Count the nodes of each subtree, by the id of its top."""
    order = list(roots)
    for node in order:
        order += node.children  # grows while it is walked: parents before children
    counts: dict[int, int] = {}
    for node in reversed(order):
        counts[id(node)] = 1 + sum(counts[id(child)] for child in node.children)
    return counts


def _x(lane: int) -> float:
    return 14 + lane * LANE


def _y(row: int) -> float:
    return TOP + row * ROW + ROW / 2


def _edge(places: Sequence[Place], index: int) -> str:
    """Draw the way from a parent: straight down its lane, or out of it at the child's row."""
    child = places[index]
    assert child.parent is not None
    x, y = _x(places[child.parent].lane), _y(child.parent)
    way = f"M{x:g} {y:g}V{_y(index):g}"
    if child.lane > places[child.parent].lane:
        bend = ROW / 2
        way = f"M{x:g} {y:g}V{_y(index) - bend:g}q0 {bend:g} {bend:g} {bend:g}H{_x(child.lane):g}"
    return f'<path class="edge" d="{way}"/>'


def _dot(place: Place, row: int) -> str:
    x, y = _x(place.lane), _y(row)
    if place.node.kind == "base":
        return f'<rect class="base" x="{x - RADIUS:g}" y="{y - RADIUS:g}" width="{2 * RADIUS}" height="{2 * RADIUS}"/>'
    return f'<circle class="{place.node.kind}" cx="{x:g}" cy="{y:g}" r="{RADIUS}"/>'


def _about(node: "TreeNode", left: float, y: float, most: int, origins: "Sequence[Ancestor]") -> list[str]:
    """Describe a node: its kind, its time or what it comes from, and the size of its data."""
    kind = {"head": " (head)", "layer": " (no name)", "base": " (base)"}.get(node.kind, "")
    room = int((TIME_LEFT - left) / CHARACTER) - len(kind)
    name = svg.text(left, y + 4, svg.shortened(node.name, max(room, 12)) + kind, "title")
    full = f"{node.name}{kind}, {format_size(node.size_bytes)}{f': {node.note}' if node.note else ''}"
    full += "".join(f", from {source(one)}{_dropped(one)}" for one in origins)
    parts = [f"<g><title>{svg.clean(full)}</title>{name}</g>"]
    if node.kind == "base":
        return [*parts, svg.text(WIDTH - 4, y + 4, format_size(node.size_bytes), "soft end")]
    if node.kind == "snapshot" and node.created is not None:
        parts.append(svg.text(TIME_LEFT, y + 4, node.created.strftime("%Y-%m-%d %H:%M UTC"), "soft"))
    if origins:
        room = int((BAR_LEFT - TIME_LEFT) / CHARACTER) - 6
        parts.append(svg.text(TIME_LEFT, y + 4, f"from {svg.shortened(source(origins[0]), room)}", "soft"))
    bar = node.bytes_held / most * BAR if most else 0
    for style, width in (("rest", BAR), ("bar", bar)):
        if width:
            parts.append(f'<rect class="{style}" x="{BAR_LEFT}" y="{y - 4:g}" width="{max(width, 1):.1f}" height="8"/>')
    return [*parts, svg.text(WIDTH - 4, y + 4, f"holds {format_size(node.bytes_held)}", "soft end")]


def _dropped(origin: "Ancestor") -> str:
    return f" (dropped {origin.dropped:%Y-%m-%d %H:%M UTC})" if origin.dropped else ""
