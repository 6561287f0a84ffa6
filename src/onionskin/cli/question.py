"""The question on a terminal before data is lost, which is answered with yes or no.

What must hold: a signal ends the question whenever it comes. Python only notes a signal that comes just before a call that
waits, and the call waits on: a program that types Ctrl-C as soon as it sees the question would wait for ever. So nothing is
read before something is there to be read, and what waits for that is woken by signals too.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from onionskin.cli.output import cell, naming
from onionskin.errors import StateError

_ANSWERS = {b"y": True, b"yes": True, b"n": False, b"no": False, b"": False}


def confirm_loss(question: str, loss: str, *, advice: str = "drop them, or take a snapshot first") -> None:
    """Ask on a terminal before data is lost, where --yes was not given; elsewhere require it.

    Raises
    ------
    StateError
        There is no terminal. ``loss`` says what would be lost.
    click.Abort
        The answer was no, or the input ended.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise StateError(f"{loss}; give --yes to {advice}")
    if not _is_agreed(cell(question)):
        raise click.Abort


def _is_agreed(question: str) -> bool:
    """Ask on stderr, until the answer is yes or no. An empty line is a no, and so is the end of the input."""
    is_answered = False
    try:
        with _woken_by_signals() as woken:
            while True:
                click.echo(f"{question} [y/N]: ", err=True, nl=False)
                line = _line(woken)
                is_answered = line.endswith(b"\n")
                if not is_answered:
                    return False
                answer = _ANSWERS.get(line.strip().lower())
                if answer is not None:
                    return answer
                click.echo("answer y or n", err=True)
    finally:
        if not is_answered:
            with suppress(OSError):  # the terminal may be gone
                click.echo(err=True)  # the line of the question has not ended


def _line(woken: int) -> bytes:
    """Read a line; at the end of the input, what was typed before it."""
    waits = select.poll()
    for descriptor in (sys.stdin.fileno(), woken):
        waits.register(descriptor, select.POLLIN)
    line = b""
    while not line.endswith(b"\n"):
        ready = [descriptor for descriptor, _ in waits.poll()]
        if woken in ready:
            os.read(woken, 512)  # the signal was heard by now; the process goes on, so it was one that ends nothing
            continue
        with suppress(BlockingIOError), naming("stdin"):  # somebody else read it
            part = os.read(sys.stdin.fileno(), 4096)
            if not part:
                break
            line += part
    return line


@contextmanager
def _woken_by_signals() -> Iterator[int]:
    """Give a descriptor that can be read once a signal has come."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False) if is_main else -1
    try:
        yield reader
    finally:
        if is_main:
            signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
