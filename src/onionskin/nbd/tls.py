"""TLS for NBD clients on TCP: the option haggling up to STARTTLS, the handshake, and a pump behind it.

The C server speaks no TLS. A client that comes over TCP talks to a thread here first. The thread answers every option
but STARTTLS with an error, so the server sends nothing unencrypted but the greeting and these answers. After the
handshake, the C server gets one end of a pair of local sockets, and the thread carries bytes between the client and the
other end.

What must hold: before the handshake is done, nothing from a client is trusted, and no more than a small bound of it is
kept. A handshake that takes too long is ended. Clients prove who they are by a certificate or by a pre-shared key; the
latter needs Python 3.13 (docs/serving.md).
"""

import platform
import select
import socket
import ssl
import stat
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from onionskin.errors import StateError

Result = TypeVar("Result")

HANDSHAKE_SECONDS = 20.0
BUFFER_BYTES = 1 << 18
KEY_BYTES_MIN, KEY_BYTES_MAX = 16, 256
_OPTIONS_MAX = 32
_OPTION_BYTES_MAX = 4096

_GREETING = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 0b11)  # fixed newstyle, no zeroes
_OPTION = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")
_REPLY_MAGIC = 0x3E889045565A9
_EXPORT_NAME, _ABORT, _STARTTLS = 1, 2, 5
_ACK = 1
_ERR_INVALID = 1 << 31 | 3
_ERR_TLS_REQUIRED = 1 << 31 | 5


class Refused(Exception):
    """The client is refused. The message is for the log."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms on which clients may connect. `knows_clients` says that each client has to prove who it is."""

    context: ssl.SSLContext
    knows_clients: bool


_shaking = threading.local()  # key_name: the owner of the pre-shared key that the handshake in this thread asked for


def terms_by_key(keys: Path) -> Terms:
    """Make the terms for handshakes with pre-shared keys.

    Parameters
    ----------
    keys : Path
        A file as GnuTLS's psktool writes it: lines of NAME:HEXADECIMAL.

    Raises
    ------
    StateError
        This Python has no pre-shared keys, or every user of this machine can read the file.
    ValueError
        The file is not of that form.
    """
    if not getattr(ssl, "HAS_PSK", False):
        raise StateError(
            f"pre-shared keys need Python 3.13 or newer with OpenSSL, and this is Python {platform.python_version()}; "
            "use --tls-certificate, --tls-key and --tls-ca"
        )
    known = read_keys(keys)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("kECDHEPSK:kDHEPSK")  # for TLS 1.2: a key that leaks later decrypts no recorded session

    def find(name: str | None) -> bytes:
        _shaking.key_name = name
        return known.get(name or "", b"")

    set_callback: Any = context.set_psk_server_callback  # type: ignore[attr-defined,unused-ignore]
    set_callback(find)
    return Terms(context, knows_clients=True)


def read_keys(path: Path) -> dict[str, bytes]:
    """Read the pre-shared keys and return them by the names of their owners; see `terms_by_key`."""
    if stat.S_IMODE(path.stat().st_mode) & 0o007:
        raise StateError(f"{path} can be read by every user of this machine: chmod 600 it, and make new keys")
    found: dict[str, bytes] = {}
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        name, _, digits = line.rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not name or not KEY_BYTES_MIN <= len(key) <= KEY_BYTES_MAX:
            raise ValueError(
                f"{path}, line {number}: a key is NAME:HEX with {KEY_BYTES_MIN} to {KEY_BYTES_MAX} bytes, as "
                "'psktool -u NAME -p FILE' writes it"
            )
        found[name] = key
    if not found:
        raise ValueError(f"{path} has no key; 'psktool -u NAME -p {path}' adds one")
    return found


def terms_by_certificate(certificate: Path, key: Path, authority: Path | None) -> Terms:
    """Make the terms for handshakes with certificates. With an authority, clients must show one that it signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in filter(None, (certificate, key, authority)):
        with open(path, "rb"):  # this error names the file; the error of ssl does not
            pass
    try:
        context.load_cert_chain(certificate, key)
        if authority is not None:
            context.load_verify_locations(authority)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        names = " or ".join(str(path) for path in (certificate, key, authority) if path)
        raise StateError(
            f"{names} is no PEM file that TLS can use ({error.reason or error}); make them as docs/serving.md shows"
        ) from None
    return Terms(context, knows_clients=authority is not None)


def accept(connection: socket.socket, terms: Terms) -> ssl.SSLSocket:
    """Do the TLS handshake with a client. The call blocks. If it fails, the connection is closed.

    Raises
    ------
    Refused
        The client did not ask for TLS, took too long, or has no valid certificate or key.
    """
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    try:
        _haggle(connection, deadline)
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        _shaking.key_name = None
        return terms.context.wrap_socket(connection, server_side=True)
    except TimeoutError:
        connection.close()
        raise Refused(f"no TLS after {HANDSHAKE_SECONDS:.0f} s") from None
    except ssl.SSLError as error:
        connection.close()
        raise Refused(f"TLS failed: {error.reason or error}") from None
    except (OSError, Refused) as error:
        connection.close()
        raise Refused(str(error)) from None


def owner(outer: ssl.SSLSocket) -> str | None:
    """Return the name that a client proved: of its certificate, or else of the key in this thread's last handshake."""
    certificate: Any = outer.getpeercert()
    names = [value for part in (certificate or {}).get("subject", ()) for key, value in part if key == "commonName"]
    found: str | None = names[0] if names else _shaking.key_name
    return found


def _haggle(connection: socket.socket, deadline: float) -> None:
    """Answer options until the client sends STARTTLS."""
    _send(connection, _GREETING, deadline)
    (flags,) = struct.unpack(">I", _take(connection, 4, deadline))
    if flags & ~0b11 or not flags & 1:
        raise Refused(f"it sent client flags {flags:#x}")
    for _ in range(_OPTIONS_MAX):
        magic, option, length = _OPTION.unpack(_take(connection, _OPTION.size, deadline))
        if magic != b"IHAVEOPT" or length > _OPTION_BYTES_MAX:
            raise Refused("it does not speak NBD, or sent too long an option")
        _take(connection, length, deadline)
        if option == _STARTTLS and length == 0:
            _send(connection, _REPLY.pack(_REPLY_MAGIC, option, _ACK, 0), deadline)
            return
        if option == _EXPORT_NAME:  # the protocol has no error reply to this option
            raise Refused("it did not ask for TLS")
        if option == _ABORT:
            _send(connection, _REPLY.pack(_REPLY_MAGIC, option, _ACK, 0), deadline)
            raise Refused("it left before TLS")
        code = _ERR_INVALID if option == _STARTTLS else _ERR_TLS_REQUIRED
        text = b"this server wants TLS first"
        _send(connection, _REPLY.pack(_REPLY_MAGIC, option, code, len(text)) + text, deadline)
    raise Refused(f"it sent {_OPTIONS_MAX} options and did not ask for TLS")


def _take(connection: socket.socket, length: int, deadline: float) -> bytes:
    taken = b""
    while len(taken) < length:
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        part = connection.recv(length - len(taken))
        if not part:
            raise Refused("it went away before TLS")
        taken += part
        if time.monotonic() > deadline:
            raise TimeoutError
    return taken


def _send(connection: socket.socket, data: bytes, deadline: float) -> None:
    connection.settimeout(max(0.1, deadline - time.monotonic()))
    connection.sendall(data)


def pump(outer: ssl.SSLSocket, inner: socket.socket) -> None:
    """Carry bytes between a client and the C server until one of them disconnects, then close both."""
    outer.setblocking(False)
    inner.setblocking(False)
    try:
        _skip_greeting(inner)
        _Pump(outer, inner).run()
    except OSError:
        pass  # one of the two disconnected, so the other is closed too
    finally:
        inner.close()
        with suppress(OSError, ValueError):
            outer.unwrap()  # it sends the end of TLS, and does not wait for the client's answer
        outer.close()


def _skip_greeting(inner: socket.socket) -> None:
    """Read the greeting of the C server, and send it the client's flags: the client has had a greeting already."""
    inner.settimeout(HANDSHAKE_SECONDS)
    greeting = b""
    while len(greeting) < len(_GREETING):
        part = inner.recv(len(_GREETING) - len(greeting))
        if not part:
            raise ConnectionResetError
        greeting += part
    inner.sendall(struct.pack(">I", struct.unpack(">H", greeting[16:])[0] & 0b11))
    inner.setblocking(False)


class _Pump:
    """Carries bytes in both directions, with a bounded buffer for each.

    One thread does both, because two threads may not use one SSL object at once.
    """

    def __init__(self, outer: ssl.SSLSocket, inner: socket.socket) -> None:
        self._outer, self._inner = outer, inner
        self._to_inner, self._to_outer = b"", b""
        self._outer_wants_write = self._outer_wants_read = False

    def run(self) -> None:
        while True:
            moved = self._client_to_server() | self._server_to_client()
            if moved:
                continue
            self._wait()

    def _client_to_server(self) -> bool:
        moved = False
        if not self._to_inner:
            data = self._receive_from_client()
            if data is not None:
                if not data:
                    raise ConnectionResetError
                self._to_inner, moved = data, True
        if self._to_inner:
            sent = _try(self._inner.send, self._to_inner)
            self._to_inner = self._to_inner[sent or 0 :]
            moved = moved or bool(sent)
        return moved

    def _server_to_client(self) -> bool:
        moved = False
        if not self._to_outer:
            data = _try(self._inner.recv, BUFFER_BYTES)
            if data is not None:
                if not data:
                    raise ConnectionResetError
                self._to_outer, moved = data, True
        if self._to_outer:
            try:
                sent = self._outer.send(self._to_outer)
            except ssl.SSLWantWriteError:
                self._outer_wants_write = True
            except ssl.SSLWantReadError:
                self._outer_wants_read = True
            else:
                self._outer_wants_write = False
                self._to_outer = self._to_outer[sent:]
                moved = True
        return moved

    def _receive_from_client(self) -> bytes | None:
        try:
            return self._outer.recv(BUFFER_BYTES)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLWantWriteError:
            self._outer_wants_write = True
            return None
        except ssl.SSLEOFError:
            return b""

    def _wait(self) -> None:
        readable: list[socket.socket] = []
        writable: list[socket.socket] = []
        if not self._to_inner or self._outer_wants_read:
            readable.append(self._outer)
            self._outer_wants_read = False
        if self._to_inner:
            writable.append(self._inner)
        if not self._to_outer:
            readable.append(self._inner)
        if self._to_outer or self._outer_wants_write:
            writable.append(self._outer)
            self._outer_wants_write = False
        poll = select.poll()
        for one in {*readable, *writable}:
            events = (select.POLLIN if one in readable else 0) | (select.POLLOUT if one in writable else 0)
            poll.register(one, events)
        poll.poll()
        # Poll does not see data that the SSL object has buffered, so `run` tries to receive before every wait.


def _try(call: Callable[[Any], Result], argument: Any) -> Result | None:
    """Make a call on a non-blocking socket; return None if it would block."""
    try:
        return call(argument)
    except BlockingIOError:
        return None
