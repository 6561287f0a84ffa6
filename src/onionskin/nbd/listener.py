"""The sockets to listen on, which are made here or passed by systemd, and the rule for sockets that others can reach.

What must hold: a TCP socket that other machines can reach needs TLS and clients that prove who they are, unless the
user said that anybody may connect. If one of several sockets cannot be made, those that were made are closed.
"""

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from onionskin.base.paths import FilePath
from onionskin.base.sockets import UnixListener, is_local, listen_tcp, uri_of
from onionskin.errors import StateError
from onionskin.nbd.tls import Terms

# A Unix socket that this process made before it knew what it serves, for who asks for its path: clients can wait there.
beforehand: UnixListener | None = None


@dataclass(slots=True)
class Listener:
    """A listening socket. `path` is the path of a Unix socket that was made here."""

    socket: socket.socket
    path: FilePath | None = None
    tls: Terms | None = None
    close: Callable[[], None] = field(default=lambda: None)

    @property
    def uri(self) -> str:
        """The address that clients connect to."""
        return uri_of(self.socket, self.path, tls=self.tls is not None)

    def refuse_unsafe(self, *, anybody: bool) -> None:
        """Raise StateError if other machines can reach this socket without TLS, or without proving who they are.

        With `anybody`, TLS alone is enough.

        Raises
        ------
        StateError
        """
        may_come = self.tls is not None and (self.tls.knows_clients or anybody)
        if not is_local(self.socket) and not may_come:
            raise StateError(
                f"{self.uri} can be reached from other machines: give --tls-certificate, --tls-key and "
                "--tls-ca, or --tls-psk, or listen on 127.0.0.1 or on a Unix socket"
            )


def open_listeners(
    given: Iterable[socket.socket],
    *,
    path: Path | None,
    mode: int,
    addresses: Iterable[tuple[str, int]],
    terms: Terms | None,
) -> list[Listener]:
    """Make the sockets to listen on, and take over those that were passed.

    Parameters
    ----------
    given : iterable of sockets
        Sockets that listen already, as systemd passes them.
    path : Path, optional
        The path of a Unix socket to make, with this `mode`.
    addresses : iterable of (host, port)
        The TCP addresses to listen on.
    terms : Terms, optional
        The terms of TLS for clients that come over TCP.
    """
    found = [Listener(one, None, None if one.family == socket.AF_UNIX else terms, one.close) for one in given]
    try:
        if path:
            unix = _made_beforehand(path) or UnixListener(path, mode=mode)
            found.append(Listener(unix.socket, unix.path, None, unix.close))
        for host, port in addresses:
            found += [Listener(one, None, terms, one.close) for one in listen_tcp(host, port)]
    except BaseException:
        for listener in found:
            listener.close()
        raise
    return found


def _made_beforehand(path: Path) -> UnixListener | None:
    """Return the socket that listens at this path since before, once."""
    global beforehand
    made = beforehand
    if made is None or made.path != FilePath(path).absolute():
        return None
    beforehand = None
    return made
