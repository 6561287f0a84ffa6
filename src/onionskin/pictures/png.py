"""Writes PNG images whose pixels are numbers of a palette. Flat rectangles need no more."""

import struct
import zlib
from collections.abc import Mapping, Sequence

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOURS_MAX = 256

Colour = tuple[int, int, int, int]  # red, green, blue, opacity


def encode(pixels: Sequence[bytes], palette: Sequence[Colour], texts: Mapping[str, str] | None = None) -> bytes:
    """Return a PNG image.

    Parameters
    ----------
    pixels : sequence of bytes
        The rows, which are of one length: indices into the palette. There is a row, and it is not empty.
    palette : sequence of (red, green, blue, opacity)
        At most 256 colours, of 0 to 255 each.
    texts : mapping, optional
        Kept in the file by keyword (Latin-1, at most 79 characters), as iTXt.
    """
    header = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 3, 0, 0, 0)  # 8 bits, palette, no interlace
    colours = b"".join(bytes(colour[:3]) for colour in palette)
    opacities = bytes(colour[3] for colour in palette)
    # Each row is preceded by its filter: 0, none.
    rows = b"".join(b"\0" + row for row in pixels)
    notes = b"".join(
        _chunk(b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode())
        for keyword, text in (texts or {}).items()
    )
    image = _chunk(b"IDAT", zlib.compress(rows, 9))
    parts = (_chunk(b"IHDR", header), notes, _chunk(b"PLTE", colours), _chunk(b"tRNS", opacities), image)
    return SIGNATURE + b"".join(parts) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
