"""The client's side of the NBD protocol by hand, so that a test can send what no sane client would."""

import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

NBD_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META, SET_META = 1, 2, 3, 5, 6, 7, 8, 9, 10
ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, SHUTDOWN, TOO_BIG = (
    0x80000001,
    0x80000002,
    0x80000003,
    0x80000005,
    0x80000006,
    0x80000007,
    0x80000009,
)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 75, 95, 108
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, ERROR = 0, 1, 2, 5, 0x8001


@dataclass
class Reply:
    """All that came for one cookie."""

    error: int = 0
    data: bytes = b""
    chunks: list[tuple[int, int]] = field(default_factory=list)  # (type, bytes of content)
    statuses: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


class Client:
    """One connection. `structured` and `contexts` are negotiated by `go`."""

    def __init__(self, path: Path, *, client_flags: int = 3, greeting: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(300)
        self.socket.connect(str(path))
        self.structured = False
        self.no_zeroes = bool(client_flags & 2)
        self.size = self.flags = 0
        self.contexts: dict[str, int] = {}
        self._cookie = 100
        if greeting:
            magic, option_magic, flags = struct.unpack(">QQH", self.receive(18))
            assert (magic, option_magic, flags) == (NBD_MAGIC, OPTION_MAGIC, 3)
            self.socket.sendall(struct.pack(">I", client_flags))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.socket.close()

    # ---- bytes ----

    def receive(self, length: int) -> bytes:
        parts = []
        while length:
            part = self.socket.recv(min(length, 1 << 20))
            if not part:
                raise EOFError("the server closed the connection")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def is_closed(self) -> bool:
        try:
            return not self.socket.recv(1)
        except ConnectionError:
            return True

    # ---- options ----

    def send_option(self, option: int, data: bytes = b"", *, length: int | None = None) -> None:
        self.socket.sendall(struct.pack(">QII", OPTION_MAGIC, option, len(data) if length is None else length) + data)

    def option_reply(self, option: int) -> tuple[int, bytes]:
        magic, answered, kind, length = struct.unpack(">QIII", self.receive(20))
        assert (magic, answered) == (OPTION_REPLY_MAGIC, option)
        return kind, self.receive(length)

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """All replies, to ACK or the error, both included."""
        self.send_option(option, data)
        replies = [self.option_reply(option)]
        while replies[-1][0] in (SERVER, REP_INFO, META_CONTEXT):
            replies.append(self.option_reply(option))
        return replies

    def info(self, option: int, name: str, *infos: int) -> list[tuple[int, bytes]]:
        encoded = name.encode()
        data = struct.pack(f">I{len(encoded)}sH{len(infos)}H", len(encoded), encoded, len(infos), *infos)
        return self.option(option, data)

    def meta(self, option: int, name: str, *queries: str) -> list[tuple[int, bytes]]:
        data = struct.pack(">I", len(name)) + name.encode() + struct.pack(">I", len(queries))
        for query in queries:
            data += struct.pack(">I", len(query)) + query.encode()
        return self.option(option, data)

    def start_structured(self) -> None:
        assert self.option(STRUCTURED_REPLY) == [(ACK, b"")]
        self.structured = True

    def go(self, name: str = "", *, structured: bool = True, contexts: tuple[str, ...] = ()) -> "Client":
        if structured:
            self.start_structured()
        if contexts:
            *selected, (last, _) = self.meta(SET_META, name, *contexts)
            assert last == ACK
            self.contexts = {body[4:].decode(): struct.unpack(">I", body[:4])[0] for _, body in selected}
        *infos, (last, _) = self.info(GO, name)
        assert last == ACK
        export = next(body for kind, body in infos if kind == REP_INFO and body[:2] == b"\0\0")
        self.size, self.flags = struct.unpack(">QH", export[2:])
        return self

    # ---- requests ----

    def encode(self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> bytes:
        self._cookie += 1
        return struct.pack(">IHHQQI", REQUEST_MAGIC, flags, kind, self._cookie, offset, length) + payload

    def request(self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> Reply:
        self.socket.sendall(self.encode(kind, offset, length, flags=flags, payload=payload))
        cookie, reply = self.reply({self._cookie: (kind, offset, length)})
        assert cookie == self._cookie
        return reply

    def reply(self, asked: dict[int, tuple[int, int, int]]) -> tuple[int, Reply]:
        """The next reply, whose chunks must not be mixed with those of others (this server never mixes them)."""
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == SIMPLE_MAGIC:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            kind, _, length = asked[cookie]
            return cookie, Reply(error, self.receive(length) if kind == READ and not error else b"")
        assert magic == CHUNK_MAGIC
        return self._chunks(asked)

    def _chunks(self, asked: dict[int, tuple[int, int, int]]) -> tuple[int, Reply]:
        reply = Reply()
        done, first_cookie = 0, None
        while not done:
            if first_cookie is not None:
                assert struct.unpack(">I", self.receive(4)) == (CHUNK_MAGIC,)
            done, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
            assert first_cookie in (None, cookie)
            first_cookie = cookie
            body = self.receive(length)
            self._take_chunk(reply, kind, body, asked[cookie])
        assert first_cookie is not None
        return first_cookie, reply

    def _take_chunk(self, reply: Reply, kind: int, body: bytes, asked: tuple[int, int, int]) -> None:
        _, offset, _ = asked
        if kind == OFFSET_DATA:
            assert struct.unpack(">Q", body[:8])[0] == offset + len(reply.data)
            reply.data += body[8:]
            reply.chunks.append((kind, len(body) - 8))
        elif kind == OFFSET_HOLE:
            at, length = struct.unpack(">QI", body)
            assert at == offset + len(reply.data)
            reply.data += bytes(length)
            reply.chunks.append((kind, length))
        elif kind == STATUS:
            (context,) = struct.unpack(">I", body[:4])
            reply.statuses[context] = [struct.unpack_from(">II", body, at) for at in range(4, len(body), 8)]
        elif kind == ERROR:
            reply.error = struct.unpack(">I", body[:4])[0]
            reply.chunks.append((kind, 0))
        else:
            assert (kind, body) == (NONE, b"")
            reply.chunks.append((kind, 0))

    # ---- verbs ----

    def read(self, offset: int, length: int, *, flags: int = 0) -> Reply:
        return self.request(READ, offset, length, flags=flags)

    def write(self, offset: int, data: bytes, *, flags: int = 0) -> int:
        return self.request(WRITE, offset, len(data), flags=flags, payload=data).error

    def simple(self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0) -> int:
        return self.request(kind, offset, length, flags=flags).error

    def status(self, offset: int, length: int, *, flags: int = 0) -> dict[str, list[tuple[int, int]]]:
        reply = self.request(BLOCK_STATUS, offset, length, flags=flags)
        assert reply.error == 0
        return {name: reply.statuses[id] for name, id in self.contexts.items()}
