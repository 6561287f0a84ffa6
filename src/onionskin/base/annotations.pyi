"""Types of the arguments of callers, for type checkers. A program that runs loads nothing of this file.

`Buffer` is in the standard library from Python 3.12 on (PEP 688). The library has no type for a buffer that can be
written to, so `WritableBuffer` lists the types that can.
"""

import array
import mmap
import os
from typing import Any, Literal, TypeAlias

import numpy
import numpy.typing
from typing_extensions import Buffer

AnyPath: TypeAlias = str | os.PathLike[str]
# NumPy's stubs say that an array is a buffer from Python 3.12 on only.
ReadableBuffer: TypeAlias = Buffer | numpy.typing.NDArray[Any]
WipePolicy: TypeAlias = Literal["release", "zero"]
OpenMode: TypeAlias = Literal["w", "r"]
SnapshotMode: TypeAlias = Literal["live", "pause"]
RecordedMode: TypeAlias = Literal["live", "pause", "off"]
MachineState: TypeAlias = Literal["off", "running", "paused", "failed"]
Severity: TypeAlias = Literal["error", "notice"]
LayerKind: TypeAlias = Literal["head", "snapshot", "layer", "base"]
# memoryview is one of them: whether it is of a writable object only the program knows.
WritableBuffer: TypeAlias = bytearray | memoryview | array.array[Any] | mmap.mmap | numpy.typing.NDArray[Any]
Bytes: TypeAlias = numpy.typing.NDArray[numpy.uint8]
ExtentArray: TypeAlias = numpy.typing.NDArray[numpy.void]
