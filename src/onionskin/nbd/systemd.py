"""The protocol with systemd: it passes open sockets to the server (LISTEN_FDS), and the server reports its state."""

import os
import socket
from contextlib import suppress

from onionskin.errors import StateError

_FIRST = 3
_COUNT_MAX = 64


def inherited_listeners() -> list[socket.socket]:
    """Take over the listening sockets that systemd passed to this process, if there are any.

    Raises
    ------
    StateError
        A descriptor is not a listening stream socket.
    """
    count_text = os.environ.get("LISTEN_FDS", "")
    is_ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # so that child processes do not see them
    if not is_ours or not count_text.isdigit():
        return []
    count = int(count_text)
    if count > _COUNT_MAX:
        raise StateError(f"LISTEN_FDS passes {count} sockets; give at most {_COUNT_MAX}")
    return [_take(descriptor) for descriptor in range(_FIRST, _FIRST + count)]


def _take(descriptor: int) -> socket.socket:
    fault = f"descriptor {descriptor} of LISTEN_FDS is no listening stream socket; the unit wants ListenStream="
    try:
        os.set_inheritable(descriptor, False)
        listener = socket.socket(fileno=descriptor)
    except OSError:
        raise StateError(fault) from None
    is_right = listener.family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) and (
        listener.type == socket.SOCK_STREAM and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    )
    if not is_right:
        listener.detach()
        raise StateError(fault)
    return listener


def notify(state: str) -> None:
    """Tell the service manager a state, if there is a manager. It is no error if the manager does not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.connect("\0" + address[1:] if address.startswith("@") else address)
        manager.sendall(state.encode())
