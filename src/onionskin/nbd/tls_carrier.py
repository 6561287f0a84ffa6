"""Clients with TLS: a thread for each does the handshake and carries its bytes to the C server.

What must hold: at most as many clients are carried as may be connected, and clients in their handshake count too. If
all places are taken, the oldest client that is still in its handshake is cut off for a new one. A failure of one client
is logged and does not affect other clients.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from onionskin.base.threads import SureThread
from onionskin.errors import OnionskinError
from onionskin.nbd import tls
from onionskin.nbd.tls import Terms

CARRY_SECONDS = 2.0
GIVE_WAY_SECONDS = 1.0


class TlsCarrier:
    """Carries clients with TLS.

    Parameters
    ----------
    connections_max : int
    hand_over : callable
        Hands a connected socket that speaks plain NBD to the C server, with the name of the peer. It closes the socket
        if it fails.
    log : callable
        Takes a line.
    """

    def __init__(
        self,
        connections_max: int,
        *,
        hand_over: Callable[[socket.socket, str], None],
        log: Callable[[str], None],
    ) -> None:
        self._connections_max = connections_max
        self._hand_over = hand_over
        self._log = log
        self._places = threading.BoundedSemaphore(connections_max)
        self._guard = threading.Lock()  # for the two below
        self._carriers: set[threading.Thread] = set()
        self._handshakes: dict[threading.Thread, socket.socket] = {}  # handshakes that are not done, oldest first

    def serve(self, connection: socket.socket, peer: str, terms: Terms) -> None:
        """Carry a client in a thread of its own, which closes the socket at the end."""
        second = connection.dup()  # `tls.accept` takes `connection` over; before the place, which would stay taken
        if not self._take_place():
            self._log(f"{peer}: refused: {self._connections_max} clients are connected")
            second.close()
            connection.close()
            return

        def carry() -> None:
            with self._guard:
                if threading.current_thread() not in self._carriers:
                    return  # it begins so late that its client was refused
            try:
                self._carry(connection, peer, terms)
            except tls.Refused as refusal:
                self._log(f"{peer}: refused: {refusal}")
            except (OnionskinError, OSError) as error:
                self._log(f"{peer}: {error}")
            finally:
                self._places.release()
                with self._guard:
                    self._carriers.discard(threading.current_thread())

        carrier = SureThread(target=carry, name=f"onionskin tls {peer}", daemon=True)
        with self._guard:
            self._carriers.add(carrier)
            self._handshakes[carrier] = second
        try:
            carrier.start()
        except RuntimeError:  # the process may start no more threads, or has no memory: only this client is refused
            self._log(f"{peer}: refused: no thread could be started for it")
            with self._guard:
                self._carriers.discard(carrier)
                self._handshakes.pop(carrier).close()
            self._places.release()
            connection.close()

    def _take_place(self) -> bool:
        """Take a place for a client. If there is none, cut off the oldest client that is still in its handshake."""
        if self._places.acquire(blocking=False):
            return True
        with self._guard:
            oldest = next(iter(self._handshakes.values()), None)
            if oldest is None:
                return False
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        return self._places.acquire(timeout=GIVE_WAY_SECONDS)

    def _carry(self, connection: socket.socket, peer: str, terms: Terms) -> None:
        try:
            outer = tls.accept(connection, terms)
        finally:
            with self._guard:
                self._handshakes.pop(threading.current_thread()).close()
        name = tls.owner(outer)
        inner, for_server = socket.socketpair()
        try:
            self._hand_over(for_server, f"{peer} ({outer.version()}{f', {name!r}' if name else ''})")
        except BaseException:
            inner.close()
            outer.close()
            raise
        tls.pump(outer, inner)

    def join(self) -> None:
        """Wait a short time until the last replies of the C server have gone out to clients with TLS."""
        deadline = time.monotonic() + CARRY_SECONDS
        with self._guard:
            carriers = list(self._carriers)
        for carrier in carriers:
            carrier.join(max(0.0, deadline - time.monotonic()))
