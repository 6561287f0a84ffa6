"""Draws the map of a disk as text: letters, which need nothing, or blocks on a terminal with 256 colours.

Both say the same. A capital letter, or a full block in colour, means that at least half of the cell is of the shown
kind.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from onionskin.base.sizes import format_size
from onionskin.pictures import svg
from onionskin.pictures.bands import Legend
from onionskin.pictures.cells import Cells
from onionskin.pictures.maps import GREY, label, looks

if TYPE_CHECKING:
    from rich.console import Console

BLOCKS = "█▒░"
BASE, ZERO_MARK, HOLE_MARK = "=--", "0", "."
ZERO_BLOCK, HOLE_BLOCK = "/", "·"
LETTERS_NOTE = "Cells show what has most of their data; small letters (and - for =) are less than half of it."
BLOCKS_NOTE = "Cells show what has most of their data: █ at least half of it, ▒ less, ░ less than a 16th."

Piece = tuple[str, str]  # text, and the style that rich gives it


def in_letters(title: str, cells: Cells, legend: Legend) -> str:
    """Return the map as plain lines."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in _lines(title, cells, legend, colour=False))


def in_colour(title: str, cells: Cells, legend: Legend, console: "Console") -> str:
    """Return the map as lines with the escape sequences of a terminal."""
    from rich.text import Text

    with console.capture() as captured:
        for line in _lines(title, cells, legend, colour=True):
            console.print(Text.assemble(*line), no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)
    return captured.get().removesuffix("\n")


def _lines(title: str, cells: Cells, legend: Legend, *, colour: bool) -> Iterator[list[Piece]]:
    marks = _marks(legend, colour=colour)
    yield [(title, "bold"), (f"  {format_size(cells.size_bytes)}, a cell is {format_size(cells.cell_bytes)}", "")]
    drawn = [marks[kind][fade] for kind, fade in looks(cells, legend)]
    offsets = [format_size(offset) for offset in cells.edges[: -1 : cells.columns]]
    width = max(map(len, offsets))
    for row, offset in enumerate(offsets):
        yield [(f"{offset:>{width}}  ", "dim"), *_joined(drawn[row * cells.columns : (row + 1) * cells.columns])]
    yield []
    names = [label(band) for band in legend.all]
    width = max(map(len, names))
    for band, name, mark in zip(legend.all, names, marks, strict=True):
        yield [mark[0], (f"  {name:<{width}}  {format_size(band.bytes_shown):>10}", "")]
    yield [(BLOCKS_NOTE if colour else LETTERS_NOTE, "dim")]


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    """Join neighbours of one style, so that a row costs few escape sequences."""
    text, style = "", ""
    for mark, its_style in pieces:
        if its_style != style:
            yield text, style
            text, style = "", its_style
        text += mark
    yield text, style


def _marks(legend: Legend, *, colour: bool) -> list[list[Piece]]:
    """Return the marks of each band's cells, by how pale they are."""
    marks: list[list[Piece]] = []
    for index in range(len(legend.layers)):
        letter = chr(ord("A") + index)
        style = svg.hexadecimal(svg.ramp(index, len(legend.layers)))
        marks.append([(mark, style) for mark in (BLOCKS if colour else letter + letter.lower() * 2)])
    grey = svg.hexadecimal(GREY)
    if legend.base:
        marks.append([(mark, grey) for mark in (BLOCKS if colour else BASE)])
    marks.append([(ZERO_BLOCK if colour else ZERO_MARK, grey)])
    marks.append([(HOLE_BLOCK if colour else HOLE_MARK, "dim")])
    return marks
