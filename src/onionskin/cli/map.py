"""The verb map, which shows where the data of a disk is."""

import sys
from typing import TYPE_CHECKING, Any

import click

from onionskin.base.paths import FilePath
from onionskin.base.states import HOLE
from onionskin.cli import output
from onionskin.cli.arguments import VOLUME_OR_SNAPSHOT, Name, live, trust_option
from onionskin.cli.output import json_option
from onionskin.cli.picture_file import PictureType, write_picture

if TYPE_CHECKING:
    from onionskin.operations.layering import LayerTable
    from onionskin.pictures.bands import Legend
    from onionskin.pictures.cells import Cells

# Cells of a picture in a file, and of text if no terminal gives a width.
FILE_COLUMNS, FILE_ROWS = 96, 24
TEXT_COLUMNS, TEXT_ROWS = 64, 16
TEXT_COLUMNS_MAX = 128
OFFSET_COLUMNS = 13  # beside the cells: the longest offset, blanks, and a column that stays free


@click.command(name="map")
@click.argument("name", type=VOLUME_OR_SNAPSHOT, metavar="STORE/VOLUME[@SNAPSHOT]")
@click.option("--output", "-o", "path", type=PictureType(".svg", ".png"), help="Write SVG or PNG; - is SVG to stdout.")
@click.option("--columns", type=click.IntRange(1, 1000), help="Cells in a row; by default what fits.")
@click.option("--rows", type=click.IntRange(1, 1000), help="Rows of cells.")
@trust_option
@json_option
def map_(name: Name, path: FilePath | None, columns: int | None, rows: int | None, as_json: bool) -> None:
    """Show which layer each part of a disk comes from.

    The disk is cut into cells, from its beginning at the upper left. A cell shows the layer, or the base, that has most
    of its data. If the volume is being served, its server flushes first. The command changes nothing.
    """
    from onionskin.pictures.bands import legend_of
    from onionskin.pictures.cells import cut

    if as_json and path is not None and str(path) == "-":
        raise click.UsageError("--json and --output - both want stdout: give --output a file")
    table = _layer_table(name)
    width, height = _resolution(path)
    cells, legend = cut(table, columns or width, rows or height), legend_of(table)
    if path is not None:
        write_picture(path, _picture(path, name, cells, legend))
        if str(path) == "-":
            return
    value = _value(name, table, cells) if as_json else None
    if path is None:
        output.show(as_json, value, lambda: _draw(name, cells, legend))
    else:
        output.tell(as_json, value, lambda: f"wrote {path}")


def _layer_table(name: Name) -> "LayerTable":
    from onionskin.operations.layering import layer_table

    with name.open_store() as store:
        if name.snapshot is None and (served := live(store, name.volume)) is not None:
            with served:
                served.flush()  # the map is read from files, which do not have the last changes yet
        elif name.snapshot is None:
            from onionskin.operations.unflushed import refuse_left_unflushed

            refuse_left_unflushed(store._opened, name.volume)
        return layer_table(store._opened, name.volume, name.snapshot)


def _resolution(path: FilePath | None) -> tuple[int, int]:
    if path is not None:
        return FILE_COLUMNS, FILE_ROWS
    if not sys.stdout.isatty():
        return TEXT_COLUMNS, TEXT_ROWS
    import shutil

    width = shutil.get_terminal_size().columns - OFFSET_COLUMNS
    return min(max(width, 16), TEXT_COLUMNS_MAX), TEXT_ROWS


def _picture(path: FilePath, name: Name, cells: "Cells", legend: "Legend") -> bytes:
    from onionskin.pictures.maps import map_png, map_svg

    title = str(name)
    return map_png(title, cells, legend) if path.suffix.lower() == ".png" else map_svg(title, cells, legend).encode()


def _draw(name: Name, cells: "Cells", legend: "Legend") -> str:
    """Draw on a terminal that has the colours and the characters; else write letters."""
    from onionskin.pictures import terminal

    title = output.cell(str(name))
    if sys.stdout.isatty() and output.printable(terminal.BLOCKS) == terminal.BLOCKS:
        from rich.console import Console

        console = Console()
        if console.color_system in ("256", "truecolor") and not console.no_color:
            return terminal.in_colour(title, cells, legend, console)
    return terminal.in_letters(title, cells, legend)


def _value(name: Name, table: "LayerTable", cells: "Cells") -> dict[str, Any]:
    """Return the JSON value of a map."""
    from onionskin.pictures.bands import bytes_of_states, data_bytes

    hole, zero = bytes_of_states(table)
    columns = (cells.edges, cells.edges[1:], cells.state, cells.depth, cells.share)
    return {
        "volume": name.volume,
        "snapshot": name.snapshot,
        "size_bytes": cells.size_bytes,
        "columns": cells.columns,
        "hole_bytes": hole,
        "zero_bytes": zero,
        "layers": [
            {
                "depth": depth,
                "kind": member.kind,
                "name": member.name,
                "created": output.timestamp(member.created),
                "bytes": data,
            }
            for depth, (member, data) in enumerate(zip(table.chain, data_bytes(table), strict=False))
        ],
        "cells": [
            {
                "offset": offset,
                "length": end - offset,
                "state": output.STATES[state],
                "depth": None if state == HOLE else depth,
                "share": round(share, 4),
            }
            for offset, end, state, depth, share in zip(*columns, strict=False)
        ],
    }
