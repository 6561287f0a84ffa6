"""Pictures: what a cell shows, against a plain count of bytes; files that others read; layouts of large and odd trees."""

import io
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from datetime import UTC, datetime
from itertools import accumulate

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

from onionskin.base.states import DATA, HOLE, ZERO
from onionskin.kernels._extents import Extents
from onionskin.operations.layering import ChainMember, LayerTable
from onionskin.operations.lineage import Ancestor
from onionskin.operations.listing import TreeNode
from onionskin.pictures import png, svg
from onionskin.pictures.bands import BANDS_MAX, Legend, legend_of
from onionskin.pictures.cells import Cells, cut
from onionskin.pictures.maps import GREY, describe, map_png, map_svg
from onionskin.pictures.terminal import in_letters
from onionskin.pictures.trees import lay_out, tree_svg

SVG = "{http://www.w3.org/2000/svg}"
MIB = 1 << 20
HOSTILE = "</text><script>alert(1)</script>&\"'\x1b[31m\ud800\u202e"


def layering_of(parts: list[tuple[int, int, int]], layers: int, *, base: bool = True) -> LayerTable:
    """Lay (length, state, depth) one behind the other."""
    ends = list(accumulate(length for length, _, _ in parts))
    extents = Extents.of((end - length, length, *rest, 0) for (length, *rest), end in zip(parts, ends, strict=True))
    chain = [ChainMember("head", "web", None)]
    chain += [ChainMember("snapshot", f"web@s{number}", None) for number in range(layers - 1, 0, -1)]
    return LayerTable((*chain, *([ChainMember("base", "/b.raw", None)] if base else [])), extents)


PARTS = st.lists(
    st.tuples(st.integers(1, 5000), st.sampled_from([HOLE, DATA, ZERO]), st.integers(0, 3)), min_size=1, max_size=30
)


def shown(layering: LayerTable, first: int, last: int) -> tuple[int, int, float]:
    """Count byte by byte what a cell should show: state, depth and share."""
    counts: dict[tuple[int, int], int] = {}
    for offset, length, state, depth, _ in layering.extents:
        for _ in range(max(first, offset), min(last, offset + length)):
            counts[state, depth] = counts.get((state, depth), 0) + 1
    order = [DATA, ZERO, HOLE]
    best = min((state for state, _ in counts), key=order.index)
    depth = min((d for s, d in counts if s == best), key=lambda d: (-counts[best, d], d))
    return best, depth, counts[best, depth] / (last - first)


@settings(max_examples=examples(40), deadline=None)
@given(PARTS, st.integers(1, 9), st.integers(1, 4))
def test_a_cell_shows_what_has_most_of_its_data(parts: list[tuple[int, int, int]], columns: int, rows: int) -> None:
    layering = layering_of(parts, 3)
    cells = cut(layering, columns, rows)
    edges = cells.edges
    assert edges[0] == 0
    assert edges[-1] == sum(length for length, _, _ in parts)
    assert cells.count <= columns * rows
    for index in range(cells.count):
        state, depth, share = shown(layering, edges[index], edges[index + 1])
        assert (cells.state[index], cells.depth[index]) == (state, depth)
        assert cells.share[index] == share


def test_cells_are_as_equal_as_can_be_on_the_largest_disk() -> None:
    cells = cut(layering_of([((1 << 46) - 1, HOLE, 1)], 1, base=False), 1000, 1000)
    lengths = np.diff(cells.edges)
    assert cells.count == 1_000_000
    assert lengths.max() - lengths.min() <= 1


def test_a_lonely_block_on_a_vast_disk_is_seen_and_pale() -> None:
    layering = layering_of([(1 << 40, HOLE, 1), (4096, DATA, 0), (1 << 39, HOLE, 1)], 1, base=False)
    assert "......a..." in in_letters("web", cut(layering, 10, 1), legend_of(layering))


def picture(layering: LayerTable, columns: int = 8, rows: int = 2) -> tuple[Cells, str]:
    cells = cut(layering, columns, rows)
    return cells, map_svg("vms/web", cells, legend_of(layering))


def test_the_legend_says_how_much_is_read_from_each_layer_and_adds_up() -> None:
    layering = layering_of([(MIB, DATA, 0), (2 * MIB, DATA, 1), (3 * MIB, ZERO, 0), (MIB, DATA, 2), (MIB, HOLE, 2)], 2)
    legend = legend_of(layering)
    assert [(band.kind, band.bytes_shown) for band in legend.all] == [
        *(("head", MIB), ("snapshot", 2 * MIB), ("base", MIB)),
        *(("zero", 3 * MIB), ("hole", MIB)),
    ]
    assert "web@s1: 2 MiB" in describe(cut(layering, 4, 2), legend)


def test_many_layers_share_bands_and_none_is_lost() -> None:
    layers = 1000
    legend = legend_of(layering_of([(4096, DATA, depth) for depth in range(layers)], layers, base=False))
    assert len(legend.layers) == BANDS_MAX
    assert legend.layers[0].kind == "head"
    assert legend.layers[1].name.startswith("web@s999 to web@s")
    assert sum(band.bytes_shown for band in legend.all) == 4096 * layers
    edges = [(band.first, band.last) for band in legend.layers]
    assert [first for first, _ in edges[1:]] == [last + 1 for _, last in edges[:-1]]


def test_letters_say_the_layer_and_whether_it_is_most_of_the_cell() -> None:
    parts = [(2 * MIB, DATA, 0), (MIB // 4, DATA, 1), (3 * MIB // 4, HOLE, 2), (MIB, ZERO, 0), (MIB, DATA, 2)]
    layering = layering_of([*parts, (MIB // 4, DATA, 2), (11 * MIB // 4, HOLE, 2)], 2)
    text = in_letters("web", cut(layering, 8, 1), legend_of(layering))
    assert text.splitlines()[1] == "0 B  AAb0=-.."
    assert "\x1b" not in text


def test_the_map_is_an_svg_document_that_covers_every_cell_once() -> None:
    layering = layering_of([(MIB, DATA, 0), (MIB, DATA, 1), (2 * MIB, ZERO, 0), (MIB, DATA, 2), (3 * MIB, HOLE, 2)], 2)
    cells, drawn = picture(layering)
    root = ElementTree.fromstring(drawn)
    assert root.tag == f"{SVG}svg"
    (group,) = (one for one in root.iter(f"{SVG}g") if one.get("class") == "cells")
    covered = [0] * (cells.columns * cells.rows)
    for path in group:
        if path.get("class") == "grid":
            continue
        for part in (path.get("d") or "").split("z")[:-1]:
            place, run = part.split("h")[:2]
            x, y = map(int, place.removeprefix("M").split())
            for cell in range(int(run.removesuffix("v1"))):
                covered[y * cells.columns + x + cell] += 1
    assert covered == [1] * cells.count
    assert "prefers-color-scheme:dark" in drawn


def test_pictures_hold_no_name_as_markup() -> None:
    chain = (ChainMember("head", HOSTILE, None), ChainMember("base", HOSTILE, None))
    layering = LayerTable(chain, layering_of([(MIB, DATA, 0), (MIB, DATA, 1)], 1).extents)
    cells, legend = cut(layering, 4, 1), legend_of(layering)
    root = TreeNode("base", HOSTILE, MIB, None, children=[TreeNode("head", HOSTILE, MIB, None, note=HOSTILE)])
    for drawn in (map_svg(HOSTILE, cells, legend), tree_svg(HOSTILE, [root])):
        parsed = ElementTree.fromstring(drawn.encode())
        assert not list(parsed.iter(f"{SVG}script"))
        assert "\u202e" not in drawn
        assert "\x1b" not in drawn
    decode_png(map_png(HOSTILE, cells, legend))
    assert "\x1b" not in in_letters(svg.shown(HOSTILE), cells, legend)


def decode_png(data: bytes) -> tuple[np.ndarray, dict[bytes, bytes]]:
    """Read a PNG of palette numbers as its standard says; give the pixels and the other chunks."""
    stream = io.BytesIO(data)
    assert stream.read(8) == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    while head := stream.read(8):
        length, kind = struct.unpack(">I4s", head)
        body = stream.read(length)
        assert struct.unpack(">I", stream.read(4))[0] == zlib.crc32(kind + body)
        chunks[kind] = chunks.get(kind, b"") + body
    assert next(iter(chunks)) == b"IHDR"
    assert list(chunks)[-1] == b"IEND"
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour, rest) == (8, 3, [0, 0, 0])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:], chunks


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 256))
def test_png_pixels_come_back_as_they_were(width: int, height: int, colours: int) -> None:
    pixels = (np.arange(width * height) * 7 % colours).astype(np.uint8).reshape(height, width)
    palette = [(i, 255 - i, i // 2, 255 - i // 3) for i in range(colours)]
    decoded, chunks = decode_png(png.encode([row.tobytes() for row in pixels], palette, {"Title": "vms/web"}))
    assert (decoded == pixels).all()
    assert chunks[b"PLTE"] == b"".join(bytes(colour[:3]) for colour in palette)
    assert chunks[b"tRNS"] == bytes(colour[3] for colour in palette)
    assert chunks[b"iTXt"] == b"Title\0\0\0\0\0vms/web"


def test_the_png_map_gives_each_layer_its_colour_and_the_end_none() -> None:
    layering = layering_of([(MIB, DATA, 0), (MIB, DATA, 1), (MIB, DATA, 2), (MIB, ZERO, 0), (MIB, HOLE, 2)], 2)
    cells = Cells(3, *(getattr(cut(layering, 5, 1), name) for name in ("edges", "state", "depth", "share")))
    pixels, chunks = decode_png(map_png("vms/web", cells, legend_of(layering)))
    side = pixels.shape[0] // 2
    assert pixels.shape == (2 * side, 3 * side)
    opacity = chunks[b"tRNS"]
    colours = [chunks[b"PLTE"][3 * n : 3 * n + 3] for n in range(len(opacity))]
    cell = [pixels[side * (i // 3) + 1, side * (i % 3) + 1] for i in range(6)]
    assert [colours[n] for n in cell[:3]] == [bytes(svg.ramp(0, 2)), bytes(svg.ramp(1, 2)), bytes((128, 137, 148))]
    assert [opacity[n] for n in cell[:3]] == [255] * 3
    stripes = pixels[side : 2 * side, :side]
    assert sorted({opacity[n] for n in stripes.flat}) == [0, 255]
    assert 0 < opacity[cell[4]] < 255
    assert opacity[cell[5]] == 0


PICTURE_PARTS = st.lists(
    st.tuples(
        st.one_of(st.integers(1, 5000), st.integers(1, 1 << 30)),
        st.sampled_from([HOLE, DATA, ZERO]),
        st.integers(0, 15),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=examples(40), deadline=None)
@given(PICTURE_PARTS, st.integers(1, 40), st.integers(1, 6), st.sampled_from([1, 3, 15]), st.booleans())
def test_each_pixel_of_the_png_map_is_of_the_band_and_the_shade_of_its_cell(
    parts: list[tuple[int, int, int]], columns: int, rows: int, layers: int, base: bool
) -> None:
    # Depth `layers` is the base, or below all layers if there is none, where no data is.
    parts = [
        (length, state if base else min(state, depth < layers), min(depth, layers)) for length, state, depth in parts
    ]
    layering = layering_of(parts, layers, base=base)
    cells, legend = cut(layering, columns, rows), legend_of(layering)
    pixels, chunks = decode_png(map_png("vms/web", cells, legend))
    side = pixels.shape[1] // cells.columns
    assert pixels.shape == (side * cells.rows, side * cells.columns)
    shown = [
        (*chunks[b"PLTE"][3 * number : 3 * number + 3], chunks[b"tRNS"][number])
        for number in range(len(chunks[b"tRNS"]))
    ]
    for y, x in np.ndindex(pixels.shape):
        cell = y // side * cells.columns + x // side
        assert shown[pixels[y, x]] == colour_of(cells, legend, cell, is_stripe=(x + y) % 4 == 0)


def colour_of(cells: Cells, legend: Legend, cell: int, *, is_stripe: bool) -> tuple[int, ...]:
    """Say which colour and opacity a pixel of a cell has."""
    if cell >= cells.count or (cells.state[cell] == ZERO and not is_stripe):
        return (0, 0, 0, 0)
    if cells.state[cell] != DATA:
        return (*GREY, 40 if cells.state[cell] == HOLE else 255)
    share, depth = cells.share[cell], cells.depth[cell]
    opacity = 255 if share >= 0.5 else 153 if share >= 1 / 16 else 76
    if legend.base and depth == legend.base.first:
        return (*GREY, opacity)
    (band,) = (number for number, band in enumerate(legend.layers) if band.first <= depth <= band.last)
    return (*svg.ramp(band, len(legend.layers)), opacity)


# ---- trees ----


def snapshot(name: str, *children: TreeNode) -> TreeNode:
    return TreeNode("snapshot", name, MIB, None, children=list(children))


def chain_of(count: int) -> TreeNode:
    root = at = snapshot("s0")
    for number in range(1, count):
        at.children.append(snapshot(f"s{number}"))
        at = at.children[0]
    return root


def check_layout(roots: list[TreeNode]) -> list[tuple[str, int]]:
    places = lay_out(roots)
    for row, place in enumerate(places):
        if place.parent is not None:
            assert place.parent < row
            assert any(child is place.node for child in places[place.parent].node.children)
            # The way from the parent, down its lane, passes no other node.
            lane = places[place.parent].lane
            assert all(between.lane > lane for between in places[place.parent + 1 : row])
    ElementTree.fromstring(tree_svg("vms", roots))
    return [(place.node.name, place.lane) for place in places]


def test_a_chain_of_thousands_is_one_lane() -> None:
    assert {lane for _, lane in check_layout([chain_of(5000)])} == {0}


def test_a_thousand_clones_take_two_lanes() -> None:
    clones = [snapshot(f"c{number}") for number in range(1000)]
    assert {lane for _, lane in check_layout([snapshot("s", *clones)])} == {0, 1}


def test_branches_stand_above_the_longest_which_goes_straight_on() -> None:
    root = snapshot("a", snapshot("b"), snapshot("c", snapshot("d", snapshot("e"))), snapshot("f", snapshot("g")))
    assert check_layout([root]) == [("a", 0), ("b", 1), ("f", 1), ("g", 1), ("c", 0), ("d", 0), ("e", 0)]


@given(st.lists(st.integers(0, 10**6), max_size=200))
def test_no_tree_takes_more_lanes_than_the_logarithm_of_its_nodes(parents: list[int]) -> None:
    nodes = [snapshot("root")]
    for number, parent in enumerate(parents):
        nodes.append(snapshot(f"n{number}"))
        nodes[parent % (len(nodes) - 1)].children.append(nodes[-1])
    lanes = {lane for _, lane in check_layout([nodes[0]])}
    assert max(lanes) + 1 <= len(nodes).bit_length()


def head(name: str, *origins: Ancestor) -> TreeNode:
    return TreeNode("head", name, MIB, None, origins=origins)


def test_a_head_says_what_it_came_from_unless_it_stands_on_it() -> None:
    taken, gone = datetime(2026, 1, 2, tzinfo=UTC), datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    origin = Ancestor("web", "clean", taken, None)
    assert "from" not in tree_svg("vms", [snapshot("web@clean", head("job", origin))])
    assert ">from web@clean<" in tree_svg("vms", [snapshot("web@later", head("job", origin))])
    drawn = tree_svg("vms", [snapshot("web@clean", head("job", Ancestor("try", None, taken, gone), origin))])
    assert ">from try<" in drawn and "from try (dropped 2026-01-02 03:04 UTC), from web@clean" in drawn


def test_what_a_head_came_from_is_no_markup() -> None:
    origin = Ancestor(HOSTILE, HOSTILE, datetime(2026, 1, 2, tzinfo=UTC), None)
    assert "<script" not in tree_svg("vms", [head("job", origin)])
    check_layout([head("job", origin)])


def test_an_empty_store_says_so() -> None:
    assert "no volumes" in tree_svg("vms", [])


def test_what_knows_no_variables_finds_a_plain_colour_before_each() -> None:
    style = svg.with_plain_colours(".a{fill:var(--ink)}.b{stroke:var(--soft);fill:none}", "--ink:#111;--soft:#222")
    assert style == ".a{fill:#111;fill:var(--ink)}.b{stroke:#222;stroke:var(--soft);fill:none}"
    drawn = svg.document(10, 10, "title", ".skin .edge{stroke:var(--soft)}", [])
    for use in re.finditer(r"([a-z-]+):var\((--[a-z]+)\)", drawn):
        assert re.search(rf"{use[1]}:#[0-9a-f]{{6}};$", drawn[: use.start()]), drawn
