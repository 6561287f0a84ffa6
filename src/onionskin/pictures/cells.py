"""A disk cut into cells of equal size, and the layer that each cell shows.

A cell shows the layer (or base) that holds the most data in it. Data goes before zeros, and zeros go before holes, so
that a few blocks on a vast disk are seen. The share says how much of the cell they are.
"""

from typing import TYPE_CHECKING, Any

import numpy

from onionskin.base.records import record
from onionskin.base.states import DATA, HOLE, ZERO
from onionskin.operations.layering import Layering

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]

CELL_BYTES_MIN = 512
_SUMS_MAX = 1 << 22  # sums of a cell and a layer that are in memory at a time


@record
class Cells:
    """The cells of a disk, in order, `columns` to a row; the last row may be shorter.

    Attributes
    ----------
    columns : int
    edges : numpy.ndarray
        n + 1 offsets: cell i is from edges[i] to edges[i + 1].
    state : numpy.ndarray
        n times HOLE, DATA or ZERO.
    depth : numpy.ndarray
        n depths in `Layering.chain`: of the layer that is shown.
    share : numpy.ndarray
        n numbers from 0 to 1: the part of the cell that has that state and depth.
    """

    columns: int
    edges: "Array"
    state: "Array"
    depth: "Array"
    share: "Array"

    @property
    def count(self) -> int:
        """How many cells there are."""
        return len(self.state)

    @property
    def rows(self) -> int:
        """How many rows they fill."""
        return -(-self.count // self.columns)

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return int(self.edges[-1])

    @property
    def cell_bytes(self) -> int:
        """Size of a cell; some are one byte larger where the disk does not divide evenly."""
        return self.size_bytes // self.count


def cut(layering: Layering, columns: int, rows: int) -> Cells:
    """Cut a disk into at most `columns` x `rows` cells."""
    extents = layering.extents
    edges = _edges(int(extents["offset"][-1] + extents["length"][-1]), columns * rows)
    starts = extents["offset"].astype(numpy.int64)
    cuts = numpy.concatenate((starts, edges))
    cuts.sort(kind="stable")
    left = cuts[:-1][cuts[1:] > cuts[:-1]]
    length = numpy.diff(left, append=edges[-1])
    piece = numpy.searchsorted(starts, left, side="right") - 1
    cell = numpy.searchsorted(edges, left, side="right") - 1
    # The columns in the order of their priority: data by depth, then zeros by depth, then holes.
    rank = _RANK_OF_STATE[extents["state"]] << 32 | extents["depth"]
    shown, column = numpy.unique(rank, return_inverse=True)
    winner, most = _winners(cell, column[piece], length, shown, len(edges) - 1)
    return Cells(
        columns=min(columns, len(edges) - 1),
        edges=edges,
        state=_STATE_OF_RANK[shown[winner] >> 32],
        depth=shown[winner] & 0xFFFFFFFF,
        share=most / numpy.diff(edges),
    )


_RANK_OF_STATE = numpy.zeros(3, numpy.int64)
_RANK_OF_STATE[[DATA, ZERO, HOLE]] = 0, 1, 2
_STATE_OF_RANK = numpy.array([DATA, ZERO, HOLE], numpy.uint8)


def _edges(size_bytes: int, cells_max: int) -> "Array":
    count = max(1, min(cells_max, size_bytes // CELL_BYTES_MIN))
    whole, rest = divmod(size_bytes, count)
    index = numpy.arange(count + 1, dtype=numpy.int64)
    return index * whole + index * rest // count


def _winners(cell: "Array", column: "Array", length: "Array", shown: "Array", count: int) -> "tuple[Array, Array]":
    """Return for each cell the column that it shows, and the bytes of that column in it."""
    width = len(shown)
    is_best = shown >> 32
    winner, most = numpy.empty(count, numpy.int64), numpy.empty(count)
    step = max(1, _SUMS_MAX // width)
    for first in range(0, count, step):
        last = min(first + step, count)
        part = slice(*numpy.searchsorted(cell, (first, last)))
        key = (cell[part] - first) * width + column[part]
        sums = numpy.bincount(key, length[part], (last - first) * width).reshape(-1, width)
        # Only sums of the best state that a cell has count; the first of equals is the upper layer.
        best = numpy.where(sums > 0, is_best, len(_STATE_OF_RANK)).min(axis=1, keepdims=True)
        sums[is_best != best] = 0
        winner[first:last] = sums.argmax(axis=1)
        most[first:last] = sums.max(axis=1)
    return winner, most
