"""Draws the two pictures of the front page, docs/before-after.svg and docs/factors.svg.

The trees are those of a store in which the example of README.md is done, before its revert and after it. The chart shows
the table of README.md under "How fast", whose figures `onionskin bench` measured. What must hold: the same example and
table give the same bytes, so that a test can compare; and both pictures are as wide as a telephone shows, so that
letters are not scaled down there and two of them stand side by side elsewhere.

    python tools/draw_front_page.py [directory, by default docs]
"""

import math
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onionskin
from onionskin.base.sizes import format_size
from onionskin.pictures import svg
from onionskin.pictures.trees import lay_out

ROOT = Path(__file__).resolve().parents[1]
WIDTH, ROW, LANE, RADIUS, MARGIN = 350, 22, 18, 5, 12
PANEL = 7 * ROW
BARS_LEFT, BARS_RIGHT = 186, 292
STYLE = (
    ".skin .edge{stroke:var(--soft);stroke-width:1.6;fill:none}.skin .base{fill:var(--base)}"
    ".skin .snapshot{fill:#2e8ca8}.skin .head{fill:#d6394b}.skin .bar{fill:var(--base)}"
)


def main() -> None:
    """Write both pictures."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs"
    with tempfile.TemporaryDirectory() as scratch:
        (directory / "before-after.svg").write_text(draw_trees(*trees_of_the_example(Path(scratch))))
    (directory / "factors.svg").write_text(draw_factors((ROOT / "README.md").read_text()))


def trees_of_the_example(directory: Path) -> tuple[list[onionskin.TreeNode], list[onionskin.TreeNode]]:
    """Do what the example does, and return the trees before and after its revert."""
    base = directory / "debian.raw"
    base.write_bytes(bytes(16 << 20))
    with onionskin.Store(directory / "lab") as store, store.create("web", base=base) as web:
        web.snapshot("clean")
        web.write(0, b"broken!!" * (1 << 20))
        web.snapshot("broken")
        before = store.tree()
        web.revert("clean")
        return before, store.tree()


def draw_trees(before: Sequence[onionskin.TreeNode], after: Sequence[onionskin.TreeNode]) -> str:
    """Draw two trees, the later one below the earlier one."""
    body = [*_panel(0, "before the revert", before), *_panel(PANEL, "after it", after)]
    return _document(2 * MARGIN + PANEL + 5 * ROW, "The snapshots of a disk before and after a revert", body)


def _panel(top: int, title: str, roots: Sequence[onionskin.TreeNode]) -> list[str]:
    places = lay_out(roots)
    at = [(MARGIN + RADIUS + LANE * place.lane, top + MARGIN + ROW * (row + 1.5)) for row, place in enumerate(places)]
    edges, nodes = [], []
    for place, (x, y) in zip(places, at, strict=True):
        if place.parent is not None:
            over, above = at[place.parent]
            way = f"V{y:g}" if over == x else f"V{y - ROW / 2:g}q0 {ROW / 2:g} {ROW / 2:g} {ROW / 2:g}H{x:g}"
            edges.append(f'<path class="edge" d="M{over:g} {above:g}{way}"/>')
        if place.node.kind == "base":
            side = 2 * RADIUS
            nodes.append(f'<rect class="base" x="{x - RADIUS}" y="{y - RADIUS:g}" width="{side}" height="{side}"/>')
        else:
            nodes.append(f'<circle class="{place.node.kind}" cx="{x}" cy="{y:g}" r="{RADIUS}"/>')
            # A head that is open may hold a header already, and not always does.
            held = "for the next writes" if place.node.kind == "head" else f"holds {format_size(place.node.bytes_held)}"
            nodes.append(svg.text(BARS_LEFT, y + 4, held, "soft"))
        kind = " (head)" if place.node.kind == "head" else ""
        nodes.append(svg.text(MARGIN + 2 * LANE + 8, y + 4, f"{Path(place.node.name).name}{kind}"))
    return [svg.text(MARGIN, top + MARGIN + 10, title, "title"), *edges, *nodes]


def draw_factors(readme: str) -> str:
    """Draw how many times as long as onionskin the other ways take, on a logarithmic axis."""
    groups = factors(readme)
    decades = math.ceil(math.log10(max(factor for _, ways in groups for _, factor in ways)))
    body = [svg.text(MARGIN, MARGIN + 8, "times as long as onionskin takes (logarithmic)", "soft")]
    y = float(MARGIN + 12)
    for title, ways in groups:
        y += ROW
        body.append(svg.text(MARGIN, y, title, "title"))
        for way, factor in ways:
            y += ROW - 4
            width = math.log10(factor) / decades * (BARS_RIGHT - BARS_LEFT)
            body += [
                svg.text(MARGIN, y, way, "soft"),
                f'<rect class="bar" x="{BARS_LEFT}" y="{y - 9:g}" width="{width:.1f}" height="9"/>',
                svg.text(WIDTH - MARGIN, y, f"{factor:g} x", "end"),
            ]
    return _document(y + MARGIN, "How many times as long as onionskin other ways take", body)


def factors(readme: str) -> list[tuple[str, list[tuple[str, float]]]]:
    """Read the table: for each thing that was done, the other ways and their factors; in few words, as room is scarce."""
    groups: list[tuple[str, list[tuple[str, float]]]] = []
    table = readme.partition("## How fast")[2].partition("\n## ")[0]
    row = r"^\| ([^|]*) \| ([^|]+) \| [^|]+ \| ([\d.]+)(?: x)?(?: \([^|]+\))? \|$"  # a range stands behind the median
    for what, way, factor in re.findall(row, table, re.MULTILINE):
        if what.strip():
            groups.append((_short(what.strip()), []))
        if way != "onionskin":
            groups[-1][1].append((re.sub(r" ?\(.*|, depth.*", "", way), float(factor)))
    return groups


def _short(title: str) -> str:
    title = re.sub(r"^\d+ random 4 KiB ", "random 4 KiB ", title)
    return re.sub(r" at depth.*|, flushed$|, 64 KiB dirty$| of 256 MiB.*| of 128 MiB in.*?(?= into)", "", title)


def _document(height: float, title: str, body: Sequence[str]) -> str:
    """Return the document with a size of its own: without one, a browser makes a picture as wide as there is room."""
    return svg.document(WIDTH, height, title, STYLE, body).replace(
        'class="skin"', f'class="skin" width="{WIDTH}" height="{height:g}"', 1
    )


if __name__ == "__main__":
    main()
