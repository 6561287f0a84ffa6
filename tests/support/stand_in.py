"""A process that stands in for a hypervisor: its memory is the RAM of a machine, and its "devices" are a text.

It is the process of machine_memory.py, which maps the RAM file as QEMU does. What a guest would do, the test does: between
`resume` and `pause` it calls `write`, and a `Load` does so all the time.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import onionskin
from onionskin.base.dtypes import PAGE_RUN
from onionskin.kernels._ram import PAGE_BYTES, PageTracker
from onionskin.machine.hypervisor import Configuration, Identity, Recorded
from onionskin.machine.monitor import Standstill
from onionskin.machine.preload import Preload, library
from onionskin.machine.ram import GuestRam
from onionskin.machine.running import Running
from onionskin.operations import machines

PAGES = 1024
LENGTH = PAGES * PAGE_BYTES
CONFIGURATION = Configuration(LENGTH)
RECORDED = Recorded("qemu", "7.2.22", "pc-i440fx-7.2", "tcg", "max", LENGTH, 1)
PROGRAM = Path(__file__).parents[1] / "unit" / "machine" / "machine_memory.py"


class StandIn:
    """A `Process` without a hypervisor."""

    monitor: Any = None

    def __init__(self, directory: Path, ram_file: Path, *, is_tracked: bool = True) -> None:
        directory.mkdir(exist_ok=True)
        self.ram_file = ram_file
        self.devices = "as it booted"
        self.reported: list[str] = []  # what is read with the next answer
        self._is_paused = True
        self.guest_has_ended = self.has_stopped_itself = False
        self.sizes: list[int] = []
        self.plugged_now = ["disk0 (virtio-blk-pci)"]
        self.standstill = Standstill(stands=True)
        self.fails_at: str | None = None
        self.when_stopped: Callable[[], None] = lambda: None
        self._prepared: Path | None = None
        self._guard = threading.RLock()
        socket = directory / "preload"
        socket.unlink(missing_ok=True)
        library_of = {"LD_PRELOAD": str(library()), "ONIONSKIN_RAM": str(ram_file), "ONIONSKIN_PRELOAD": str(socket)}
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, ram_file],
            env={**os.environ, **(library_of if is_tracked else {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        assert self._answer() == "ready"
        self._preload = Preload(socket) if is_tracked else None
        self.guest_ram = self._tracked(self._preload) if self._preload else None

    def _tracked(self, preload: Preload) -> GuestRam:
        where = preload.where()
        self.tracker = PageTracker(self.pid, where.start, where.length)
        ram = GuestRam(self.tracker, where.length)
        ram.add_private(swapped=True)
        preload.arm()
        ram.add_private(swapped=False)
        return ram

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def _say(self, line: str) -> str:
        assert self.process.stdin
        with self._guard:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            return self._answer()

    def write(self, page: int, byte: int) -> None:
        """Fill a page."""
        assert self._say(f"{page * PAGE_BYTES} {byte}") == "done"

    def read(self, page: int) -> int:
        """Return the first byte of a page."""
        return int(self._say(f"read {page * PAGE_BYTES}"))

    def whole(self) -> bytes:
        """Return all of RAM."""
        room = np.empty(LENGTH, np.uint8)
        if self._preload is None:
            return self.ram_file.read_bytes()
        self.tracker.read(np.array([(0, LENGTH)], PAGE_RUN), room)
        return room.tobytes()

    def _fail(self, step: str) -> None:
        if self.fails_at == step:
            self.fails_at = None
            raise OSError(28, f"no room at {step}")

    # ---- what a Process does ----

    def ram(self) -> Preload | None:
        return self._preload

    @property
    def is_paused(self) -> bool:
        reported, self.reported = self.reported, []
        for event in reported:
            self.standstill.hear(event)
        return self._is_paused

    def hear_all(self) -> None:
        _ = self.is_paused

    def pause(self, *, runs: bool = False) -> bool:
        self._fail("pause")
        with self._guard:
            ran, self._is_paused = not self.is_paused, True
            self.standstill.hear("STOP")
        return ran

    def resume(self) -> None:
        self._is_paused = False

    def wake(self, before: Callable[[], object] = lambda: None) -> bool:
        return not self.is_paused

    def watch(self, *, stands: bool) -> Standstill:
        self.standstill = Standstill(stands=stands)
        return self.standstill

    def plugged(self) -> list[str]:
        self.hear_all()
        return list(self.plugged_now)

    def disk_bytes(self) -> list[int]:
        return self.sizes

    def prepare_state(self, path: Path) -> None:
        self._fail("prepare_state")
        self._prepared = path

    def save_state(self, meanwhile: Callable[[], object] = lambda: None) -> list[str]:
        assert self.is_paused and self._prepared is not None
        meanwhile()
        self.when_stopped()
        self._fail("save_state")
        self._prepared.write_text(self.devices)
        return self.plugged()

    def finish_state(self) -> None:
        self._prepared = None
        self._fail("finish_state")

    def load_state(self, path: Path) -> None:
        assert self.is_paused
        self._fail("load_state")
        self.devices = path.read_text()

    @contextmanager
    def loading(self, path: Path) -> Iterator[Callable[[], None]]:
        yield lambda: self.load_state(path)

    def freeze(self) -> list[str]:
        self._fail("freeze")
        return ["/"]

    def thaw(self) -> None:
        self.devices += ", thawed"

    def close(self) -> None:
        """End it."""
        if self._preload:
            self._preload.close()
        self.process.kill()
        self.process.communicate()


class Load:
    """Something that a guest does all the time while it runs. A context manager."""

    def __init__(self, process: StandIn, step: Callable[[int], None]) -> None:
        self._process = process
        self._step = step
        self._is_over = False
        self._thread = threading.Thread(target=self._run)
        self.count = 0

    def _run(self) -> None:
        while not self._is_over:
            with self._process._guard:
                if not self._process.is_paused:
                    self.count += 1
                    self._step(self.count)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over = True
        self._thread.join()


def make_machine(store: onionskin.Store, *, wipe: str | None = None) -> None:
    """Make a machine `lab` with two disks."""
    for name in ("web", "data"):
        store.create(name, size="1M").close()
    machines.create(
        store._opened, "lab", ["web", "data"], configuration=CONFIGURATION.to_json(), memory_bytes=LENGTH, wipe=wipe
    )


def attach(store: onionskin.Store, process: StandIn, directory: Path, *, mapped: bytes | None = None) -> Running:
    """Take the stand-in in hand as the machine `lab`, and let it run."""
    row = machines.find(store._opened.catalog, "lab")
    volume = store._open_ram(row)
    running = Running.attach(
        store, "lab", process, volume, CONFIGURATION, RECORDED, Identity(), directory, mapped=mapped  # type: ignore[arg-type]
    )  # fmt: skip
    machines.note_running(store._opened, row.id)
    process.resume()
    return running
