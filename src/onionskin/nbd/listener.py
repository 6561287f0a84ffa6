"""Sockets to listen on: made here, or passed by systemd; and who may reach them.

What must hold: TCP that other machines reach wants TLS and clients that show who they are, unless it was said that all
may come in; where one of several sockets cannot be had, those that were made are closed.
"""

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from onionskin.base.sockets import UnixListener, is_local, listen_tcp, uri_of
from onionskin.errors import StateError
from onionskin.nbd.tls import Terms


@dataclass(slots=True)
class Listener:
    """A listening socket; path is that of a Unix socket that we made."""

    socket: socket.socket
    path: Path | None = None
    tls: Terms | None = None
    close: Callable[[], None] = field(default=lambda: None)

    @property
    def uri(self) -> str:
        """Where clients connect."""
        return uri_of(self.socket, self.path, tls=self.tls is not None)

    def refuse_unsafe(self, *, anybody: bool) -> None:
        """Refuse what others than this machine reach without TLS; without knowing clients as well, unless `anybody` may come.

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
        That listen already, as systemd passes them.
    path : Path, optional
        Of a Unix socket to make, with this `mode`.
    addresses : iterable of (host, port)
        Of TCP.
    terms : Terms, optional
        On what terms clients come in over TCP.
    """
    found = [Listener(one, None, None if one.family == socket.AF_UNIX else terms, one.close) for one in given]
    try:
        if path:
            unix = UnixListener(path, mode=mode)
            found.append(Listener(unix.socket, unix.path, None, unix.close))
        for host, port in addresses:
            found += [Listener(one, None, terms, one.close) for one in listen_tcp(host, port)]
    except BaseException:
        for listener in found:
            listener.close()
        raise
    return found
