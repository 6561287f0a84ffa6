"""A program that leads a session of its own, with all that it starts and leaves there.

What must hold: a session has the number of the process that leads it, and once that was reaped, somebody else may get that
number. So whoever leads is reaped by `reap` alone, and nothing is killed behind that.
"""

import os
import select
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


class Session:
    """A child that leads a session. Any thread may use it.

    Parameters
    ----------
    child : Popen
        Started with `start_new_session`. Nobody else waits for it.
    """

    def __init__(self, child: "subprocess.Popen[Any]") -> None:
        self._child = child
        self._guard = threading.Lock()  # over the moment at which it is reaped

    @property
    def pid(self) -> int:
        """The process that leads it."""
        return self._child.pid

    def wait(self, seconds: float) -> int | None:
        """Wait for the end of its leader. Return its status, or None where it still runs. It is not reaped."""
        with self._guard:
            if self._child.returncode is not None:
                return self._child.returncode
            descriptor = os.pidfd_open(self._child.pid)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(seconds * 1000):
                return None
        finally:
            os.close(descriptor)
        with self._guard:
            if self._child.returncode is not None:
                return self._child.returncode
            found = os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
            assert found is not None
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def reap(self) -> None:
        """Wait for the end of its leader, and give up its number."""
        with self._guard:
            self._child.wait()

    def kill(self) -> None:
        """Kill all of it. Does nothing where its leader was reaped."""
        with self._guard:
            if self._child.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._child.pid, signal.SIGKILL)


def say(program: Sequence[str], text: bytes, seconds: float) -> tuple[str, str]:
    """Run a program in a session of its own, give it a text, and return what it writes to its output and its errors.

    All that it started is killed then.

    Raises
    ------
    subprocess.TimeoutExpired
        It, or what it left behind, has not closed both within so many seconds.
    """
    with subprocess.Popen(
        program,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    ) as child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stderr is not None
            with suppress(BrokenPipeError), child.stdin:
                child.stdin.write(text)
            output, errors = _read([child.stdout.fileno(), child.stderr.fileno()], program, seconds)
        finally:
            Session(child).kill()  # it is reaped behind this
    return output, errors


def _read(descriptors: list[int], program: Sequence[str], seconds: float) -> list[str]:
    """Return what comes from each of these until all are closed."""
    said = dict.fromkeys(descriptors, b"")
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as open_ones:
        for descriptor in descriptors:
            open_ones.register(descriptor, selectors.EVENT_READ)
        while open_ones.get_map():
            found = open_ones.select(max(0.0, deadline - time.monotonic()))
            if not found or time.monotonic() > deadline:  # it may write without end
                raise subprocess.TimeoutExpired(program, seconds)
            for key, _ in found:
                part = os.read(key.fd, 65536)
                said[key.fd] += part
                if not part:
                    open_ones.unregister(key.fd)
    return [one.decode(errors="replace") for one in said.values()]
