"""A terminal that talks to the serial console of a machine: bytes both ways, until the user leaves or the machine ends."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket

from onionskin.cli import output

_PIECE_BYTES = 1 << 16


def talk(connection: socket, *, leave: bytes) -> None:
    """Pass on what is typed and what comes, until `leave` is typed or either end is gone."""
    typed, shown = sys.stdin.fileno(), sys.stdout.fileno()
    if os.isatty(typed):
        output.echo("connected; Ctrl-] leaves", err=True)
    with _raw(typed):
        waits = select.poll()
        waits.register(connection, select.POLLIN)
        waits.register(typed, select.POLLIN)
        while True:
            for descriptor, _ in waits.poll():
                if descriptor == typed:
                    data = os.read(typed, _PIECE_BYTES)
                    before, left, _ = data.partition(leave)
                    connection.sendall(before)
                    if left or not data:
                        return
                else:
                    data = connection.recv(_PIECE_BYTES)
                    if not data:
                        return
                    _write_all(shown, data)


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
