"""A running QEMU without a guest: its disk is written through the monitor and snapshotted over QMP."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QEMU = "qemu-system-x86_64"


class Qmp:
    """A client of QEMU's JSON socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._file = self._socket.makefile("r")
        self._file.readline()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, verb: str, **arguments: Any) -> Any:
        """Run one command; returns its result. Events that come between are dropped."""
        self._socket.sendall(json.dumps({"execute": verb, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise RuntimeError(f"{verb}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class LiveDisk:
    """A qcow2 disk of a running QEMU."""

    def __init__(self, qmp: Qmp, directory: Path) -> None:
        self._qmp, self._directory = qmp, directory
        self._number = 0

    def write(self, offset: int, length: int) -> None:
        """Write through QEMU's block layer."""
        printed = self._qmp.execute(
            "human-monitor-command", **{"command-line": f'qemu-io drive0 "write -P 7 {offset} {length}"'}
        )
        assert not printed or "rror" not in printed, printed

    def snapshot(self) -> None:
        """Take an external snapshot: the old image is flushed, a new one is made over it."""
        self._number += 1
        file = str(self._directory / f"live-{self._number}.qcow2")
        self._qmp.execute("blockdev-snapshot-sync", device="drive0", format="qcow2", **{"snapshot-file": file})


@contextmanager
def live_disk(image: Path) -> Iterator[LiveDisk]:
    """Start a QEMU that has a qcow2 image open."""
    path = image.with_suffix(".qmp")
    command = [QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off"]
    drive = f"if=none,id=drive0,format=qcow2,file={image}"
    process = subprocess.Popen([*command, "-drive", drive], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        qmp = _connect(path, process)
        try:
            yield LiveDisk(qmp, image.parent)
        finally:
            qmp.execute("quit")
            qmp.close()
    finally:
        process.wait(timeout=30)


def _connect(path: Path, process: "subprocess.Popen[bytes]") -> Qmp:
    for _ in range(200):
        try:
            return Qmp(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if process.poll() is not None:
                break
            time.sleep(0.05)
    raise RuntimeError("QEMU did not open its socket")
