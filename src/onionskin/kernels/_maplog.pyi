"""The types of _maplog.pyx: block maps of layers, the layer that each block comes from, and headers and map logs."""

import os
from collections.abc import Sequence
from typing import NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from onionskin.kernels._extents import Extents

_Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

MAGIC_SEGMENT: bytes
MAGIC_MAP: bytes
HEADER_BYTES: int
LOCATION_HOLE: int
LOCATION_ZERO: int
STATE_DATA: int
STATE_ZERO: int

class Header(NamedTuple):
    """The fields of the header of a file of the store."""

    version: int
    block_size: int
    incompatible: int
    compatible: int
    uuid: bytes

class Frame(NamedTuple):
    """One whole frame of a map log."""

    offset: int
    sequence: int
    salt: int
    crc: int
    records: npt.NDArray[np.void]

def crc32c(data: _Buffer, crc: int = 0, *, reference: bool = False) -> int:
    """Return the CRC-32C of bytes."""

def encode_header(magic: bytes, *, block_size: int, uuid: bytes, wipe_zero: bool = False) -> bytes:
    """Return the header of a file."""

def decode_header(data: _Buffer, magic: bytes, *, path: str | os.PathLike[str] = "header") -> Header:
    """Check and read a header."""

def decode_log(data: _Buffer, *, path: str | os.PathLike[str] = "map log") -> tuple[list[Frame], int, bool]:
    """Read the frames of a whole map file: (frames, length, torn)."""

class LayerMap:
    """The block map of one layer."""

    def __new__(cls, *, block_size: int, block_count: int) -> Self: ...
    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        map_id: bytes,
        block_size: int,
        block_count: int,
        length: int | None = None,
        frames: int | None = None,
        crc: int | None = None,
    ) -> LayerMap:
        """Read a map file."""

    @property
    def block_size(self) -> int:
        """The block size in bytes."""

    @property
    def map_length(self) -> int:
        """The length of the sound part of the file that the map was loaded from, in bytes."""

    @property
    def map_frames(self) -> int:
        """The number of frames in this part."""

    @property
    def map_crc(self) -> int:
        """The CRC of the last frame, which depends on all frames before it."""

    @property
    def torn(self) -> bool:
        """Whether a torn frame follows this part."""

    @property
    def segments(self) -> list[bytes]:
        """The ids of its segments."""

    @property
    def size_bytes(self) -> int | None:
        """The size that the last SIZE record gave the layer."""

    @property
    def block_count(self) -> int:
        """The number of blocks that the map has room for."""

    def memory_bytes(self) -> int:
        """Return the number of bytes of memory that the index takes."""

    def lookup(self, block_index: int) -> int:
        """Return the location of a block."""

    def runs(self) -> npt.NDArray[np.void]:
        """Return all runs that are not HOLE."""

    def extents(self) -> Extents:
        """Return which bytes of the disk are DATA and which are ZERO here."""

    def count(self) -> tuple[int, int]:
        """Return (DATA blocks, ZERO blocks)."""

    def segment_use(self) -> dict[bytes, tuple[int, int]]:
        """Return for each segment the number of its blocks, and one more than their highest slot."""

    def count_shadowed(self, upper: LayerMap) -> int:
        """Return how many blocks a merge of the two maps frees."""

    def live_slots(self, segment: bytes) -> bytes:
        """Return the slots of a segment that the map names."""

    def slots_by_segment(self) -> dict[bytes, bytes]:
        """Return what the map names of each of its segments."""

    def add_segment(self, segment: bytes) -> int:
        """Return the number of a segment."""

    def set(self, block_index: int, block_count: int, location: int) -> None:
        """Map blocks to a location."""

    def fold(self, upper: LayerMap) -> None:
        """Lay another map over this one."""

    def drop_zero(self) -> None:
        """Turn ZERO into HOLE."""

    def replace(self, segment: bytes, slots: bytes, new_segment: bytes, new_slots: Sequence[int]) -> int:
        """Map blocks of one segment to their copies in another segment."""

    def write(
        self, path: str | os.PathLike[str], *, map_id: bytes, wipe_zero: bool, size_bytes: int | None
    ) -> tuple[int, int, int]:
        """Write a compact log to a new file, and return (length, frames, crc)."""

    def close(self) -> None:
        """Free the memory."""

class ProvenanceMap:
    """A map of which layer each block comes from."""

    def __new__(cls, *, block_size: int, block_count: int) -> Self: ...
    @property
    def block_size(self) -> int:
        """The block size in bytes."""

    @property
    def laid(self) -> int:
        """The number of layers that were laid."""

    def lay(self, upper: LayerMap) -> None:
        """Lay a layer over the layers before it."""

    def lay_file(
        self,
        path: str | os.PathLike[str],
        *,
        map_id: bytes,
        length: int | None = None,
        frames: int | None = None,
        crc: int | None = None,
    ) -> int | None:
        """Lay the layer of a map file, and return the size that the file gives the layer."""

    def extents(self, sources: Sequence[int]) -> Extents:
        """Return which bytes of the disk are DATA and which are ZERO, and of which layer."""

    def close(self) -> None:
        """Free the memory."""
