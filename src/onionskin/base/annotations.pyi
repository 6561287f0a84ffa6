"""Types of what callers hand in, for those who check types: nothing of this is loaded when a program runs.

`Buffer` is in the standard library from Python 3.12 on (PEP 688). No name says that a buffer can be written to, so
`WritableBuffer` lists the types for which that is so.
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
# memoryview is one of them: whether it is of a writable object only the program knows.
WritableBuffer: TypeAlias = bytearray | memoryview | array.array[Any] | mmap.mmap | numpy.typing.NDArray[Any]
Bytes: TypeAlias = numpy.typing.NDArray[numpy.uint8]
Extents: TypeAlias = numpy.typing.NDArray[numpy.void]
