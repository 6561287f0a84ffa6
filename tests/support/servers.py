"""`onionskin serve` in a process of its own, and the command line beside it, in this one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from support.nbd_client import NbdClient

from onionskin.base.sockets import UnixListener
from onionskin.cli.app import onionskin as group
from onionskin.nbd.listener import Listener
from onionskin.nbd.server import Server

COMMAND = [sys.executable, "-m", "onionskin"]
END_SECONDS = 300  # of a busy machine: only what hangs takes so long


def onionskin(*arguments: object, status: int = 0, input: str | None = None) -> Result:
    """Run a command line in this process, which saves the start of another."""
    ended = CliRunner().invoke(group, [str(argument) for argument in arguments], input=input)
    assert ended.exit_code == status, f"{arguments}: exit {ended.exit_code}: {ended.stdout}{ended.stderr}"
    return ended


def onionskin_json(*arguments: object) -> Any:
    return json.loads(onionskin(*arguments, "--json").stdout)


class Serve:
    """A server that is ready when this is made."""

    def __init__(self, *arguments: object, log: Path, **options: Any) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", *map(str, arguments), "--json"], stdout=subprocess.PIPE, stderr=stderr, **options
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # the readiness line, or nothing at the end
        if not line:
            self.process.wait()
            raise AssertionError(f"serve ended with {self.process.returncode}: {log.read_text()}")
        self.ready = json.loads(line)

    def __enter__(self) -> "Serve":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def terminate(self) -> int:
        """Send SIGTERM; returns the exit status."""
        self.process.terminate()
        return self._ended()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self._ended()

    def _ended(self) -> int:
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait(END_SECONDS)

    @property
    def socket(self) -> Path:
        (uri,) = [uri for uri in self.ready["uris"] if uri.startswith("nbd+unix")]
        return Path(uri.partition("socket=")[2])

    def client(self, export: str = "web") -> NbdClient:
        return NbdClient.unix(self.socket, export)

    def says(self, text: str) -> None:
        """Wait until it has written this to its log, which a thread of its own does behind what it tells of."""
        deadline = time.monotonic() + END_SECONDS
        while text not in (log := self.log.read_text()):
            assert time.monotonic() < deadline, f"{text!r} is not in {log!r}"
            time.sleep(0.01)

    def uri(self, export: str = "web") -> str:
        return f"nbd+unix:///{export}?socket={self.socket}"


def stop(server: Serve) -> None:
    """Stop a server (SIGSTOP), but not while it writes to a catalog, which nobody else could do meanwhile.

    On return it stands still: on a busy host that is some time after the signal.
    """
    stands_still = partial(os.waitid, os.P_PID, server.process.pid, os.WSTOPPED | os.WNOWAIT)
    stop_between_writes(server.process.pid, stands_still)


def stop_between_writes(pid: int, wait_until_it_stands_still: Callable[[], object]) -> None:
    """Stop a process, and let it go on and stop it again as long as it has SQLite's lock for writing.

    A server writes to the catalog at any time: it makes files in its background.
    """
    while True:
        os.kill(pid, signal.SIGSTOP)
        wait_until_it_stands_still()
        if not _is_writing(pid):
            return
        os.kill(pid, signal.SIGCONT)


def _is_writing(pid: int) -> bool:
    """Whether a process has byte 120 of a file locked: of those of an index of SQLite's log, that is for writing."""
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return any([lock[1], lock[3], lock[4], lock[6]] == ["POSIX", "WRITE", str(pid), "120"] for lock in locks)


def short_socket(directory: Path) -> Path:
    """A path for a socket that other people's programs can connect to: 107 bytes are the most."""
    path = directory / "nbd"
    if len(os.fsencode(path)) > 100:
        raise AssertionError(f"{path} is too long; run the tests with a shorter --basetemp")
    return path


@contextmanager
def in_this_process(server: Server, socket: Path) -> Iterator[None]:
    """Run a server in a thread, where it can be patched."""
    listener = UnixListener(socket)
    server.listen([Listener(listener.socket, listener.path, None, listener.close)])
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(ready.set,))
    thread.start()
    try:
        assert ready.wait(300)
        yield
    finally:
        server.stop()
        thread.join()


def run_tool(*command: object) -> str:
    """Run somebody else's program; returns what it printed."""
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=END_SECONDS)
    assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
    return ended.stdout
