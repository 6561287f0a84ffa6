"""How large things are or may be, in every store and in every process that opens one: docs/format.md has them on disk."""

HEADER_BYTES = 4096  # of a segment, and of a map file: what it holds begins there
VOLUME_BYTES_MAX = 1 << 46
OFFSET_MAX = (1 << 63) - 1  # the signed 64-bit offsets of the system end here
BLOCK_SIZES = tuple(1 << shift for shift in range(12, 22))
BLOCK_SIZE_MAX = BLOCK_SIZES[-1]
NAME_BYTES_MAX = 255
NOTE_BYTES_MAX = 1 << 16
WIPE_POLICIES = ("release", "zero")
