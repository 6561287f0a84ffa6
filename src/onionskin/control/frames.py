"""The frames of the control protocol: a length of four bytes, big-endian, then that many bytes of JSON, an object.

Both ends check the length before they allocate memory for it. See "Live operations" in docs/design.md.
"""

import json
import operator
import os
import select
import socket
import struct
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from types import NoneType
from typing import Any

from onionskin import errors
from onionskin.base.limits import NOTE_BYTES_MAX
from onionskin.catalog.tree import Snapshot
from onionskin.errors import FormatError, OnionskinError, StateError

VERSION = 1
# Of the first greeting on a socket that several volumes share: the caller names one of them, and is greeted by that.
SHARED_VERSION = 2
# While an operation runs, the server reports regularly that it is alive; a caller that hears nothing for much longer
# gives up.
ALIVE_SECONDS = 2.0
WORD_SECONDS = 3 * ALIVE_SECONDS / 2  # of silence, after which a caller is told that it waits, and for whom
SILENCE_SECONDS = 30.0
TEXT_BYTES_MAX = NOTE_BYTES_MAX  # more than any name has
REQUEST_BYTES_MAX = 1 << 22  # 10,000 names that a fork is to give
REPLY_BYTES_MAX = 1 << 23
_LENGTH = struct.Struct(">I")
LATER = {"guid", "machine"}  # arguments that clients and servers of the same version may not know
ARGUMENTS: dict[str, dict[str, tuple[type, ...]]] = {
    "info": {},
    "stats": {},
    "snapshots": {},
    "parent": {},
    "head_changed": {},
    "snapshot": {"name": (str, NoneType), "note": (str,), "guid": (str, NoneType)},
    "revert": {"name": (str,), "guid": (str, NoneType), "machine": (str, NoneType)},
    "revert_machine": {"machine": (str,), "snapshot": (str,), "names": (dict,), "guids": (dict,)},
    "discard": {"name": (str, list), "recursive": (bool,), "guid": (str, list, NoneType)},
    "merge": {"name": (str, list), "guid": (str, list, NoneType)},
    "tidy": {},
    "rename": {"new_name": (str,)},
    "merge_into_base": {"upto": (str, NoneType), "threads": (int,), "bytes_per_second": (int,)},
    "trim": {"offset": (int,), "length": (int,)},
    "zero": {"offset": (int,), "length": (int,)},
    "read": {"offset": (int,), "length": (int,)},
    "flush": {},
    "resize": {"size_bytes": (int,)},
    "diff": {"a": (str,), "b": (str, NoneType)},
    "usage": {},
    "group": {"volumes": (list,)},
    "snapshot_group": {"names": (dict,), "guids": (dict,), "note": (str,)},
    "fork": {
        "source": (str,),
        "names": (list, NoneType),
        "count": (int,),
        "pattern": (str,),
        "key": (str, NoneType),
        "lifetime_ns": (int, NoneType),
        "labels": (dict,),
        "wipe": (str, NoneType),
        "ids": (list, NoneType),
    },
}
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
        errors.MachineNotFoundError,
        errors.MachineExistsError,
        errors.VerifyError,
        errors.OnionskinError,
        ValueError,
        TypeError,
    )
}


def send(connection: socket.socket, value: dict[str, Any], *, bytes_max: int) -> None:
    """Send one frame. Raise ValueError if it would be longer than the other end accepts."""
    frame = packed(value)
    if len(frame) - _LENGTH.size > bytes_max:
        raise ValueError(
            f"a message of {len(frame)} bytes is longer than the {bytes_max} that the control socket takes"
        )
    connection.sendall(frame)


def packed(value: dict[str, Any]) -> bytes:
    """Return the frame of a value."""
    # Escaped, a name in another script takes three times its bytes, and 10,000 of them are no request any more. A half
    # of a pair of surrogates, as in the name of a file that is no UTF-8, is read again by `json.loads`.
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")
    return _LENGTH.pack(len(text)) + text


def receive(connection: socket.socket, *, bytes_max: int, deadline: float | None = None) -> dict[str, Any] | None:
    """Receive one frame. Return None if the other end has disconnected.

    `deadline`, by the monotonic clock, is for the frame as a whole: the timeout of the connection is one for each piece, so
    an end that sends a byte now and then is waited for as long as it likes.

    Raises
    ------
    FormatError
        The bytes are not a frame, or the frame is too long.
    TimeoutError
        It did not come in time.
    """
    head = _exactly(connection, _LENGTH.size, deadline)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > bytes_max:
        raise FormatError(f"a message of {length} bytes came in on the control socket; at most {bytes_max} are taken")
    text = _exactly(connection, length, deadline)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError("what came in on the control socket is no JSON; is it another program?") from None
    if not isinstance(value, dict):
        raise FormatError("what came in on the control socket is JSON, but no object; is it another program?")
    return value


def _exactly(connection: socket.socket, length: int, deadline: float | None) -> bytes | None:
    parts = []
    while length:
        if deadline is not None:
            _wait_until(connection, deadline)
        try:
            part = connection.recv(min(length, 1 << 16))
        except ConnectionResetError:  # the other end closed with something unread
            return None
        if not part:
            return None
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _wait_until(connection: socket.socket, deadline: float) -> None:
    """Wait until something has come, or the other end is gone."""
    arrives = select.poll()
    arrives.register(connection, select.POLLIN)
    if not arrives.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


# ---- the contents of frames ----


def request(verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make a request from the arguments of a method. Refuse arguments that JSON or the server does not accept.

    Raises
    ------
    TypeError, ValueError
        An argument is of another type, negative, or text that no catalog can hold.
    """
    # None is left out, so that a server that does not know the argument yet takes the request.
    arguments = {name: value for name, value in arguments.items() if value is not None or name not in LATER}
    for name, kinds in ARGUMENTS[verb].items():
        if name in LATER and name not in arguments:
            continue
        value = arguments[name]
        if bool not in kinds and int in kinds and not isinstance(value, bool):
            with suppress(TypeError):
                arguments[name] = value = operator.index(value)
        if type(value) not in kinds:
            wanted = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
            raise TypeError(f"{verb}: {name} is of type {type(value).__name__}; give {wanted}")
        if fault := _fault_of(value):
            raise ValueError(f"{verb}: {name} cannot be {_shown(value)}: {fault}")
    return {"version": VERSION, "verb": verb, "arguments": arguments}


def checked_request(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the verb and the arguments of a request. Raise an error if it is not well formed."""
    if request.get("version") != VERSION:
        raise StateError(
            f"this server speaks version {VERSION} of the control protocol, not {request.get('version')!r}; use "
            "the same onionskin at both ends"
        )
    verb, arguments = request.get("verb"), request.get("arguments")
    wanted = ARGUMENTS.get(verb) if isinstance(verb, str) else None
    if wanted is None or not isinstance(verb, str):
        raise ValueError(f"{_shown(verb)} is no verb of the control socket: it is one of {', '.join(ARGUMENTS)}")
    if isinstance(arguments, dict):
        arguments = dict.fromkeys(LATER & set(wanted)) | arguments
    if not isinstance(arguments, dict) or set(arguments) != set(wanted):
        raise ValueError(f"{verb} takes exactly these arguments: {', '.join(wanted) or 'none'}")
    for name, kinds in wanted.items():
        value = arguments[name]
        if type(value) not in kinds or (fault := _fault_of(value)):
            why = f": {fault}" if type(value) in kinds else ""
            raise ValueError(f"{verb}: {name} cannot be {_shown(value)}{why}")
    return verb, arguments


def _fault_of(value: Any) -> str | None:
    """Return the reason to refuse a value of the right type, or None."""
    if isinstance(value, str):
        if "\0" in value:
            return "it has a zero byte"
        try:
            length = len(value.encode())
        except UnicodeEncodeError:
            return "it is not Unicode"
        return f"it has more than {TEXT_BYTES_MAX} bytes" if length > TEXT_BYTES_MAX else None
    if isinstance(value, list):
        if not value or not all(isinstance(one, str) for one in value):
            return "it is no list of names"
        return next(filter(None, map(_fault_of, value)), None)
    if isinstance(value, dict):
        return next(filter(None, (_fault_of([*pair]) for pair in value.items())), None)
    if isinstance(value, int) and not 0 <= value < 1 << 63:
        return "it is negative, or larger than any disk"
    return None


def _shown(value: Any) -> str:
    """Write a value for a message, cut off after 60 characters."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


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
    """Make the error that `pack_error` described at the other end."""
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
    """Describe a snapshot in a form that JSON can hold."""
    return None if snapshot is None else asdict(snapshot) | {"created": snapshot.created.isoformat()}


def unpack_snapshot(value: Any) -> Snapshot:
    """Make the snapshot that `pack_snapshot` described."""
    return Snapshot(**(value | {"created": datetime.fromisoformat(value["created"])}))
