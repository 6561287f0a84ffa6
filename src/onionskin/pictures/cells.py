"""A disk cut into cells of equal size, and the layer that each cell shows.

A cell shows the layer (or base) that holds the most data in it. Data goes before zeros, and zeros go before holes, so
that a few blocks on a vast disk are seen. The share says how much of the cell they are. The sums are in C
(csrc/base/cells.h).
"""

from itertools import pairwise

from onionskin.base.records import record
from onionskin.operations.layering import LayerTable

CELL_BYTES_MIN = 512


@record
class Cells:
    """The cells of a disk, in order, `columns` to a row; the last row may be shorter.

    Attributes
    ----------
    columns : int
    edges : list of int
        n + 1 offsets: cell i is from edges[i] to edges[i + 1].
    state : bytes
        n times HOLE, DATA or ZERO.
    depth : list of int
        n depths in `LayerTable.chain`: of the layer that is shown.
    share : list of float
        n numbers from 0 to 1: the part of the cell that has that state and depth.
    """

    columns: int
    edges: list[int]
    state: bytes
    depth: list[int]
    share: list[float]

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
        return self.edges[-1]

    @property
    def cell_bytes(self) -> int:
        """Size of a cell; some are one byte larger where the disk does not divide evenly."""
        return self.size_bytes // self.count


def cut(table: LayerTable, columns: int, rows: int) -> Cells:
    """Cut a disk into at most `columns` x `rows` cells."""
    count = max(1, min(columns * rows, table.extents.end // CELL_BYTES_MIN))
    edges, state, depth, shown = table.extents.cells(count)
    share = [part / (end - first) for part, (first, end) in zip(shown, pairwise(edges), strict=True)]
    return Cells(columns=min(columns, count), edges=edges, state=state, depth=depth, share=share)
