from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from onionskin.base.annotations import ReadableBuffer

DEFAULT_THREADS: int
EXTENT_FIELDS: list[tuple[str, str]]

class CopyCancelled(Exception): ...

class CopyResult(NamedTuple):
    bytes_done: int
    bytes_reflinked: int
    bytes_ranged: int
    bytes_copied: int
    bytes_zeroed: int

class CopyJob:
    bytes_per_second: int
    def __new__(
        cls,
        extents: Sequence[tuple[int, int, int, int, int]] | np.ndarray[Any, Any],
        *,
        threads: int = 0,
        reflink: bool = False,
        zero_holes: bool = False,
        solid: bool = False,
        bytes_per_second: int = 0,
    ) -> Self: ...
    @property
    def bytes_done(self) -> int: ...
    @property
    def bytes_total(self) -> int: ...
    def run(self) -> CopyResult: ...
    def cancel(self) -> None: ...

def split_zeros(data: ReadableBuffer, block_size: int) -> list[tuple[int, int, bool]]: ...
