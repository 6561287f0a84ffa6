"""The bytes of docs/format.md once more, in plain Python: what the C code is compared with.

Run as a script it writes the golden files. They are a promise: a change of them is a new format version.
"""

import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HOLE, DATA, ZERO, SEGMENT, SIZE = 1, 2, 3, 4, 5
HEADER_BYTES, FRAME_HEADER_BYTES, RECORD_BYTES = 4096, 32, 24
FRAME_MAGIC = b"OFRM"
SALT_MARK = 1 << 63


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes, crc: int = 0) -> int:
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


class Record(NamedTuple):
    block_index: int
    block_count: int
    slot: int
    kind: int
    segment: int
    reserved: int = 0


def hole(block_index: int, block_count: int) -> Record:
    return Record(block_index, block_count, 0, HOLE, 0)


def zero(block_index: int, block_count: int) -> Record:
    return Record(block_index, block_count, 0, ZERO, 0)


def data(block_index: int, block_count: int, segment: int, slot: int) -> Record:
    return Record(block_index, block_count, slot, DATA, segment)


def segment(number: int, uuid: bytes) -> Record:
    low, middle, high = struct.unpack("<QII", uuid)
    return Record(low, middle, high, SEGMENT, number)


def size(size_bytes: int) -> Record:
    return Record(size_bytes, 0, 0, SIZE, 0)


def encode_header(
    magic: bytes,
    uuid: bytes,
    block_size: int = 4096,
    *,
    version: int = 1,
    incompatible: int = 0,
    compatible: int = 0,
    rest: bytes = b"",
) -> bytes:
    head = struct.pack("<8sIIQQ16s", magic, version, block_size, incompatible, compatible, uuid) + rest
    head = head.ljust(HEADER_BYTES - 4, b"\0")
    return head + struct.pack("<I", crc32c(head))


def encode_frame(
    records: Iterable[Record], sequence: int, salt: int, previous_crc: int, *, record_count: int | None = None
) -> bytes:
    body = b"".join(struct.pack("<QIIHHI", *record) for record in records)
    count = len(body) // RECORD_BYTES if record_count is None else record_count
    salt |= SALT_MARK
    head = struct.pack("<4sIQQI", FRAME_MAGIC, count, sequence, salt, previous_crc)
    return head + struct.pack("<I", crc32c(head + bytes(4) + body)) + body


def frame_crc(frame: bytes) -> int:
    return int.from_bytes(frame[28:32], "little")


def encode_log(
    frames: Iterable[Iterable[Record]],
    uuid: bytes,
    block_size: int = 4096,
    *,
    salt: int = 7,
    compatible: int = 0,
) -> bytes:
    out = encode_header(b"ONIONMAP", uuid, block_size, compatible=compatible)
    crc = 0
    for sequence, records in enumerate(frames, 1):
        frame = encode_frame(records, sequence, salt, crc)
        crc = frame_crc(frame)
        out += frame
    return out


def decode_log(log: bytes) -> list[list[Record]]:
    """Read a sound log, asserting every rule of the format."""
    assert log[:8] == b"ONIONMAP"
    assert crc32c(log[:4092]) == int.from_bytes(log[4092:4096], "little")
    frames = []
    offset, crc = HEADER_BYTES, 0
    while offset < len(log):
        magic, count, sequence, salt, previous_crc = struct.unpack_from("<4sIQQI", log, offset)
        body = log[offset + FRAME_HEADER_BYTES :][: count * RECORD_BYTES]
        assert magic == FRAME_MAGIC
        assert sequence == len(frames) + 1
        assert salt & SALT_MARK
        assert previous_crc == crc
        assert len(body) == count * RECORD_BYTES
        crc = crc32c(log[offset : offset + 28] + bytes(4) + body)
        assert crc == frame_crc(log[offset:])
        frames.append([Record(*fields) for fields in struct.iter_unpack("<QIIHHI", body)])
        offset += FRAME_HEADER_BYTES + len(body)
    return frames


MAP_ID = bytes(range(16))
SEGMENT_A = bytes(range(0x20, 0x30))
SEGMENT_B = bytes(range(0xF0, 0x100))
# What the golden log says, by frame: every kind of record, two segments, a size, a layer that was grown.
GOLDEN_FRAMES = [
    [size(1 << 20), segment(1, SEGMENT_A), data(0, 8, 1, 0), data(100, 1, 1, 8)],
    [zero(4, 2), segment(2, SEGMENT_B), data(200, 56, 2, 0xFFFFFF00)],
    [size(2 << 20), zero(256, 256), hole(100, 1), data(511, 1, 1, 8)],
]
GOLDEN = {
    "empty.map": encode_log([], MAP_ID),
    "small.map": encode_log(GOLDEN_FRAMES, MAP_ID, compatible=1),
    "header.seg": encode_header(b"ONIONSEG", SEGMENT_A, 65536, compatible=1),
}
GOLDEN_DIRECTORY = Path(__file__).parent / "golden"

if __name__ == "__main__":
    for file_name, contents in GOLDEN.items():
        sys.stdout.write(f"{file_name}: {len(contents)} bytes\n")
        (GOLDEN_DIRECTORY / file_name).write_bytes(contents)
