"""The server of a machine's disks: `onionskin serve` in a process of its own, which is started again when it dies.

What must hold: a machine whose server died waits, and goes on. A server that dies again and again is given up, and that is
said: it is started RESTARTS_MAX times within WITHIN_SECONDS. What it serves is held for as long as it runs, so its end is
waited for before the disks are anybody else's.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import quote

from onionskin.control.client import is_stopped
from onionskin.errors import StateError
from onionskin.machine.record import DISKS, SERVER_LOG, ProcessId, open_log

READY_SECONDS, READY_SECONDS_MAX = 60.0, 240.0  # the longer one as long as it was not stopped by a signal
LOOK_SECONDS = 0.5  # after so long it is looked again whether it is at it
END_SECONDS = 60.0  # it flushes the disks
RESTARTS_MAX, WITHIN_SECONDS = 5, 60.0
TELL_LISTENING = "--tell-listening"


# Starts a server from a process that has loaded it already (`fork.py`), and returns its id and its output.
# None: that was killed.
Spawn = Callable[[list[str], int], tuple[int, IO[bytes]] | None]
spawn: Spawn | None = None


class DiskServer:
    """Serves the disks of a machine. One thread at a time may use it.

    Parameters
    ----------
    store : Path
    volumes : sequence of str
        In the order of the disks.
    directory : Path
        Of the machine: the socket and the log are there.
    trust : bool
        Whether the store may be another user's.
    found : ProcessId, optional
        One that serves them already.
    labels : sequence of str, optional
        What clients call them, which stays when they are renamed. By default their names.

    Attributes
    ----------
    restarts : int
        How often it was started again.
    is_given_up : bool
        Whether it died too often, and is not started again.
    """

    def __init__(
        self,
        store: Path,
        volumes: Sequence[str],
        directory: Path,
        *,
        trust: bool = False,
        found: ProcessId | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        self._store = store.absolute()
        self._volumes = list(volumes)
        self.labels = list(labels)
        self._directory = directory
        self._trust = trust
        self._child: subprocess.Popen[bytes] | None = None
        self._starts: deque[float] = deque(maxlen=RESTARTS_MAX)
        self.process: ProcessId | None = found
        self.restarts = 0
        self.is_given_up = False
        self._output: IO[bytes] | None = None
        self._is_listening = False
        self._deadline = 0.0

    @property
    def uris(self) -> list[str]:
        """Where the disks are, in their order."""
        socket = quote(str(self._directory / DISKS))
        return [f"nbd+unix:///{quote(volume, safe='')}?socket={socket}" for volume in self.labels or self._volumes]

    @property
    def is_at_it(self) -> bool:
        """Whether it serves the disks, or will again: it was not stopped by a signal, and not given up."""
        process = self.process
        return bool(self._volumes) and not self.is_given_up and not (process is not None and is_stopped(process.pid))

    def rename(self, volumes: Sequence[str]) -> None:
        """Take note of what the volumes are called now. Clients have them by their labels."""
        self._volumes = list(volumes)

    def start(self) -> None:
        """Start it, and return when it is ready.

        Raises
        ------
        StateError
            It did not come up; its log says why.
        """
        self.begin()
        self.wait_ready()

    def begin(self) -> None:
        """Start it. Who calls `wait_listening` then can connect, and `wait_ready` that the disks are there.

        Raises
        ------
        StateError
            It could not be started.
        """
        if not self._volumes:
            return
        trust = ["--trust"] if self._trust else []
        names = [f"{self._store}/{volume}" for volume in self._volumes]
        log = open_log(self._directory / SERVER_LOG, os.O_TRUNC)
        arguments = ["serve", *names, "--socket", str(self._directory / DISKS), "--allow-revert", "--json", *trust]
        arguments += [TELL_LISTENING]
        arguments += [f"--as={label}" for label in self.labels]
        try:
            spawned = spawn(arguments, log) if spawn is not None else None
            pid, output = spawned or self._start_program(arguments, log)
        finally:
            os.close(log)
        self.process = ProcessId.of(pid)
        self._output, self._deadline = output, time.monotonic() + READY_SECONDS
        self._deadline_max = time.monotonic() + READY_SECONDS_MAX
        self._is_listening = False

    def wait_listening(self) -> None:
        """Return when what was begun listens: who connects waits until it is ready. Further calls do nothing.

        Raises
        ------
        StateError
            It did not come up; its log says why.
        """
        if self._output is not None and not self._is_listening:
            self._wait_for("listening")
            self._is_listening = True

    def wait_ready(self) -> None:
        """Return when what was begun is ready. Further calls do nothing.

        Raises
        ------
        StateError
            It did not come up; its log says why.
        """
        self.wait_listening()
        if self._output is not None:
            self._wait_for("ready")
            self._close_output()

    def _wait_for(self, what: str) -> None:
        try:
            is_so = json.loads(self._line()).get(what) is True
        except (ValueError, AttributeError):
            is_so = False
        if not is_so:
            self.end(seconds=0)
            raise StateError(f"the disks of the machine cannot be served: {self._said()}")

    def _close_output(self) -> None:
        if self._output is not None:
            self._output.close()
            self._output = None

    def _start_program(self, arguments: list[str], log: int) -> tuple[int, IO[bytes]]:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "onionskin", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            umask=0o077,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},
        )
        assert self._child.stdout is not None
        return self._child.pid, self._child.stdout

    def _line(self) -> bytes:
        """Return its next line, or what it wrote of one before it ended or took too long."""
        assert self._output is not None
        poll = select.poll()
        poll.register(self._output.fileno(), select.POLLIN)
        line = b""
        while not line.endswith(b"\n") and self._has_more(poll):
            part = os.read(self._output.fileno(), 1)  # so that nothing of the line behind it is taken
            if not part:
                break
            line += part
        return line

    def _has_more(self, poll: select.poll) -> bool:
        """Wait for its output or its end, or return False where both took too long. On a busy host it may have no turn."""
        while not poll.poll(max(0.0, self._deadline - time.monotonic()) * 1000):
            now = time.monotonic()
            if now >= self._deadline_max or not self.is_at_it:
                return False
            self._deadline = min(now + LOOK_SECONDS, self._deadline_max)
        return True

    def restart(self) -> None:
        """Start it again after its end.

        Raises
        ------
        StateError
            It has died too often, or did not come up.
        """
        now = time.monotonic()
        if len(self._starts) == RESTARTS_MAX and now - self._starts[0] < WITHIN_SECONDS:
            self.is_given_up = True
            raise StateError(
                f"the server of the machine's disks died {RESTARTS_MAX} times within {WITHIN_SECONDS:.0f} s, and is not "
                f"started again: {self._said()}"
            )
        self._starts.append(now)
        self.restarts += 1
        self.reap()
        self.start()

    def reap(self) -> None:
        """Take note of the end of a child."""
        if self._child is not None:
            self._child.poll()

    def end(self, seconds: float = END_SECONDS) -> None:
        """End it: it flushes the disks, and gives them up. Killed, if that takes too long. Further calls do nothing."""
        self._close_output()
        if self.process is None:
            return
        self.process.end(seconds)
        if self._child is not None:
            self._child.wait()
        self.process = self._child = None

    def _said(self) -> str:
        """Return the last line of its log."""
        path = self._directory / SERVER_LOG
        try:
            lines = path.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else f"see {path}"
