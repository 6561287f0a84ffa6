"""Shows a snapshot as a raw file: `nbdfuse` runs a server for this one snapshot, and both end with the mount.

What must hold: when `mount` returns, the file can be read. When it raises, nothing is mounted and nothing runs.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from onionskin.base.signals import DeferredInterrupt
from onionskin.errors import OnionskinError, StateError

READY_SECONDS = 30.0
_POLL_SECONDS = 0.02


def mount(name: str, directory: Path, file_name: str, *, trust: bool = False) -> Path:
    """Show a snapshot, given as STORE/VOLUME@SNAPSHOT, as a read-only file in a directory; returns the file's path."""
    nbdfuse = _program("nbdfuse", "nbdfuse (Debian, Ubuntu, Fedora) or libnbd (Arch)")
    if not directory.is_dir():
        directory.stat()
        raise NotADirectoryError(20, "a directory is wanted there; check the path", str(directory))
    if os.path.ismount(directory):
        raise StateError(f"something is mounted on {directory} already; unmount it, or choose another directory")
    file = directory.absolute() / file_name
    server = [sys.executable, "-m", "onionskin", "serve", "--stdio", *["--trust"][:trust], name]
    with tempfile.TemporaryFile() as said:
        process = None
        try:
            with DeferredInterrupt():
                process = subprocess.Popen(
                    [nbdfuse, "--readonly", str(file), "--command", *server],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    start_new_session=True,  # so that it outlives this command, and Ctrl-C in its terminal
                )
            _wait(process, file)
        except BaseException as error:
            if process is None:
                raise
            process.terminate()
            process.wait()
            said.seek(0)
            lines = said.read(1 << 16).decode(errors="replace").strip().splitlines()
            if isinstance(error, StateError) and lines:
                raise StateError(f"{error}: {lines[0].removeprefix('onionskin: ')}") from None
            raise
    process.returncode = 0  # it runs on and ends with the mount, so Popen must not warn that nobody waited for it
    return file


def _wait(process: "subprocess.Popen[bytes]", file: Path) -> None:
    """Wait until the file is there. Nothing announces it, so this looks for the mount again and again."""
    deadline = time.monotonic() + READY_SECONDS
    while not (os.path.ismount(file.parent) and file.exists()):
        if process.poll() is not None:
            raise StateError(f"{file.parent} could not be mounted")
        if time.monotonic() > deadline:
            raise StateError(f"{file.parent} is not mounted after {READY_SECONDS:.0f} s; look at /dev/fuse")
        time.sleep(_POLL_SECONDS)


def unmount(directory: Path) -> None:
    """Undo `mount`. The server of the mount ends by itself."""
    if not os.path.ismount(directory):
        directory.stat()
        raise StateError(f"nothing is mounted on {directory}; 'mount' lists what is")
    ended = subprocess.run(
        [_program("fusermount3", "fuse3"), "-u", str(directory.absolute())], capture_output=True, text=True
    )
    if ended.returncode:
        said = ended.stderr.strip().splitlines()[:1] or [f"exit status {ended.returncode}"]
        raise StateError(f"{directory} could not be unmounted: {said[0]}; end the programs that read from it")


def mounted(table: Path = Path("/proc/self/mountinfo")) -> list[Path]:
    """Return the directories on which nbdfuse is mounted. proc(5) describes the table, mountinfo."""
    found = []
    for line in table.read_bytes().splitlines():
        before, _, behind = line.partition(b" - ")
        kind, source, _ = behind.split(b" ", 2)
        if kind.startswith(b"fuse") and (kind.endswith(b".nbdfuse") or source == b"nbdfuse"):
            escaped = before.split(b" ")[4]
            path = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), escaped)
            found.append(Path(os.fsdecode(path)))
    return found


def _program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise OnionskinError(f"{name} is not installed, and mount needs it; install the package {package}")
    return found
