"""The least client of NBD: it asks for an export by its name, reads its first block, and goes. And one of many at once."""

import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("nbd_first_reads.c")

GO, READ, DISCONNECT = 7, 0, 2
INFO_REPLY, ACK = 3, 1


def _exactly(connection: socket.socket, length: int) -> bytes:
    parts = b""
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        if not part:
            raise ConnectionError("the server hung up")
        parts += part
    return parts


def read_first_block(path: Path, export: str) -> bytes:
    """Connect to a Unix socket, and return the first 4 KiB of an export."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        _exactly(connection, 18)
        name = export.encode()
        connection.sendall(
            struct.pack(">I8sII", 3, b"IHAVEOPT", GO, 4 + len(name) + 2)
            + struct.pack(">I", len(name))
            + name
            + struct.pack(">H", 0)
        )
        while True:
            _, _, kind, length = struct.unpack(">QIII", _exactly(connection, 20))
            said = _exactly(connection, length)
            if kind == ACK:
                break
            if kind != INFO_REPLY:
                raise ConnectionError(f"the server refused {export!r}: {said.decode(errors='replace')}")
        connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, READ, 1, 0, 4096))
        _, error, _ = struct.unpack(">IIQ", _exactly(connection, 16))
        if error:
            raise OSError(error, f"the first block of {export!r}")
        block = _exactly(connection, 4096)
        connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, DISCONNECT, 2, 0, 0))
        return block


@contextmanager
def first_blocks_at_once(directory: Path, path: Path, block: bytes) -> Iterator[Callable[[list[str]], list[float]]]:
    """Build and run ``nbd_first_reads.c``. Yields what takes exports, and returns when the block of each was there.

    `block` is what each of them has to read.
    """
    program, expected = directory / "nbd_first_reads", directory / "first_block"
    expected.write_bytes(block)
    subprocess.run(["gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", program, SOURCE], check=True)
    with subprocess.Popen(
        [program, path, expected], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdin
        assert client.stdout
        said, heard = client.stdin, client.stdout

        def read(exports: list[str]) -> list[float]:
            said.write(" ".join(exports) + "\n")
            said.flush()
            ended = [float(heard.readline()) for _ in exports]  # it ends with a message where it could not read one
            assert heard.readline() == "\n"
            return ended

        yield read
        said.close()
