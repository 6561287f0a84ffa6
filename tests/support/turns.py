"""The turns of a thread on its processor, as Linux has them from 6.12 on."""

import ctypes
import platform
import struct

_SCHED_GETATTR = 315 if platform.machine() == "x86_64" else 275
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")


def turn_ns(thread: int = 0) -> int:
    """Return how long the turns of a thread are (0: of this one). Older kernels say 0 of all."""
    room = ctypes.create_string_buffer(_ATTRIBUTES.size)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SCHED_GETATTR, thread, room, _ATTRIBUTES.size, 0):
        raise OSError(ctypes.get_errno(), "sched_getattr")
    return int(_ATTRIBUTES.unpack(room.raw)[5])
