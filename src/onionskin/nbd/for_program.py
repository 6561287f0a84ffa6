"""A disk for one program that this process starts: qemu-img reads or writes it over NBD, without a name or an address.

What must hold: nobody else can connect, since the socket is a pair and the program inherits its end; when the block ends the
program's requests are done or cut off, and none of them comes later.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from onionskin.nbd._nbd import NbdServer

if TYPE_CHECKING:
    from onionskin.kernels._volume import DataPath

_GRACE_SECONDS = 10.0  # for requests that are under way; the program has ended by then, or is not waited for


@contextmanager
def served_to_program(path: "DataPath", name: str, *, writable: bool) -> Iterator[int]:
    """Serve a disk, and give the descriptor that the program is to inherit.

    Parameters
    ----------
    path : DataPath
        The disk. It stays the caller's.
    name : str
        Of the export.
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
