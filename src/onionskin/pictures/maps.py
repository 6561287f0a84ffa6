"""Draws the map of a disk: as SVG with a legend, and as PNG, which carries its legend in the Description."""

from bisect import bisect_right
from itertools import groupby

from onionskin.base.sizes import format_size
from onionskin.base.states import DATA, HOLE
from onionskin.pictures import svg
from onionskin.pictures.bands import Band, Legend
from onionskin.pictures.cells import Cells

WIDTH, LEFT, TOP, ROW = 760, 76, 34, 19
GRID_WIDTH = WIDTH - LEFT - 4
CELL_HEIGHT_MAX = 12.0
NAME_CHARACTERS_MAX = 34
# A cell is drawn paler if the shown part is less than this.
SHARES = (0.5, 1 / 16)
OPACITIES = (1.0, 0.6, 0.3)
NOTE = "Cells show the layer that has most of their data; pale where that is less than half, paler less than a 16th."
PIXELS_OF_CELL_MAX, PIXELS_WIDE_MAX = 8, 1600
GREY = (128, 137, 148)
_HOLE_OPACITY = 40
_STYLE = (
    ".skin .base{fill:var(--base)}.skin .hole{fill:var(--line);opacity:.55}"
    ".skin .zero{fill:url(#zero)}.skin .cells .zero{fill:url(#zeros)}.skin .stripe{stroke:var(--base);stroke-width:1.4}"
    ".skin .grid{stroke:var(--paper);fill:none;stroke-width:.12}"
)
_STRIPES = (
    '<pattern id="{}" width="4" height="4" patternUnits="userSpaceOnUse" patternTransform="{}rotate(45)">'
    '<line class="stripe" y2="4"/></pattern>'
)


def looks(cells: Cells, legend: Legend) -> list[tuple[int, int]]:
    """Return for each cell its band, an index into `legend.all`, and how pale it is drawn, an index into OPACITIES."""
    kinds = _kinds_of_depths(legend, max(cells.depth))
    hole = len(legend.all) - 1
    zero = hole - 1
    return [
        (kinds[depth], (share < SHARES[0]) + (share < SHARES[1]))
        if state == DATA
        else (hole if state == HOLE else zero, 0)
        for state, depth, share in zip(cells.state, cells.depth, cells.share, strict=True)
    ]


def _kinds_of_depths(legend: Legend, depth_max: int) -> list[int]:
    """Return for each depth the band of its data."""
    first = [band.first for band in legend.layers]
    kinds = [bisect_right(first, depth) - 1 for depth in range(depth_max + 1)]
    if legend.base and legend.base.first <= depth_max:
        kinds[legend.base.first] = len(legend.layers)
    return kinds


def label(band: Band) -> str:
    """Describe a band."""
    suffix = {"head": " (head)", "layer": " (no name)", "base": " (base)"}.get(band.kind, "")
    return f"{svg.shortened(svg.shown(band.name), NAME_CHARACTERS_MAX)}{suffix}"


def map_svg(name: str, cells: Cells, legend: Legend) -> str:
    """Return the map as an SVG document that can be read on light and on dark."""
    width = GRID_WIDTH / cells.columns
    height = min(width, CELL_HEIGHT_MAX)
    bottom = TOP + height * cells.rows
    title = f"{name}: {format_size(cells.size_bytes)}"
    listed, end = _legend(legend, bottom + 24)
    style = "".join(
        f".skin .b{index}{{fill:{svg.hexadecimal(svg.ramp(index, len(legend.layers)))}}}"
        for index in range(len(legend.layers))
    )
    fade_style = "".join(f".f{index}{{opacity:{opacity}}}" for index, opacity in enumerate(OPACITIES) if index)
    # A pattern is drawn in the units of the shape that it fills: cells, in the map.
    stripes = _STRIPES.format("zero", "") + _STRIPES.format("zeros", f"scale({1 / width:.4f} {1 / height:.4f})")
    body = [
        f"<defs>{stripes}</defs>",
        svg.text(4, 18, title, "title"),
        svg.text(WIDTH - 4, 18, f"a cell is {format_size(cells.cell_bytes)}", "soft end"),
        *_offsets(cells, height),
        f'<g class="cells" transform="translate({LEFT} {TOP}) scale({width:.4f} {height:.4f})">',
        *_paths(cells, legend),
        f'<path class="grid" d="{_lines(cells)}"/></g>',
        *listed,
        svg.text(4, end + 12, NOTE, "soft"),
    ]
    return svg.document(WIDTH, end + 22, f"Where the data of {title} is", _STYLE + style + fade_style, body)


def _class_of(index: int, legend: Legend) -> str:
    band = legend.all[index]
    return f"b{index}" if index < len(legend.layers) else band.kind


def _paths(cells: Cells, legend: Legend) -> list[str]:
    """Draw the cells: one path for each colour, of the runs of cells in each row that have it."""
    looked = looks(cells, legend)
    parts: dict[tuple[int, int], list[str]] = {}
    for y in range(cells.rows):
        x = 0
        for look, run in groupby(looked[y * cells.columns : (y + 1) * cells.columns]):
            length = sum(1 for _ in run)
            parts.setdefault(look, []).append(f"M{x} {y}h{length}v1h-{length}z")
            x += length
    paths = []
    for index, fade in sorted(parts):
        faded = f" f{fade}" if fade else ""
        paths.append(f'<path class="{_class_of(index, legend)}{faded}" d="{"".join(parts[index, fade])}"/>')
    return paths


def _lines(cells: Cells) -> str:
    """Draw lines of the paper's colour between the cells, if the cells are large enough."""
    if cells.columns > GRID_WIDTH / 4:
        return ""
    across = "".join(f"M0 {y}h{cells.columns}" for y in range(1, cells.rows))
    return across + "".join(f"M{x} 0v{cells.rows}" for x in range(1, cells.columns))


def _offsets(cells: Cells, height: float) -> list[str]:
    """Write the offset beside some rows."""
    step = max(1, int(-(-16 // height)))
    rows = range(0, cells.rows, step)
    return [
        svg.text(LEFT - 8, TOP + height * row + 10, format_size(cells.edges[row * cells.columns]), "soft end")
        for row in rows
    ]


def _legend(legend: Legend, top: float) -> tuple[list[str], float]:
    """List the bands in two columns; return what to draw and where it ends."""
    bands = legend.all
    rows = -(-len(bands) // 2)
    parts = []
    for index, band in enumerate(bands):
        column, row = divmod(index, rows)
        x, y = 4 + column * (WIDTH / 2 + 8), top + row * ROW
        swatch = f'<rect class="{_class_of(index, legend)}" x="{x}" y="{y - 9:.1f}" width="14" height="11"/>'
        parts += [
            swatch,
            svg.text(x + 22, y, label(band)),
            svg.text(x + WIDTH / 2 - 16, y, format_size(band.bytes_shown), "soft end"),
        ]
    return parts, top + rows * ROW


def map_png(name: str, cells: Cells, legend: Legend) -> bytes:
    """Return the map as a PNG image, transparent behind the disk's end."""
    from onionskin.pictures import png  # with it struct and zlib, which no other picture needs

    bands = len(legend.layers)
    colours = [svg.ramp(index, bands) for index in range(bands)] + ([GREY] if legend.base else [])
    palette: list[png.Colour] = [(0, 0, 0, 0)]
    for colour in colours:
        palette += [(*colour, round(255 * opacity)) for opacity in OPACITIES]
    palette += [(*GREY, 255), (*GREY, _HOLE_OPACITY)]
    # The colours of data come in as many fades each; the last two, zero and hole, stand alone.
    zero = 1 + len(colours) * len(OPACITIES)
    numbers = bytes(
        1 + min(kind, len(colours)) * len(OPACITIES) + max(kind - len(colours), 0) + fade
        for kind, fade in looks(cells, legend)
    )
    scale = max(1, min(PIXELS_OF_CELL_MAX, PIXELS_WIDE_MAX // cells.columns))
    pixels = _pixels(numbers, cells.columns, scale, zero)
    return png.encode(pixels, palette, {"Title": svg.shown(name), "Description": describe(cells, legend)})


def _pixels(numbers: bytes, columns: int, scale: int, striped: int) -> list[bytes]:
    """Draw a row of pixels for each `scale`-th of a row of cells; of the number `striped`, one pixel in four stays."""
    only_others = bytes(0 if number == striped else number for number in range(256))
    rows: list[bytes] = []
    for first in range(0, len(numbers), columns):
        cells = numbers[first : first + columns].ljust(columns, b"\0")
        solid = bytearray(columns * scale)
        for x in range(scale):
            solid[x::scale] = cells
        shifted = []  # the stripes of a row, by the row's number modulo 4
        for y in range(4):
            row = solid.translate(only_others)
            row[-y % 4 :: 4] = solid[-y % 4 :: 4]
            shifted.append(bytes(row))
        rows += [shifted[y % 4] for y in range(len(rows), len(rows) + scale)]
    return rows


def describe(cells: Cells, legend: Legend) -> str:
    """Describe the picture's colours in words."""
    lines = [f"{label(band)}: {format_size(band.bytes_shown)}" for band in legend.all]
    return "\n".join([f"a cell is {format_size(cells.cell_bytes)}", *lines, NOTE])
