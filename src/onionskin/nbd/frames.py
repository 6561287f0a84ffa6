"""The frames of the control protocol: a length of four bytes, big-endian, then that much JSON, an object.

Both ends bound what they take before they allocate it. See "Live operations" in docs/design.md.
"""

import json
import os
import socket
import struct
from dataclasses import asdict
from datetime import datetime
from typing import Any

from onionskin import errors
from onionskin.errors import FormatError, OnionskinError, StateError
from onionskin.snapshots import Snapshot

VERSION = 1
REQUEST_BYTES_MAX = 1 << 18
REPLY_BYTES_MAX = 1 << 23
_LENGTH = struct.Struct(">I")
_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        errors.FormatError,
        errors.StateError,
        errors.ChainError,
        errors.VolumeNotFoundError,
        errors.VolumeExistsError,
        errors.SnapshotNotFoundError,
        errors.SnapshotExistsError,
        errors.VerifyError,
        errors.OnionskinError,
        ValueError,
    )
}


def send(connection: socket.socket, value: dict[str, Any], *, bytes_max: int) -> None:
    """Send one frame; ValueError where it would be longer than the other end takes."""
    text = json.dumps(value, separators=(",", ":")).encode()
    if len(text) > bytes_max:
        raise ValueError(f"a message of {len(text)} bytes is longer than the {bytes_max} that the control socket takes")
    connection.sendall(_LENGTH.pack(len(text)) + text)


def receive(connection: socket.socket, *, bytes_max: int) -> dict[str, Any] | None:
    """Receive one frame; None where the other end has gone.

    Raises
    ------
    FormatError
        It is no frame, or too long.
    """
    head = _exactly(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > bytes_max:
        raise FormatError(f"a message of {length} bytes came in on the control socket; at most {bytes_max} are taken")
    text = _exactly(connection, length)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError("what came in on the control socket is no JSON; is it another program?") from None
    if not isinstance(value, dict):
        raise FormatError("what came in on the control socket is JSON, but no object; is it another program?")
    return value


def _exactly(connection: socket.socket, length: int) -> bytes | None:
    parts = []
    while length:
        try:
            part = connection.recv(min(length, 1 << 16))
        except ConnectionResetError:  # it closed with something unread
            return None
        if not part:
            return None
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


# ---- what goes over in frames ----


def pack_error(error: BaseException) -> dict[str, Any]:
    """Describe an error so that the other end can raise the same one."""
    if isinstance(error, OSError) and error.errno is not None:
        filename = None if error.filename is None else os.fsdecode(error.filename)
        return {"class": "OSError", "errno": error.errno, "message": error.strerror or "", "filename": filename}
    for kind in _ERRORS.values():
        if type(error) is kind:
            return {"class": kind.__name__, "message": str(error)}
    for parent in (StateError, FormatError, ValueError, KeyboardInterrupt):
        if isinstance(error, parent):
            return {"class": parent.__name__, "message": str(error)}
    return {"class": "OnionskinError", "message": f"the server failed: {error!r}; its log on stderr says where"}


def unpack_error(value: Any) -> BaseException:
    """Make the error that the other end described."""
    if not isinstance(value, dict):
        return FormatError("the server answered with an error that cannot be read; are both of one version?")
    kind, message = value.get("class"), str(value.get("message"))
    if kind == "OSError":
        filename = value.get("filename")
        number = value.get("errno")
        return OSError(number if isinstance(number, int) else 5, message, filename and str(filename))
    if kind == "KeyboardInterrupt":
        return KeyboardInterrupt()
    return _ERRORS.get(str(kind), OnionskinError)(message)


def pack_snapshot(snapshot: Snapshot | None) -> dict[str, Any] | None:
    """Describe a snapshot."""
    return None if snapshot is None else asdict(snapshot) | {"created": snapshot.created.isoformat()}


def unpack_snapshot(value: Any) -> Snapshot:
    """Make the snapshot that was described."""
    return Snapshot(**(value | {"created": datetime.fromisoformat(value["created"])}))
