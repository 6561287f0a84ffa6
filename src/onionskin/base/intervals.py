"""Sorted intervals as arrays of starts and ends, and the points where they begin and end."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Array = numpy.typing.NDArray[Any]
else:
    from onionskin.base.lazy import numpy


def distinct(values: "Array") -> "Array":
    """Return the values, each once, in order.

    `numpy.unique` does so too, and loads numpy.ma for that, which takes longer than most verbs.
    """
    ordered = numpy.sort(values)
    is_new = numpy.ones(len(ordered), bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_new]


def covered(points: "Array", starts: "Array", ends: "Array") -> "Array":
    """Return for each point the index of the sorted interval that it lies in, or -1."""
    if not len(starts):
        return numpy.full(len(points), -1)
    at = numpy.searchsorted(starts, points, side="right") - 1
    return numpy.where((at >= 0) & (points < ends[numpy.maximum(at, 0)]), at, -1)
