"""Units: what disks of the harness are written with. A unit is half a block, so that writes of a part are tried too.

Each unit names itself: 16 bytes, repeated, that hold the number it was written with and where. So contents of another
block, or of another time, are told from the right ones; 0 is a unit of zeros, and -1 one that nobody ever wrote.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

BLOCK_BYTES = 4096
UNIT_BYTES = 2048
BLOCK_UNITS = BLOCK_BYTES // UNIT_BYTES
_PIECE = struct.Struct("<4sIII")
_MAGIC = b"PAIR"
ALIEN = -1


def unit_bytes(number: int, unit: int) -> bytes:
    """Return the bytes of a unit."""
    if number == 0:
        return bytes(UNIT_BYTES)
    return _PIECE.pack(_MAGIC, number, unit, ~number & 0xFFFFFFFF) * (UNIT_BYTES // _PIECE.size)


def disk_bytes(numbers: Iterable[int], first: int = 0) -> bytes:
    """Return the bytes of units from `first` on."""
    return b"".join(unit_bytes(number, first + index) for index, number in enumerate(numbers))


def values_of(data: bytes, first: int = 0) -> list[frozenset[int]]:
    """Return the numbers that the pieces of each unit have: one, where nobody writes meanwhile."""
    return [_values(data[at : at + UNIT_BYTES], first + at // UNIT_BYTES) for at in range(0, len(data), UNIT_BYTES)]


def numbers_of(data: bytes, first: int = 0) -> tuple[int, ...]:
    """Return the number of each unit; ALIEN where it is not of one."""
    return tuple(next(iter(values)) if len(values) == 1 else ALIEN for values in values_of(data, first))


def _values(data: bytes, unit: int) -> frozenset[int]:
    head = data[: _PIECE.size]
    if head * (len(data) // _PIECE.size) == data:
        return frozenset({_value(head, unit)})
    return frozenset(_value(data[at : at + _PIECE.size], unit) for at in range(0, len(data), _PIECE.size))


def _value(piece: bytes, unit: int) -> int:
    if not any(piece):
        return 0
    if len(piece) != _PIECE.size:
        return ALIEN
    magic, number, at, check = _PIECE.unpack(piece)
    return number if magic == _MAGIC and at == unit and check == ~number & 0xFFFFFFFF else ALIEN
