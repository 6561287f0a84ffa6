from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

_Extent = tuple[int, int, int, int, int]

class Extents:
    """Extents of a disk, in order and without overlap."""

    def __new__(cls, ranges: Iterable[tuple[int, int]] = ..., *, state: int = ..., source: int = ...) -> Self: ...
    @classmethod
    def of(cls, extents: Iterable[_Extent]) -> Self:
        """Return a table of extents that are given one by one."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_Extent]: ...
    def array(self, dtype: np.dtype[np.void] | None = ...) -> npt.NDArray[Any]:
        """Return a structured array."""

    def over(self, lower: Extents) -> Extents:
        """Return what shows where these extents lie over others."""

    def within(self, ranges: Extents) -> Extents:
        """Return the parts of these extents that lie in other ones."""

    def only(self, state: int) -> Extents:
        """Return the extents that have one state."""

    def from_source(self, source: int) -> Extents:
        """Return the extents that come from one source."""

    def joined(self) -> Extents:
        """Return the extents with those made one that are one."""

    def ranges(self) -> Extents:
        """Return which bytes the extents cover."""

    def packed(self, offset: int, unit: int) -> Extents:
        """Return the extents packed behind each other."""

    @property
    def end(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    def bytes_before(self, offset: int) -> int:
        """Return how many bytes of the extents lie before an offset."""

    def offset_after(self, count: int) -> int:
        """Return the lowest offset before which so many bytes of the extents lie."""

    def sources(self) -> set[int]:
        """Return the sources of all extents."""

    def bytes_of_sources(self, count: int) -> list[int]:
        """Return how many bytes of the extents come from each of the first sources."""

    def cells(self, count: int) -> tuple[list[int], bytes, list[int], list[int]]:
        """Cut the disk into cells of equal size, and return what each shows: edges, states, sources, bytes of them."""

    def copies(self, destination: int, descriptors: Mapping[int, int]) -> bytes:
        """Return the table of `CopyJob` that copies extents to the same offsets of a file."""
