"""The guest of the demo under QEMU alone, on a qcow2 disk: what onionskin is compared with (savevm, loadvm)."""

import os
import subprocess
import time
from pathlib import Path
from typing import Self

from onionskin.base.sockets import connect_unix
from onionskin.errors import StateError
from onionskin.guests.console import Console
from onionskin.machine.monitor import Monitor

SECONDS = 120.0


class PlainQemu:
    """A machine that QEMU runs alone. A context manager, at whose end it is gone.

    Parameters
    ----------
    directory : Path
        For its sockets. Its disk is ``disk.qcow2`` there.
    command : list of str
        QEMU, with all but the disk and the sockets.
    """

    def __init__(self, directory: Path, command: list[str]) -> None:
        for name in ("plain.qmp", "plain.console"):
            (directory / name).unlink(missing_ok=True)
        given = [
            *("-drive", "file=disk.qcow2,format=qcow2,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk"),
            *("-chardev", "socket,id=qmp,path=plain.qmp,server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
            *("-chardev", "socket,id=console,path=plain.console,server=on,wait=off", "-serial", "chardev:console"),
        ]
        self._process = subprocess.Popen(
            [*command, *given],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the demo, which ends it
        )
        try:
            self.console: Console = self._connect(directory / "plain.console")
            self._monitor = Monitor(directory / "plain.qmp", "plain", seconds=SECONDS)
        except BaseException:
            self._kill()
            raise

    def _connect(self, path: Path) -> Console:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                return Console(connect_unix(path, seconds=SECONDS), "the guest on qcow2")
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = os.read(self._process.stderr.fileno(), 4096).decode() if self._process.stderr else ""
                    raise StateError(f"QEMU did not start: {said.strip()}") from None
                time.sleep(0.002)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill it. Further calls do nothing."""
        self._monitor.close()
        self.console.close()
        self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stderr:
            self._process.stderr.close()

    def run(self, command: str) -> None:
        """Run a command of QEMU's monitor for people."""
        said = self._monitor.execute("human-monitor-command", {"command-line": command}, seconds=SECONDS)
        if str(said).strip():
            raise StateError(f"QEMU refused {command!r}: {str(said).strip()}")
