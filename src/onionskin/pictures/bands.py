"""The entries of a map's legend: each layer, or groups of neighbours if there are too many layers to tell apart."""

from collections.abc import Sequence
from itertools import pairwise

from onionskin.base.records import record
from onionskin.base.states import DATA, HOLE, ZERO
from onionskin.operations.layering import LayerTable

BANDS_MAX = 12
_HEAD_ALONE = 1


@record
class Band:
    """Layers that share a colour, from depth `first` to `last`, both included.

    Attributes
    ----------
    kind : str
        As in `ChainMember`; `layers` for several layers; `zero` and `hole` for ranges without data.
    name : str
        The text of the legend.
    bytes_shown : int
        The bytes of the disk that are read from them.
    """

    kind: str
    name: str
    first: int
    last: int
    bytes_shown: int


@record
class Legend:
    """The bands of the layers, by depth; that of the base, if there is one; and those of ranges without data."""

    layers: tuple[Band, ...]
    base: Band | None
    zero: Band
    hole: Band

    @property
    def all(self) -> tuple[Band, ...]:
        """All of them, in the order in which they are listed."""
        return (*self.layers, *([self.base] if self.base else []), self.zero, self.hole)


def legend_of(table: LayerTable) -> Legend:
    """Return the legend of a layering."""
    data = data_bytes(table)
    members = list(table.chain)
    base = members.pop() if members[-1].kind == "base" else None
    depths: Sequence[int] = range(len(members))
    if len(members) > BANDS_MAX:
        depths = [depth for depth in depths if data[depth] or depth == 0]
    bands = []
    for group in _groups(depths):
        first, last = members[group[0]], members[group[-1]]
        kind: str = first.kind
        name = first.name
        if len(group) > 1:
            kind, name = "layers", f"{first.name} to {last.name}"
        bands.append(Band(kind, name, group[0], group[-1], sum(data[depth] for depth in group)))
    below = len(members)
    hole, zero = bytes_of_states(table)
    return Legend(
        tuple(bands),
        Band("base", base.name, below, below, data[below]) if base else None,
        Band("zero", "reads zero: trimmed or zeroed", 0, below, zero),
        Band("hole", "hole: nothing is stored", 0, below, hole),
    )


def data_bytes(table: LayerTable) -> list[int]:
    """Return how much data is read from each depth; the last is that of the base, and 0 if there is none."""
    return table.extents.only(DATA).bytes_of_sources(len(table.chain) + 1)


def bytes_of_states(table: LayerTable) -> tuple[int, int]:
    """Return how much of the disk is a hole, and how much reads zero because a layer says so."""
    return table.extents.only(HOLE).total_bytes, table.extents.only(ZERO).total_bytes


def _groups(depths: Sequence[int]) -> list[Sequence[int]]:
    """Divide depths into bands: the uppermost has its own band, the others share bands as equally as possible."""
    if len(depths) <= BANDS_MAX:
        return [[depth] for depth in depths]
    rest = depths[_HEAD_ALONE:]
    count = BANDS_MAX - _HEAD_ALONE
    edges = [index * len(rest) // count for index in range(count + 1)]
    return [depths[:_HEAD_ALONE], *(rest[a:b] for a, b in pairwise(edges))]
