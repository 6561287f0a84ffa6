"""Forbids calls of the system in this process and its children, as a sandbox or an older kernel does: EPERM."""

import ctypes
import errno
import platform
import struct

_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # linux/prctl.h
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h: of words, absolute; with a constant
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000  # linux/seccomp.h
_SECOND = 24  # where its low word is in struct seccomp_data; little-endian
PROCESS_MADVISE = 440  # on all processors
PAGEMAP_SCAN = 0xC0606610
PIDFD_OPEN, PIDFD_SEND_SIGNAL = 434, 424
if platform.machine() == "x86_64":
    IOCTL, READ_PROCESS, WRITE_PROCESS, MEMFD_CREATE, MADVISE, FALLOCATE = 16, 310, 311, 319, 28, 285
else:
    IOCTL, READ_PROCESS, WRITE_PROCESS, MEMFD_CREATE, MADVISE, FALLOCATE = 29, 270, 271, 279, 233, 47


def forbid(number: int, second: int | None = None) -> None:
    """Have a call refused from now on. What a child calls before its program is loaded (`preexec_fn`).

    With `second`, only where that is the second argument: of `ioctl`, one request.
    """
    steps = [
        (_LOAD, 0, 0, 0),
        (_IF_EQUAL, 0, 1 if second is None else 3, number),
        *([] if second is None else [(_LOAD, 0, 0, _SECOND), (_IF_EQUAL, 0, 1, second)]),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "calls cannot be forbidden here")
