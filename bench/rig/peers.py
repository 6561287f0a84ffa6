"""What a user would pick instead: qemu-img, QEMU's live snapshots over QMP, copies, dd, shred."""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QEMU = "qemu-system-x86_64"


def missing(*programs: str) -> str | None:
    """The reason to skip a peer, or None where all of its programs are here."""
    gone = [program for program in programs if shutil.which(program) is None]
    return f"not installed: {', '.join(gone)}" if gone else None


def run(*command: object, stdin: str | None = None) -> str:
    """Run a program that has to succeed; returns what it printed."""
    words = [str(word) for word in command]
    result = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(words[:4])}: {result.stderr.strip()}")
    return result.stdout


def sync_file(path: Path) -> None:
    """Make a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def full_copy(source: Path, target: Path) -> None:
    """Copy all bytes, and sync them."""
    run("cp", "--reflink=never", source, target)
    sync_file(target)


def create_qcow2(path: Path, *, size: int | None = None, backing: Path | None = None, options: str = "") -> Path:
    """Make a qcow2 image over nothing or over another image."""
    command: list[object] = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        command += ["-o", options]
    if backing:
        command += ["-b", backing, "-F", "qcow2" if backing.suffix == ".qcow2" else "raw"]
    run(*command, path, *([size] if size is not None else []))
    return path


def qemu_io_write(path: Path, offsets: Iterable[int], length: int, pattern: int) -> None:
    """Write one extent of a repeated byte at each offset of a qcow2 image, and flush."""
    commands = [f"write -P {pattern} {offset} {length}" for offset in offsets]
    run("qemu-io", "-f", "qcow2", path, stdin="\n".join([*commands, "flush", "quit\n"]))


def qemu_bench(path: Path, *, count: int, step: int, write: bool = False, depth: int = 1, offset: int = 0) -> float:
    """Seconds that qemu-img bench takes for `count` requests of 4 KiB, `step` bytes apart, modulo the size.

    A write run ends with the flush that is counted too.
    """
    command: list[object] = ["qemu-img", "bench", "-f", "qcow2", "-c", count, "-d", depth, "-s", 4096, "-S", step]
    command += ["-o", offset, "-t", "writeback"]
    if write:
        command += ["-w", "--flush-interval", count, "--pattern", 90]
    found = re.search(r"Run completed in ([\d.]+) seconds", run(*command, path))
    assert found
    return float(found[1])


class Qmp:
    """A client of QEMU's JSON socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
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
    """A qcow2 disk of a running QEMU: written through its monitor, snapshotted over QMP."""

    def __init__(self, qmp: Qmp, directory: Path) -> None:
        self._qmp, self._directory = qmp, directory
        self._number = 0

    def write(self, offset: int, length: int) -> None:
        """Write through QEMU's block layer."""
        line = f'qemu-io drive0 "write -q -P 7 {offset} {length}"'
        self._qmp.execute("human-monitor-command", **{"command-line": line})

    def snapshot(self) -> None:
        """Take an external snapshot: the old image is flushed, a new one is made over it."""
        self._number += 1
        file = str(self._directory / f"live-{self._number}.qcow2")
        self._qmp.execute("blockdev-snapshot-sync", device="drive0", format="qcow2", **{"snapshot-file": file})


@contextmanager
def live_disk(image: Path) -> Iterator[LiveDisk]:
    """Start a QEMU without a guest that has a qcow2 image open."""
    path = image.with_suffix(".qmp")
    command = [QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off"]
    drive = f"if=none,id=drive0,format=qcow2,file={image}"
    process = subprocess.Popen([*command, "-drive", drive], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        qmp = _connect(path, process)
        try:
            yield LiveDisk(qmp, image.parent)
        finally:
            qmp.execute("quit")
            qmp.close()
    finally:
        process.wait(timeout=30)
        assert process.stderr
        process.stderr.close()


def _connect(path: Path, process: "subprocess.Popen[bytes]") -> Qmp:
    import time

    for _ in range(200):
        try:
            return Qmp(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if process.poll() is not None:
                break
            time.sleep(0.05)
    raise RuntimeError("QEMU did not open its socket")


@contextmanager
def loop_mount(directory: Path, kind: str, size: int) -> Iterator[Path]:
    """Mount a fresh file system over a sparse file. Needs root."""
    image, point = directory / f"{kind}.img", directory / kind
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    run(f"mkfs.{kind}", "-q", image)
    run("mount", "-o", "loop", image, point)
    try:
        yield point
    finally:
        run("umount", point)
        image.unlink()
        point.rmdir()


def mount_missing(kind: str) -> str | None:
    """The reason to skip what needs a loop mount, or None."""
    if os.geteuid() != 0:
        return "only root mounts a file system"
    return missing(f"mkfs.{kind}", "mount")
