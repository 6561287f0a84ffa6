from collections.abc import Sequence
from typing import NamedTuple, Self

from onionskin.base.annotations import ReadableBuffer

DEFAULT_THREADS: int

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
        extents: Sequence[tuple[int, int, int, int, int]] | bytes,
        *,
        threads: int = 0,
        reflink: bool = False,
        zero_holes: bool = False,
        solid: bool = False,
        bytes_per_second: int = 0,
    ) -> Self: ...
    @property
    def descriptors(self) -> tuple[list[int], list[int]]: ...
    @property
    def bytes_done(self) -> int: ...
    @property
    def bytes_total(self) -> int: ...
    def run(self) -> CopyResult: ...
    def cancel(self) -> None: ...

def split_zeros(data: ReadableBuffer, block_size: int) -> list[tuple[int, int, bool]]: ...
def split_same(a: ReadableBuffer, b: ReadableBuffer, block_size: int) -> list[tuple[int, int, bool]]: ...
