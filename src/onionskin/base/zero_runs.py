"""Finds the zero blocks of a buffer. Import and delta leave them out instead of storing them."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    from onionskin.base.lazy import numpy as np


def split_zeros(data: "npt.NDArray[np.uint8]", block_size: int) -> Iterator[tuple[int, int, bool]]:
    """Split a buffer into runs of blocks that are all zero and runs of blocks that are not.

    Parameters
    ----------
    data : ndarray of uint8, one dimension, contiguous
        Any length; the last block may be shorter than the others.
    block_size : int
        A multiple of 8.

    Yields
    ------
    start, stop : int
        Bytes of `data`; `stop` is exclusive. Runs follow each other without gaps and alternate.
    is_zero : bool
        Whether every byte of the run is zero.
    """
    if not len(data):
        return
    whole = len(data) // block_size * block_size
    words = data[:whole].view(np.uint64).reshape(-1, block_size // 8)
    zero: npt.NDArray[np.bool_] = np.logical_not(np.any(words, axis=1))
    if whole < len(data):
        zero = np.append(zero, not data[whole:].any())
    turns = np.flatnonzero(zero[1:] != zero[:-1]) + 1
    bounds = [0, *(int(turn) * block_size for turn in turns), len(data)]
    is_zero = bool(zero[0])
    for start, stop in itertools.pairwise(bounds):
        yield start, stop, is_zero
        is_zero = not is_zero
