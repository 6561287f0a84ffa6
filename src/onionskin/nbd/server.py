"""The server: it listens, hands each client to the C server, tidies up, and ends everything in order.

What must hold: every client is served or refused. A failure of one client, volume or store ends neither the server nor
another client, volume or store. At the end, clients get their replies before volumes are flushed and closed, and
volumes are closed before their stores.

Threads: the C server has its own. In Python there are one thread that accepts, one for each client with TLS, those of
the control sockets, and the main thread, which tidies up every few seconds and waits for the end.
"""

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from errno import EMFILE, ENFILE

from onionskin.base.sockets import peer_of
from onionskin.base.threads import Thread
from onionskin.errors import OnionskinError, StateError
from onionskin.nbd._nbd import NbdServer
from onionskin.nbd.exported import GRACE_SECONDS
from onionskin.nbd.exports import Exports
from onionskin.nbd.listener import Listener
from onionskin.nbd.tls_carrier import TlsCarrier
from onionskin.operations import load_all

TIDY_SECONDS = 5.0
LINES_SECONDS = 0.05  # a line of the log may be so late: openings of exports would wait for it otherwise
READY_THREADS = 96  # begun before there are clients, where forks are made and served: a hundred may come at once
TURN_SECONDS = 0.2  # so long a client waits at most while the export of another one is opened


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on clients: connections in all, bytes under way for one client, idle seconds, bytes of one request."""

    connections_max: int = 64
    bytes_in_flight_max: int = 64 << 20
    idle_seconds: int = 0
    request_bytes_max: int = 32 << 20


class Server:
    """Serves volumes and snapshots until `stop` is called.

    Parameters
    ----------
    limits : Limits
    allow_revert : bool
        Whether `revert` works while clients are connected: they agreed that the disk may change under them.
    log : callable
        Takes a line.
    trust : bool
        Whether to open stores that another user owns.
    listed_bitmap : str, optional
        The one snapshot whose ``qemu:dirty-bitmap`` context is listed; all, where it is not given.
    expire : bool
        Whether volumes of stores that are served as a whole are dropped when their lifetime is over.

    Attributes
    ----------
    exports : Exports
        The exports that are served.
    """

    def __init__(
        self,
        *,
        limits: Limits,
        allow_revert: bool,
        log: Callable[[str], None],
        trust: bool = False,
        listed_bitmap: str | None = None,
        expire: bool = True,
    ) -> None:
        self._limits = limits
        self._log = log
        self._listeners: list[Listener] = []
        self._stopping = threading.Event()
        self._tidying = threading.Event()  # set when there is something to tidy up now
        self._wake, self._waker = socket.socketpair()
        self._nbd = NbdServer(
            connections_max=limits.connections_max,
            bytes_in_flight_max=limits.bytes_in_flight_max,
            idle_seconds=limits.idle_seconds,
            request_bytes_max=limits.request_bytes_max,
            turn_seconds=TURN_SECONDS,
            list_exports=lambda after: self.exports.names_behind(after),
            list_contexts=lambda export, after: self.exports.contexts_behind(export, after),
        )
        self.exports = Exports(
            self._nbd,
            allow_revert=allow_revert,
            trust=trust,
            log=log,
            uris=lambda: self.uris,
            stopping=self._stopping,
            want_tidying=self._tidying.set,
            listed_bitmap=listed_bitmap,
            expire=expire,
        )
        self._tls_carrier = TlsCarrier(
            limits.connections_max,
            hand_over=lambda connection, peer: self.serve(connection, peer, is_tls=True),
            log=log,
        )

    @property
    def uris(self) -> list[str]:
        """The addresses that clients connect to, without the name of an export."""
        return [listener.uri for listener in self._listeners]

    def listen(self, listeners: list[Listener], *, anybody: bool = False) -> None:
        """Take sockets to listen on.

        A TCP socket that other machines can reach needs TLS and clients that prove who they are. With `anybody`, TLS
        alone is enough.
        """
        self._listeners += listeners  # before any of them is refused, because `close` closes them all
        for listener in listeners:
            listener.refuse_unsafe(anybody=anybody)
            listener.socket.setblocking(False)

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until `stop` is called, then flush all volumes. `ready` is called when clients can connect."""
        load_all()
        accepting = Thread(target=self._accept, name="onionskin accept", daemon=True)
        try:
            accepting.start()
            ready()
            if self.exports.has_whole_stores:
                self._nbd.begin_threads(min(READY_THREADS, self._limits.connections_max))
            while not self._stopping.is_set():
                self._tidying.clear()
                self.exports.tidy()
                self._tidying.wait(TIDY_SECONDS)
        finally:
            self._stopping.set()
            self._waker.send(b"x")
            accepting.join()
            self.close()

    def stop(self) -> None:
        """End `run`. May be called by any thread and by a signal handler."""
        self._stopping.set()
        self._tidying.set()

    def close(self) -> None:
        """Let clients finish their requests, then flush and close all volumes. Idempotent."""
        self._stopping.set()
        with ExitStack() as stack:  # the last call is made first; if some fail, the rest are made too
            stack.callback(self.exports.close_stores)
            stack.callback(self.exports.close_views)
            stack.callback(self.exports.end_volumes)
            stack.callback(self._tls_carrier.join)
            stack.callback(self._log_events)
            stack.callback(self._nbd.stop, grace_seconds=GRACE_SECONDS)
            stack.callback(self.exports.close_controls)
            for listener in self._listeners:
                stack.callback(listener.close)
        self._wake.close()
        self._waker.close()

    def _accept(self) -> None:
        by_descriptor = {listener.socket.fileno(): listener for listener in self._listeners}
        clients, everything = select.poll(), select.poll()
        for descriptor in (*by_descriptor, self._wake.fileno()):
            clients.register(descriptor, select.POLLIN)
            everything.register(descriptor, select.POLLIN)
        everything.register(self._nbd.event_fd, select.POLLIN)
        unsaid_since = 0.0
        while not self._stopping.is_set():
            for descriptor, _ in everything.poll() if not unsaid_since else clients.poll(LINES_SECONDS * 1000):
                if descriptor in by_descriptor:
                    self._take_all(by_descriptor[descriptor])
                elif descriptor == self._nbd.event_fd:
                    unsaid_since = time.monotonic()
            if unsaid_since and time.monotonic() - unsaid_since >= LINES_SECONDS:
                unsaid_since = 0.0
                self._log_events()

    def _take_all(self, listener: Listener) -> None:
        """Take the clients that wait: without TLS and over a Unix socket, there is nothing to decide here."""
        if listener.tls is not None or listener.socket.family != socket.AF_UNIX:
            self._take(listener)
            return
        try:
            self._nbd.accept(listener.socket.fileno())
        except OSError as error:
            self._wait_a_little(error)

    def _log_events(self) -> None:
        for line in self._nbd.events():
            self._log(line)

    def _take(self, listener: Listener) -> None:
        try:
            connection, _ = listener.socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            self._wait_a_little(error)
            return
        try:
            connection.setblocking(True)
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            peer = peer_of(connection)
        except OSError:  # the client has disconnected already
            connection.close()
            return
        try:
            if listener.tls is None:
                self.serve(connection, peer)
            else:
                self._tls_carrier.serve(connection, peer, listener.tls)
        except (OnionskinError, OSError) as error:
            self._log(f"{peer}: refused: {error}")
            connection.close()

    def _wait_a_little(self, error: OSError) -> None:
        """Wait, where no descriptors or no memory are left: poll returns at once meanwhile."""
        self.exports.is_short_of_descriptors = error.errno in (EMFILE, ENFILE)
        self._tidying.set()
        self._log(f"a client could not be accepted: {os.strerror(error.errno or 0)}")
        self._stopping.wait(0.2)

    def serve(self, connection: socket.socket, peer: str, *, is_tls: bool = False) -> None:
        """Hand a connected stream socket to the C server."""
        try:
            self._nbd.serve(connection.detach(), peer, tls=is_tls)  # it closes the socket, also if it fails
        except OSError as error:
            if error.errno == EMFILE:
                full = f"{self._limits.connections_max} clients are connected; raise --connections to let more in"
                raise StateError(full) from None
            raise

    def serve_one(self, connection: socket.socket) -> None:
        """Serve one client, and return when it has disconnected or `stop` was called. The caller closes the server."""
        watched = connection.dup()
        self.serve(connection, "stdin")
        poll = select.poll()
        poll.register(watched.fileno(), select.POLLRDHUP)
        while not self._stopping.is_set() and not poll.poll(200):
            pass
        watched.close()
