from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import numpy as np

DEFAULT_THREADS: int

class WipeCancelled(Exception): ...

class WipeResult(NamedTuple):
    bytes_wiped: int
    bytes_skipped: int
    bytes_verified: int
    bytes_punched: int
    bytes_unwipeable: int
    filesystem_magic: int
    copy_on_write: bool

class WipeJob:
    def __new__(
        cls,
        fd: int,
        ranges: Iterable[tuple[int, int]] | np.ndarray[Any, Any] | bytes,
        *,
        zero: bool,
        punch: bool,
        verify: bool = False,
        threads: int = 0,
    ) -> Self: ...
    @property
    def bytes_done(self) -> int: ...
    def run(self) -> WipeResult: ...
    def cancel(self) -> None: ...

def unused_ranges(slots: bytes, *, header_bytes: int, slot_bytes: int, file_bytes: int) -> bytes: ...
def wipe(
    fd: int,
    ranges: Iterable[tuple[int, int]] | np.ndarray[Any, Any] | bytes,
    *,
    zero: bool,
    punch: bool,
    verify: bool = False,
    threads: int = 0,
) -> WipeResult: ...
