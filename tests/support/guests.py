"""Machines for tests: which QEMUs there are, a guest that is one boot sector, and a reader of consoles.

Debian's QEMU is one. Others are named by ONIONSKIN_QEMUS, a command line with its first arguments each, between semicolons:
"/opt/q10/usr/bin/qemu-system-x86_64 -L /opt/q10/usr/share/qemu -L /opt/q10/usr/share/seabios".
"""

import os
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Self

from support.servers import stop_between_writes

import onionskin
from onionskin.base.sockets import connect_unix
from onionskin.errors import MachineNotFoundError
from onionskin.machine.hypervisor import Configuration

MIB = 1 << 20
SECONDS_MAX = 300  # of a busy machine: only what hangs takes so long
SOURCES = Path(__file__).parent.parent / "machine"
QEMUS = [["qemu-system-x86_64"], *(shlex.split(one) for one in os.environ.get("ONIONSKIN_QEMUS", "").split(";") if one)]


def configuration(qemu: list[str], memory: int = 16, **how: object) -> Configuration:
    """A machine of `memory` MiB on one of QEMUS."""
    given = tuple(how.pop("qemu_args", ()))  # type: ignore[call-overload]
    return Configuration(memory * MIB, program=qemu[0], qemu_args=(*qemu[1:], *given), **how)  # type: ignore[arg-type]


def until(what: Callable[[], bool]) -> None:
    """Wait until something holds that another process does."""
    deadline = time.monotonic() + SECONDS_MAX
    while not what():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def stop_process(pid: int) -> None:
    """Stop a process, as `servers.stop` does. On return all its threads stand still."""
    tasks = Path(f"/proc/{pid}/task")
    stop_between_writes(pid, lambda: until(lambda: all(state_of(task) in "TZX" for task in tasks.iterdir())))


def has_ended(pid: int) -> bool:
    """Whether all threads of a process have ended: its first one does so before others, which still hold its files."""
    try:
        return all(state_of(task) in "ZX" for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return True


def state_of(task: Path) -> str:
    """Return the state of a thread, as /proc has it."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"  # it has ended


def end_machines(store: onionskin.Store) -> None:
    """End all machines of a store. One that waited in a pool may be dropped by whoever had it, since it was listed."""
    for info in store.machines():
        with suppress(MachineNotFoundError):
            store.open_machine(info.name).stop(force=True)


def count_in(store: onionskin.Store, snapshot: str, volume: str = "web") -> int:
    """Return the count of tick.S in a snapshot of its disk. Who goes on from there says this one first, or the next one."""
    with store.open(volume, snapshot=snapshot) as disk:
        return int.from_bytes(disk.read(512, 4), "little")


def build_tick_disk(directory: Path, *given: str) -> Path:
    """Assemble tick.S, with further arguments for `as`: a disk of 1 MiB that boots into it."""
    for tool in ("as", "ld"):
        assert shutil.which(tool), f"{tool} is missing: apt-get install binutils"
    subprocess.run(["as", "--32", *given, SOURCES / "tick.S", "-o", directory / "tick.o"], check=True)
    image = directory / "tick.raw"
    linked = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", directory / "tick.o", "-o", image]
    subprocess.run(linked, check=True)
    os.truncate(image, MIB)
    return image


class Console:
    """Reads the console of a machine from now on, in a thread of its own."""

    def __init__(self, path: Path, *, seconds: float = SECONDS_MAX) -> None:
        self._seconds = seconds
        self._socket = connect_unix(path, seconds=seconds)
        self._text = ""
        self._is_open = True
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.shutdown(2)
        self._thread.join()
        self._socket.close()

    def _read(self) -> None:
        while True:
            try:
                part = self._socket.recv(65536)
            except OSError:
                part = b""
            with self._news:
                self._text += part.decode(errors="replace")
                self._is_open = bool(part)
                self._news.notify_all()
            if not part:
                return

    def type(self, text: str) -> None:
        """Send keys to the guest."""
        self._socket.sendall(text.encode())

    @property
    def text(self) -> str:
        with self._news:
            return self._text

    @property
    def ticks(self) -> list[int]:
        """All counts so far. Of tick.S, they are hexadecimal; the last line may be one that is still written.

        A line can begin with the start of another one: a machine that was put back within a line does not end it.
        """
        return [int(one, 16) for one in re.findall(r"tick ([0-9a-f]{8})$", self.text.rpartition("\n")[0], re.MULTILINE)]

    def wait(self, wanted: Callable[[], bool]) -> None:
        """Return once something holds of what was read."""
        deadline = time.monotonic() + self._seconds
        while not wanted():
            with self._news:
                self._news.wait(0.05)
                is_over = not self._is_open or time.monotonic() > deadline
            if is_over:
                break
        assert wanted(), f"the console: ...{self.text[-400:]!r}"

    def wait_ticks(self, more: int = 3) -> int:
        """Return the last count, once so many more have come."""
        goal = len(self.ticks) + more
        self.wait(lambda: len(self.ticks) >= goal)
        assert "wrong" not in self.text and "failed" not in self.text, self.text[-400:]
        return self.ticks[-1]

    def wait_past(self, count: int) -> None:
        """Return once the guest has said a count above that one: what was said before, and is read now, is passed over."""
        self.wait(lambda: self.ticks[-1:] > [count])
        assert "wrong" not in self.text and "failed" not in self.text, self.text[-400:]

    def wait_back(self, since: int) -> int:
        """Return the first count, from that number on, that is not above the one before it: the machine was put back."""

        def back() -> list[int]:
            return [now for before, now in pairwise(self.ticks[since:]) if now <= before]

        self.wait(lambda: bool(back()))
        return back()[0]

    def wait_end(self) -> None:
        """Return once the machine has ended."""
        self._thread.join(SECONDS_MAX)
        assert not self._thread.is_alive(), f"the console is open: ...{self.text[-400:]!r}"
