"""Clients with TLS: a thread for each, which brings it to TLS and carries its bytes to the C server.

What must hold: so many are carried as may be connected, those included that are still in their handshake, of which the
oldest gives way to who comes; what goes wrong with one is said in the log, and is no other client's.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

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
        Takes a connected socket that speaks plain NBD, and who is at its other end, over to the C server; it closes the
        socket where it fails.
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
        self._guard = threading.Lock()  # of the two below
        self._carriers: set[threading.Thread] = set()
        self._handshakes: dict[threading.Thread, socket.socket] = {}  # that are not done, oldest first

    def serve(self, connection: socket.socket, peer: str, terms: Terms) -> None:
        """Carry a client in a thread of its own; its socket is closed in the end."""
        if not self._take_place():
            self._log(f"{peer}: refused: {self._connections_max} clients are connected")
            connection.close()
            return

        def carry() -> None:
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

        carrier = threading.Thread(target=carry, name=f"onionskin tls {peer}", daemon=True)
        with self._guard:
            self._carriers.add(carrier)
            self._handshakes[carrier] = connection.dup()  # `accept` takes the other one over
        try:
            carrier.start()
        except RuntimeError:  # no thread may be started, or no memory is left: that passes, and ends no server
            self._log(f"{peer}: refused: no thread could be started for it")
            with self._guard:
                self._carriers.discard(carrier)
                self._handshakes.pop(carrier).close()
            self._places.release()
            connection.close()

    def _take_place(self) -> bool:
        """Take a place for a client with TLS; the oldest that is still in its handshake gives way."""
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
        """Let the last replies of the C server out to clients with TLS; who is still in a handshake gets none."""
        deadline = time.monotonic() + CARRY_SECONDS
        with self._guard:
            carriers = list(self._carriers)
        for carrier in carriers:
            carrier.join(max(0.0, deadline - time.monotonic()))
