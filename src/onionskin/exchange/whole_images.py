"""Tells whether the last bytes of a qcow2 or VMDK image are missing, of which qemu-img says nothing.

qemu-img takes what lies behind the end of a file for zeros, so an image that lacks less than its last cluster converts
without an error. Not every image ends with a whole cluster: the last one of the disk may be shorter, and compressed data
ends anywhere. So the tables are asked for what the disk needs. The sources are QEMU's docs/interop/qcow2.txt and VMware's
Virtual Disk Format 5.0.
"""

import os
import struct
import sys
import zlib
from array import array
from collections.abc import Iterator
from typing import Final

from onionskin.base.files import read_all

_SECTOR: Final = 512
_QCOW2: Final = struct.Struct(">4sIQIIQIIQ")  # up to the offset of the L1 table
_EXTERNAL_DATA, _EXTENDED_L2 = 1 << 2, 1 << 4  # incompatible features
_COMPRESSED, _READS_ZERO = 1 << 62, 1
_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
_SUBCLUSTERS: Final = 32
_ZLIB: Final = 0
_VMDK: Final = struct.Struct("<4sIIQQQQIQQQ")  # up to the offset of the data
_COMPRESSED_GRAINS: Final = 1 << 16
_AT_END: Final = (1 << 64) - 1
_NO_GRAIN: Final = 2  # offsets below this mean that there is none


def lacks_data(descriptor: int, kind: str) -> bool:
    """Return whether a disk needs bytes behind the end of its image: a qcow2 or a VMDK image that qemu-img could open."""
    size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
    if kind == "qcow2":
        return any(_lacking_in_qcow2(descriptor, size_bytes))
    return kind == "vmdk" and _is_vmdk_short(descriptor, size_bytes)


def _table(descriptor: int, offset: int, count: int, code: str, order: str) -> "array[int]":
    """Read numbers; those behind the end of the file are missing."""
    found = array(code)
    length = max(0, min(count * found.itemsize, os.lseek(descriptor, 0, os.SEEK_END) - offset))
    data = read_all(descriptor, length, offset) if length else b""  # no more memory than the file has bytes
    found.frombytes(data[: len(data) // found.itemsize * found.itemsize])
    if sys.byteorder != order:
        found.byteswap()
    return found


# ---- qcow2 ----


def _lacking_in_qcow2(descriptor: int, size_bytes: int) -> Iterator[bool]:
    """Yield True for each table or cluster of the disk that is not all in the file, and False for others."""
    header = read_all(descriptor, _SECTOR)
    _, version, _, _, cluster_bits, disk_bytes, _, l1_count, l1_offset = _QCOW2.unpack_from(header)
    features = int.from_bytes(header[72:80], "big") if version >= 3 else 0
    by = header[104] if version >= 3 and int.from_bytes(header[100:104], "big") > 104 else _ZLIB
    cluster = 1 << cluster_bits
    yield l1_offset + 8 * l1_count > size_bytes
    if features & _EXTERNAL_DATA:
        return
    words = 2 if features & _EXTENDED_L2 else 1
    entries = cluster // (8 * words)
    for number, place in enumerate(_table(descriptor, l1_offset, l1_count, "Q", "big")):
        if not (at := place & _OFFSET):
            continue
        yield at + cluster > size_bytes
        table = _table(descriptor, at, entries * words, "Q", "big")
        for index, entry in enumerate(table[::words]):
            if entry & _COMPRESSED:
                yield _is_packed_cluster_short(descriptor, size_bytes, entry, cluster_bits, by)
            elif (host := entry & _OFFSET) and host + cluster > size_bytes:
                needed = min(cluster, disk_bytes - ((number * entries + index) << cluster_bits))
                if words == 2:  # of the subclusters, those count that are allocated
                    allocated = table[index * words + 1] & ((1 << _SUBCLUSTERS) - 1)
                    needed = min(needed, allocated.bit_length() * cluster // _SUBCLUSTERS)
                elif entry & _READS_ZERO:
                    needed = 0
                yield host + needed > size_bytes


def _is_packed_cluster_short(descriptor: int, size_bytes: int, entry: int, cluster_bits: int, by: int) -> bool:
    """Whether compressed data is cut off: it has whole sectors, of which the last may have something else behind it."""
    bits = 62 - (cluster_bits - 8)
    offset = entry & ((1 << bits) - 1)
    sectors = ((entry & (_COMPRESSED - 1)) >> bits) + 1
    end = offset // _SECTOR * _SECTOR + sectors * _SECTOR
    if end <= size_bytes:
        return False
    if end >= size_bytes + _SECTOR:
        return True
    if by != _ZLIB:
        return False
    unpacked = zlib.decompressobj(-15)  # it has no checksum, and of missing bytes zeros would be made
    try:
        unpacked.decompress(read_all(descriptor, end - offset, offset), 1 << cluster_bits)
        unpacked.decompress(unpacked.unconsumed_tail, 1)
    except zlib.error:
        return True
    return not unpacked.eof


# ---- VMDK ----


def _is_vmdk_short(descriptor: int, size_bytes: int) -> bool:
    """Whether a grain ends behind the file. A grain that is compressed has a checksum, which qemu-img looks at."""
    header = read_all(descriptor, _SECTOR)
    if not header.startswith(b"KDMV"):
        return False  # a description, or a file of an older kind
    _, _, flags, disk, grain, _, _, per_table, _, directory, _ = _VMDK.unpack_from(header)
    if flags & _COMPRESSED_GRAINS or directory == _AT_END or not (grain and per_table):
        return False
    tables = -(-disk // (grain * per_table))
    for number, place in enumerate(_table(descriptor, directory * _SECTOR, tables, "I", "little")):
        if place < _NO_GRAIN:
            continue
        found = _table(descriptor, place * _SECTOR, per_table, "I", "little")
        if (place * _SECTOR + per_table * 4) > size_bytes:
            return True
        for index, at in enumerate(found):
            if at >= _NO_GRAIN and (at + grain) * _SECTOR > size_bytes:
                needed = min(grain, disk - (number * per_table + index) * grain)
                if (at + needed) * _SECTOR > size_bytes:
                    return True
    return False
