from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

class WipeCancelled(Exception): ...

class WipeResult(NamedTuple):
    bytes_wiped: int
    bytes_skipped: int
    bytes_verified: int
    bytes_punched: int
    bytes_unreachable: int
    filesystem_magic: int
    copy_on_write: bool

class WipeJob:
    def __init__(
        self,
        fd: int,
        ranges: Iterable[tuple[int, int]] | np.ndarray[Any, Any],
        *,
        zero: bool,
        punch: bool,
        verify: bool = False,
        threads: int = 0,
    ) -> None: ...
    @property
    def bytes_done(self) -> int: ...
    def run(self) -> WipeResult: ...
    def cancel(self) -> None: ...

def wipe(
    fd: int,
    ranges: Iterable[tuple[int, int]] | np.ndarray[Any, Any],
    *,
    zero: bool,
    punch: bool,
    verify: bool = False,
    threads: int = 0,
) -> WipeResult: ...
