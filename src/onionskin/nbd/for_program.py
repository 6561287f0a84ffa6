"""Serves a disk to one program that this process starts: qemu-img reads or writes it over NBD, without an address.

What must hold: no other process can connect, because the sockets are a pair and the program inherits its end. When the
`with` block ends, the program's requests are done or cut off, and no request comes later.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from onionskin.nbd._nbd import NbdServer

if TYPE_CHECKING:
    from onionskin.kernels._volume import DataPath

_GRACE_SECONDS = 10.0  # for requests under way; normally the program has ended before


@contextmanager
def served_to_program(path: "DataPath", name: str, *, writable: bool) -> Iterator[int]:
    """Serve a disk, and yield the descriptor that the program has to inherit.

    Parameters
    ----------
    path : DataPath
        The disk. The caller closes it.
    name : str
        The name of the export.
    writable : bool
    """
    server = NbdServer(connections_max=1)
    try:
        server.add_export(name, path, read_only=not writable)
        ours, theirs = socket.socketpair()
        try:
            server.serve(ours.detach(), "a program that was started for it")
            yield theirs.fileno()
        finally:
            theirs.close()
    finally:
        server.stop(grace_seconds=_GRACE_SECONDS)
