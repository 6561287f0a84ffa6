"""A terminal that talks to the serial console of a machine: bytes both ways, until the user leaves or the machine ends.

What must hold: a guest that takes nothing keeps nobody from leaving, nor from seeing what it says.
"""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket

from onionskin.cli import output

_PIECE_BYTES = 1 << 16
_WAITING_BYTES_MAX = 1 << 20  # of what was typed, and the guest has not taken: no more is read then


def talk(connection: socket, *, leave: bytes) -> None:
    """Pass on what is typed and what comes, until `leave` is typed or either end is gone."""
    typed, shown = sys.stdin.fileno(), sys.stdout.fileno()
    is_terminal = os.isatty(typed)
    if is_terminal:
        output.echo("connected; Ctrl-] leaves", err=True)
    connection.setblocking(False)
    waiting, is_over = b"", False
    with _raw(typed):
        while waiting or not is_over:
            is_full = is_over or len(waiting) >= _WAITING_BYTES_MAX
            ready = _wait(connection, None if is_full else typed, is_sending=bool(waiting))
            if typed in ready:
                data = os.read(typed, _PIECE_BYTES)
                before, left, _ = data.partition(leave)
                waiting += before
                is_over = not data
                if left or (is_over and is_terminal):
                    _send(connection, waiting)
                    return  # without waiting for the guest
            waiting = waiting[_send(connection, waiting) :]
            if connection.fileno() in ready:
                data = _received(connection)
                if not data:
                    return
                _write_all(shown, data)


def _wait(connection: socket, typed: int | None, *, is_sending: bool) -> set[int]:
    """Wait until there is something to do. Return which of the two can be read, or have ended."""
    waits = select.poll()
    waits.register(connection, select.POLLIN | (select.POLLOUT if is_sending else 0))
    if typed is not None:
        waits.register(typed, select.POLLIN)
    return {descriptor for descriptor, events in waits.poll() if events & ~select.POLLOUT}


def _send(connection: socket, data: bytes) -> int:
    """Send what the guest takes now. Return how many bytes that are."""
    try:
        return connection.send(data) if data else 0
    except BlockingIOError:
        return 0
    except ConnectionError:  # the machine has ended: what it said before that can be read still
        return len(data)


def _received(connection: socket) -> bytes:
    """Return what came; nothing where the machine has ended."""
    try:
        return connection.recv(_PIECE_BYTES)
    except ConnectionError:
        return b""


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


@contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """Have a terminal pass on each key as it is, for the time of the block. What is no terminal is left alone."""
    if not os.isatty(descriptor):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
