"""A flat raw file read and written by a loop in C: what the system itself costs. Compiled when first needed."""

import ctypes
import functools
import mmap
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).with_name("flat_loop.c")
Array = np.ndarray[Any, Any]


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory) / "flat_loop.so"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", built, SOURCE], check=True)
        return ctypes.CDLL(str(built))


class FlatFile:
    """A raw image, open for reading and writing."""

    def __init__(self, path: Path, block_size: int = 4096) -> None:
        self.descriptor = os.open(path, os.O_RDWR)
        self.block_size = block_size
        self._library = _library()
        self._map: mmap.mmap | None = None

    def unmap(self) -> None:
        """Give the mapping up: pages that are mapped cannot be put out of the cache."""
        if self._map:
            self._map.close()
            self._map = None

    def close(self) -> None:
        self.unmap()
        os.close(self.descriptor)

    def read_blocks(self, indices: Array, out: Array) -> None:
        """pread each block."""
        self._call("flat_pread", ctypes.c_int(self.descriptor), indices, out)

    def write_blocks(self, indices: Array, data: Array) -> None:
        """pwrite each block."""
        self._call("flat_pwrite", ctypes.c_int(self.descriptor), indices, data)

    def copy_blocks(self, indices: Array, out: Array) -> None:
        """memcpy each block from a shared mapping."""
        if self._map is None:
            self._map = mmap.mmap(self.descriptor, 0)
        start = np.frombuffer(self._map, np.uint8).ctypes.data
        self._call("flat_copy", ctypes.c_void_p(start), indices, out)

    def flush(self) -> None:
        os.fdatasync(self.descriptor)

    def _call(self, name: str, source: Any, indices: Array, buffer: Array) -> None:
        assert indices.dtype == np.uint64 and buffer.nbytes == len(indices) * self.block_size
        status = getattr(self._library, name)(
            source,
            ctypes.c_void_p(indices.ctypes.data),
            ctypes.c_uint64(len(indices)),
            ctypes.c_uint32(self.block_size),
            ctypes.c_void_p(buffer.ctypes.data),
        )
        if status:
            raise OSError(f"{name} came to a short transfer")
