"""The sizes and limits that hold in every store and in every process. docs/format.md says where they are on disk."""

HEADER_BYTES = 4096  # of a segment and of a map file: the contents begin behind it
VOLUME_BYTES_MAX = 1 << 46
OFFSET_MAX = (1 << 63) - 1  # the offsets of the system are signed and have 64 bits
BLOCK_SIZES = tuple(1 << shift for shift in range(12, 22))
BLOCK_SIZE_MAX = BLOCK_SIZES[-1]
NAME_BYTES_MAX = 255
NOTE_BYTES_MAX = 1 << 16
WIPE_POLICIES = ("release", "zero")
MACHINE_MODES = ("live", "pause", "off")  # how a snapshot of a machine was taken
DISKS_MAX = 16  # of a machine
MEMORY_BYTES_MAX = 1 << 42  # of a machine
STATE_BYTES_MAX = 64 << 20  # of the state of a machine's devices, which lies behind its RAM
