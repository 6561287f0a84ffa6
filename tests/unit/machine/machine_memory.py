"""Stands in for a hypervisor: maps the file ONIONSKIN_RAM shared, as QEMU does, and writes what stdin says.

Started with the preload library, it gets a private mapping. A line `OFFSET BYTE` fills the page at that offset, `read OFFSET`
prints the first byte of one, and `punch OFFSET` gives the room of one in the file back, as a balloon does, and prints the
error; `user ID` becomes another user, and `receive OFFSET` has the kernel write a page; each is answered by a line.
"""

import ctypes
import mmap
import os
import sys

path = sys.argv[1]
descriptor = os.open(path, os.O_RDWR)
memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size, mmap.MAP_SHARED)
libc = ctypes.CDLL(None, use_errno=True)
print("ready", flush=True)
for line in sys.stdin:
    first, second = line.split()
    if first == "read":
        print(memory[int(second)], flush=True)
    elif first == "punch":
        failed = libc.fallocate64(descriptor, 3, ctypes.c_int64(int(second)), ctypes.c_int64(4096))
        print(ctypes.get_errno() if failed else 0, flush=True)
    elif first == "user":
        os.setresuid(int(second), int(second), int(second))
        print("done", flush=True)
    elif first == "receive":
        reader, writer = os.pipe()
        os.write(writer, b"\5" * 4096)
        print(os.readv(reader, [memoryview(memory)[int(second) : int(second) + 4096]]), flush=True)
    else:
        memory[int(first) : int(first) + 4096] = bytes([int(second)]) * 4096
        print("done", flush=True)
