"""A server for tests: a store with one volume, an NbdServer over it, and a Unix socket that accepts."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onionskin.nbd._nbd import NbdServer
from onionskin.store import Store


class Serving:
    """Accepts on a Unix socket and hands each connection to the server."""

    def __init__(self, server: NbdServer, path: Path, **flags: Any) -> None:
        self.server = server
        self.path = path
        self.flags = flags
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            try:
                self.server.serve(accepted.detach(), "test", **self.flags)
            except OSError:
                continue

    def uri(self, name: str = "") -> str:
        return f"nbd+unix:///{name}?socket={self.path}"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@contextmanager
def serving(server: NbdServer, path: Path, **flags: Any) -> Iterator[Serving]:
    at = Serving(server, path, **flags)
    try:
        yield at
    finally:
        at.close()
        server.stop(grace_seconds=5)


@contextmanager
def served_volume(
    directory: Path, *, size: int | str, base: Path | None = None, **options: Any
) -> Iterator[tuple[Serving, Any]]:
    """A store with the volume `web`, which is also the default export."""
    with Store(directory / "store") as store:
        arguments = {"base": base} if base else {"size": size}
        with store.create("web", **arguments) as volume:
            server = NbdServer(**options)
            server.add_export("web", volume._path, read_only=False)
            server.set_default("web")
            with serving(server, directory / "socket") as at:
                yield at, volume
