from collections.abc import Buffer
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES: int
SAME: int
ZERO: int
DATA: int
RUN_DTYPE: np.dtype[np.void]

def classify(pages: Buffer, parent: Buffer | None = None) -> NDArray[np.uint8]: ...

class PageTracker:
    def __new__(cls, pid: int, start: int, length: int) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def close(self) -> None: ...
    def written(self, *, protect: bool) -> NDArray[np.void]: ...
    def read(self, runs: NDArray[Any], to: Buffer) -> None: ...
