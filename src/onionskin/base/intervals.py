"""Sorted intervals as arrays of starts and ends."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Array = numpy.typing.NDArray[Any]
else:
    from onionskin.base.lazy import numpy


def covered(points: "Array", starts: "Array", ends: "Array") -> "Array":
    """Return for each point the index of the sorted interval that it lies in, or -1."""
    if not len(starts):
        return numpy.full(len(points), -1)
    at = numpy.searchsorted(starts, points, side="right") - 1
    return numpy.where((at >= 0) & (points < ends[numpy.maximum(at, 0)]), at, -1)
